"""Where to quantise: what a compute operator reads, and what lets a kernel fuse; everything else stays float.

1. Linear nodes (Conv, Gemm with constant weights) read integers. A Conv writes integers too, else its kernel does not fuse;
   a Gemm does so only where another integer node reads it (its float form is as fast, and exact).
2. An integer tensor that reaches a linear node through Add, GlobalAveragePool, Concat or data movement is carried there in
   integers, when all that it is made of comes from linear nodes. A residual stream of floats (LayerNormalization) stays float.
3. Relu and Clip behind a linear node or an Add become the bounds of the range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from qcompile.context import Settings
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.kernel_operands import kernel_operands
from qcompile.wasm_costs import REASON, slow_as_integers

_DATA_ONLY = {
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Gather",
    "DepthToSpace",
    "SpaceToDepth",
    "Expand",
    "Tile",
    "Identity",
}
_SHARED = _DATA_ONLY | {"MaxPool", "Pad", "Resize", "Concat", "Split"}


@dataclass
class Placement:
    """The tensors that become integers, and how each node is treated. Sets hold tensors and nodes of the float graph."""

    linears: list[Node] = field(default_factory=list)
    quantised: set[Tensor] = field(default_factory=set)
    integer: set[Node] = field(default_factory=set)  # Add, GlobalAveragePool and shared-scale nodes done in integers
    folded: set[Node] = field(default_factory=set)  # Relu and Clip that become range bounds
    refused: list[tuple[Node, str]] = field(default_factory=list)


def clip_bounds(node: Node) -> tuple[float, float] | None:
    """(low, high) of a Relu or of a Clip with constant bounds; None for anything else."""
    if node.op == "Relu":
        return 0.0, float("inf")
    if node.op != "Clip":
        return None
    bounds = [-float("inf"), float("inf")]
    for index in (1, 2):
        if node.input(index) is None:
            continue
        constant = node.constant(index)
        if constant is None:
            return None
        value = constant.array()
        if value.size != 1:
            return None
        bounds[index - 1] = float(value.reshape(-1)[0])
    return (bounds[0], bounds[1]) if bounds[0] <= 0.0 <= bounds[1] else None


def data_inputs(node: Node) -> list[Tensor]:
    """The inputs of a shared-scale node that carry data (not shapes, indices or pad values)."""
    return list(node.inputs) if node.op == "Concat" else node.inputs[:1]


def place(graph: Graph, settings: Settings) -> Placement:
    """Decide for every tensor of the canonical float `graph`. The graph is not changed; shapes must have been inferred."""
    return _Placer(graph, settings).run()


class _Placer:
    def __init__(self, graph: Graph, settings: Settings) -> None:
        self.graph = graph
        self.settings = settings
        self.result = Placement()
        self._able: dict[Tensor, bool] = {}
        self._slow: frozenset[Node] = frozenset()

    def run(self) -> Placement:
        result = self.result
        self.graph.sort()
        if self.settings.target == "wasm":
            able = [n for n in self.graph.nodes if n.domain in ("", "ai.onnx") and linear_refusal(n, self.settings) is None]
            self._slow = slow_as_integers(able)
        result.linears = [n for n in self.graph.nodes if self._is_linear(n)]
        linears = set(result.linears)
        for node in self.graph.nodes:
            if clip_bounds(node) is not None and self._folds(node, linears):
                result.folded.add(node)
        self._linears = linears
        for node in result.linears:
            self._want(node.inputs[0])
            if node.op == "Conv":
                self._want(self._final(node.outputs[0]))
        for node, index in kernel_operands(self.graph, self.settings):
            self._want(node.inputs[index])
        result.folded = {
            n
            for n in result.folded
            if self._base(n) in linears | result.integer and self._final(n.outputs[0]) in result.quantised
        }
        return result

    def _is_linear(self, node: Node) -> bool:
        if node.domain not in ("", "ai.onnx"):
            return False
        reason = linear_refusal(node, self.settings)
        if reason is None and node in self._slow:
            reason = REASON
        if reason is None:
            return True
        if reason:
            self.result.refused.append((node, reason))
        return False

    def _folds(self, node: Node, linears: set[Node]) -> bool:
        """A Relu/Clip folds where it alone reads a linear node, an Add, or another folded one."""
        source = node.inputs[0]
        producer = source.producer
        if producer is None or len(source.outputs) != 1 or self.graph.is_pinned(source) or self.settings.excluded(node.name):
            return False
        return producer in linears or producer.op == "Add" or producer in self.result.folded

    def _final(self, value: Value) -> Value:
        """The tensor after the folded Relu/Clip behind `value`."""
        while len(value.consumers) == 1 and value.consumers[0] in self.result.folded:
            value = value.consumers[0].outputs[0]
        return value

    def _base(self, node: Node) -> Node | None:
        """The linear node or Add behind a chain of folded Relu/Clip."""
        producer = node.inputs[0].producer
        while producer in self.result.folded:
            producer = producer.inputs[0].producer
        return producer

    def _able_to(self, tensor: Tensor) -> bool:
        """Whether `tensor` can come out of integer nodes alone."""
        if tensor not in self._able:
            self._able[tensor] = False  # guards recursion; ONNX graphs have no cycles
            self._able[tensor] = self._derive(tensor)
        return self._able[tensor]

    def _derive(self, tensor: Tensor) -> bool:
        node = tensor.producer
        if node is None:  # an input can be quantised before it is moved or padded
            return tensor.elem_type == TensorProto.FLOAT
        if self.settings.excluded(node.name) or tensor.elem_type not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
            return False
        if node in self._linears:
            return True
        if clip_bounds(node) is not None:
            return self._able_to(node.inputs[0])
        if node.op == "Add":
            return all(not self._constant(t) and not _pooled(t) and self._able_to(t) for t in node.inputs)
        if node.op == "GlobalAveragePool":
            return pool_area(node) is not None and self._able_to(node.inputs[0])
        if shares_scale(node):
            joins = node.op == "Concat"
            return all(not self._constant(t) and not (joins and _pooled(t)) and self._able_to(t) for t in data_inputs(node))
        return False

    @staticmethod
    def _constant(tensor: Tensor) -> bool:
        return not isinstance(tensor, Value)

    def _want(self, tensor: Tensor) -> None:
        """Make `tensor` integer, and what it is made of where that is possible."""
        if tensor in self.result.quantised:
            return
        stack = [tensor]
        while stack:
            current = stack.pop()
            if current in self.result.quantised:
                continue
            able = self._able_to(current)
            self.result.quantised.add(current)
            node = current.producer
            if not able or node is None or node in self._linears:
                continue
            if node in self.result.folded:
                stack.extend(self._folded_sources(node))
                continue
            self.result.integer.add(node)
            if node.op == "Split":
                stack.extend(node.outputs)
            stack.extend(
                data_inputs(node)
                if shares_scale(node) or clip_bounds(node) is not None
                else node.inputs[:2]
                if node.op == "Add"
                else node.inputs[:1]
            )

    def _folded_sources(self, node: Node) -> Iterator[Tensor]:
        """Through folded Relu/Clip to an Add's operands; a linear node needs nothing more."""
        producer = self._base(node)
        if producer is not None and producer.op == "Add":
            self.result.integer.add(producer)
            yield from producer.inputs


