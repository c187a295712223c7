"""One form for every matrix product with constant weights: Gemm(x [M, K], W, b) with alpha = beta = 1, which quantises to QGemm.

1. MatMul(x, W) + b, W of rank 2: Gemm for x of rank 2, Reshape(x, [-1, K]) -> Gemm -> Reshape for higher ranks. The last target
   is a constant where one leading dimension at most is dynamic, else Concat(Shape(...), N), one for all equal shapes.
2. Gemm(alpha, beta) -> Gemm with both in the constants; its bias becomes [N].
3. AveragePool over the whole of a static extent without padding, ReduceMean over the spatial axes -> GlobalAveragePool.
4. A 1x1 Conv on [N, C, 1, 1] that ends the model (only Flatten, Reshape, Squeeze, Softmax ... behind it) -> Flatten -> Gemm
   (-> Reshape). A last Conv without output quantisation stays float in onnxruntime; a Gemm does not.

It must not fire where the rank of x is unknown or 1, where W is the left operand or not a float constant, nor on inner 1x1 Convs
(squeeze-and-excitation), which quantise as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.passes._dims import ONE, Dim, Dims
from qcompile.passes._linear import Linear, bias_of, linear_at, weight_of, write
from qcompile.passes._match import ints_of, is_op, set_type, single_consumer, split_operands, visit
from qcompile.passes._shape_values import Shapes
from qcompile.passes._shape_vector import Targets
from qcompile.rewrite import Close, Promise, Report

_ENDS = ("Flatten", "Reshape", "Squeeze", "Softmax", "LogSoftmax", "Sigmoid", "ArgMax", "Identity", "Dropout")


@dataclass(frozen=True)
class LinearForm:
    """Bring matrix products, and pools and Convs that amount to them, into the form that quantises best."""

    name: str = "linear_form"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """One visit of each node; shapes are those at the start, which every rewrite keeps."""
        shapes = Shapes(graph)
        forms = _Forms(graph, shapes, Targets(graph, shapes))
        return visit(graph, _RULES, lambda _, node: _RULES[node.op](forms, node))


@dataclass
class _Forms:
    """The rules; each answers None where it rewrote, an empty text where it does not apply, else why not."""

    graph: Graph
    shapes: Shapes
    targets: Targets
    flat: dict[Tensor, Tensor] = field(default_factory=dict)

    def matmul(self, node: Node) -> str | None:
        linear = self._with_bias(node)
        if linear is None:
            return ""
        x, weight = node.inputs[0], node.inputs[1]
        dims = self.shapes.dims(x)
        if dims is None or len(dims) < 2:
            return "rank of the input is unknown or 1"
        target: Tensor | None = None
        if len(dims) > 2:
            target = self.targets.get((*dims[:-1], Dim(linear.channels)), linear.output.name)
            if target is None:
                return "the shape of the result cannot be written down"
        inputs: list[Tensor] = [x if target is None else self._flatten(x, dims), weight]
        bias = bias_of(linear) if linear.add is not None else None
        if bias is not None and linear.add is not None:
            inputs.append(self.graph.constant(_constant_name(linear.add), bias.astype(_dtype(weight))))
        output, name = linear.output, node.name
        for old in (linear.add, node):
            if old is not None:
                self.graph.remove(old)
        if target is None:
            self._gemm(inputs, output, name)
            return None
        gemm = self._gemm(inputs, output.name + "_2d", name)
        set_type(gemm.outputs[0], output.elem_type, (None, linear.channels))
        self.graph.node("Reshape", [gemm.outputs[0], target], [output])
        return None

    def _gemm(self, inputs: list[Tensor], output: str | Value, name: str, trans_b: int | None = None) -> Node:
        """A Gemm under the name of the node that it replaces, by which options and reports know it."""
        made = self.graph.node("Gemm", inputs, [output], name=name or None, transB=trans_b)
        made.name = name or made.name
        return made

    def _with_bias(self, node: Node) -> Linear | None:
        """The MatMul with the Add behind it, if that is a bias."""
        follower = single_consumer(self.graph, node.outputs[0])
        if is_op(follower, "Add") and follower is not None:
            linear = linear_at(self.graph, follower.outputs[0])
            if linear is not None and linear.node is node:
                return linear
        return linear_at(self.graph, node.outputs[0])

    def _flatten(self, x: Tensor, dims: Dims) -> Tensor:
        if x not in self.flat:
            target = self.graph.constant(x.name + "_flat_shape", np.array([-1, _width(dims, x)], np.int64))
            flat = self.graph.node("Reshape", [x, target], [x.name + "_flat"]).outputs[0]
            set_type(flat, x.elem_type, (None, _width(dims, x)))
            self.flat[x] = flat
        return self.flat[x]

    def gemm(self, node: Node) -> str | None:
        linear = linear_at(self.graph, node.outputs[0])
        if linear is None:
            return "weights are not constant"
        alpha, beta = float(node.attr("alpha", 1.0)), float(node.attr("beta", 1.0))
        const = node.constant(2)
        if alpha == 1 and beta == 1 and (const is None or const.dims == (linear.channels,)):
            return ""
        bias = bias_of(linear)
        if bias is None:
            return "Gemm adds a whole matrix"
        write(self.graph, linear, weight_of(linear) * alpha, bias if const is not None else None)
        node.attrs.pop("alpha", None)
        node.attrs.pop("beta", None)
        return None

    def pool(self, node: Node) -> str | None:
        dims = self.shapes.dims(node.inputs[0])
        if dims is None or node.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(node.attr("pads", ())):
            return ""
        if [Dim(k) for k in node.attr("kernel_shape")] != list(dims[2:]) or any(d != 1 for d in node.attr("dilations", ())):
            return ""
        node.op = "GlobalAveragePool"
        node.attrs.clear()
        return None

    def mean(self, node: Node) -> str | None:
        dims, axes = self.shapes.dims(node.inputs[0]), ints_of(node, "axes", 1)
        if dims is None or len(dims) != 4 or axes is None or sorted(a % 4 for a in axes) != [2, 3]:
            return ""
        x, output, name = node.inputs[0], node.outputs[0], node.name
        keep = bool(node.attr("keepdims", 1))
        self.graph.remove(node)
        pool = self.graph.node("GlobalAveragePool", [x], [output if keep else output.name + "_pool"], name=name or None)
        if not keep:
            channels = dims[1].factor if dims[1].static else None
            set_type(pool.outputs[0], output.elem_type, (None, channels, 1, 1))
            self.graph.node("Flatten", pool.outputs, [output], axis=1)
        return None

    def conv(self, node: Node) -> str | None:
        dims = self.shapes.dims(node.inputs[0])
        linear = linear_at(self.graph, node.outputs[0])
        if linear is None or dims is None or len(dims) != 4 or dims[2:] != (ONE, ONE) or not self._is_end(node.outputs[0]):
            return ""
        weight = weight_of(linear)
        padded = any(node.attr("pads", ())) or node.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        if node.attr("group", 1) != 1 or padded or weight.shape[2:] != (1, 1):
            return "the last Conv is grouped, padded or larger than 1x1"
        x, old, output, name = node.inputs[0], node.inputs[1], node.outputs[0], node.name
        matrix = self.graph.constant(old.name, weight[:, :, 0, 0].astype(_dtype(old)))
        bias = node.input(2)
        self.graph.remove(node)
        flat = self.graph.node("Flatten", [x], [x.name + "_flat"], axis=1).outputs[0]
        set_type(flat, x.elem_type, (None, weight.shape[1]))
        follower = single_consumer(self.graph, output)
        pair = (dims[0], Dim(linear.channels))
        direct = is_op(follower, "Flatten", "Reshape", "Squeeze") and follower is not None
        inputs: list[Tensor] = [flat, matrix] if bias is None else [flat, matrix, bias]
        if direct and follower is not None and self.shapes.dims(follower.outputs[0]) == pair:
            output = follower.outputs[0]
            self.graph.remove(follower)
            self._gemm(inputs, output, name, trans_b=1)
            return None
        gemm = self._gemm(inputs, output.name + "_2d", name, trans_b=1)
        set_type(gemm.outputs[0], output.elem_type, (None, linear.channels))
        target = self.graph.constant(output.name + "_shape", np.array([-1, linear.channels, 1, 1], np.int64))
        self.graph.node("Reshape", [gemm.outputs[0], target], [output])
        return None

    def _is_end(self, tensor: Value) -> bool:
        while not self.graph.is_output(tensor):
            follower = single_consumer(self.graph, tensor)
            if follower is None or not is_op(follower, *_ENDS):
                return False
            tensor = follower.outputs[0]
        return True


def _width(dims: Dims, x: Tensor) -> int:
    """K: static, since it is the first dimension of constant weights; -1 * -1 cannot arise."""
    if dims[-1].static:
        return dims[-1].factor
    weights = [n.inputs[1].dims for n in x.consumers if is_op(n, "MatMul") and n.inputs[0] is x]
    return next(int(d[0]) for d in weights if d is not None and isinstance(d[0], int))


def _constant_name(add: Node) -> str:
    operands = split_operands(add)
    return add.outputs[0].name if operands is None else operands[1].name


def _dtype(tensor: Tensor) -> np.dtype[np.generic]:
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))


_RULES = {
    "MatMul": _Forms.matmul,
    "Gemm": _Forms.gemm,
    "AveragePool": _Forms.pool,
    "ReduceMean": _Forms.mean,
    "Conv": _Forms.conv,
}