def _pooled(tensor: Tensor) -> bool:
    """Whether a GlobalAveragePool computes it: its scale follows from the pool's input; no Add or Concat may ask for another."""
    node = tensor.producer
    while node is not None and (shares_scale(node) or clip_bounds(node) is not None):
        node = data_inputs(node)[0].producer
    return node is not None and node.op == "GlobalAveragePool"


def linear_refusal(node: Node, settings: Settings) -> str | None:
    """None where `node` becomes an integer kernel; "" where it is no weighted node; else the reason why it stays float."""
    if node.op not in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        return ""
    reason = settings.why_float(node.name)
    if reason is not None:
        return reason
    if node.op == "ConvTranspose":
        return "ConvTranspose has no integer kernel in onnxruntime"
    return weight_refusal(node)


def weight_refusal(node: Node) -> str | None:
    """None where Conv, Gemm or MatMul `node` has weights and a bias that can be stored as integers, one scale a channel."""
    weight = node.constant(1)
    if weight is None:
        return "product of two activations" if node.op == "MatMul" else "weights are computed at run time"
    if weight.elem_type != TensorProto.FLOAT:
        return "weights are not float32"
    if node.op == "MatMul":
        return "MatMul with weights of rank other than 2"
    if node.op == "Gemm" and (node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0 or node.attr("beta", 1.0) != 1.0):
        return "Gemm with transA, alpha or beta"
    if node.input(2) is not None and node.constant(2) is None:
        return "bias is computed at run time"
    if node.op == "Gemm" and not _one_a_channel(node.constant(2), weight.dims[0 if node.attr("transB", 0) else 1]):
        return "bias is not one number a channel"
    if not isinstance(node.inputs[0], Value):
        return "input is a constant"
    if node.op == "Conv" and not 3 <= len(weight.dims) <= 4:
        return "convolution over more than two dimensions"
    return None


def _one_a_channel(bias: Const | None, channels: int) -> bool:
    """Whether a Gemm's C is absent, one number, or a row; a column or a matrix adds another number to each row."""
    if bias is None:
        return True
    *rows, last = bias.dims or (1,)
    return last in (1, channels) and all(d == 1 for d in rows)


def shares_scale(node: Node) -> bool:
    """Whether `node` only moves data, so that input and output share one scale and it runs on integers as it is."""
    if node.domain not in ("", "ai.onnx") or node.op not in _SHARED:
        return False
    if node.op == "MaxPool":
        return len(node.outputs) == 1
    if node.op == "Pad":
        value = node.constant(2)
        zero = node.input(2) is None or (value is not None and not np.any(value.array()))
        return zero and node.attr("mode", "constant") in ("constant", "reflect", "edge") and node.constant(1) is not None
    if node.op == "Resize":
        cropped = node.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
        return not cropped and bool(node.attr("mode", "nearest") == "nearest")
    return True


def maker(tensor: Tensor) -> Node | None:
    """The node that computes what data movement carries to `tensor`; None for an input or a constant."""
    node = tensor.producer
    while node is not None and shares_scale(node):
        node = node.inputs[0].producer
    return node


def pool_area(node: Node) -> int | None:
    """Positions that a GlobalAveragePool averages, None where they are not static."""
    dims = node.inputs[0].dims
    if dims is None or len(dims) < 3:
        return None
    area = 1
    for dim in dims[2:]:
        if not isinstance(dim, int):
            return None
        area *= dim
    return area
