"""What the weighted layers of a file hold and cost: weights, zeros, N:M, multiply-accumulates and bit operations.

Read from the file alone, whatever its format: functions are written out, and a weight that is unpacked, decompressed or
transposed when the model is loaded is computed here as well. MACs are those of one run on given feeds. BOPS = MACs * weight bits
* activation bits * share of weights that are not zero (the count of HAWQ-V3, Yao et al. 2021, with zeros left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from qcompile.clipped_bits import clipped_bits
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.runtime import Feeds, Optimisation
from qcompile.sessions import graph_session, segment_session
from qcompile.sparsity import Pattern, Rule, follows
from qcompile.wiring import Wiring, bits

_INPUT = {
    "Conv": 1, "Gemm": 1, "MatMul": 1, "ConvInteger": 1, "MatMulInteger": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
_INTEGER = frozenset(["ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm"])
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")
_FLOAT_BITS = 32
_MULTIPLE = {8: 32, _FLOAT_BITS: 16}  # rows and columns as cuSPARSELt takes them: int8, and half precision for floats


@dataclass(frozen=True, eq=False)
class LayerCount:
    """One Conv, Gemm or MatMul (of any format) with constant weights.

    matrix: its weights [channels, K], integers less their zero point, input channels last within K. macs, bops: None without
    feeds.
    """

    node: str
    op: str
    matrix: Array
    depthwise: bool
    groups: int
    channels_in: int
    weight_bits: int
    activation_bits: int
    macs: int | None

    @property
    def weights(self) -> int:
        """How many weights."""
        return int(self.matrix.size)

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return int(self.matrix.size - np.count_nonzero(self.matrix))

    @property
    def bops(self) -> int | None:
        """Bit operations, products with zero weights left out."""
        if self.macs is None:
            return None
        return self.macs * self.weight_bits * self.activation_bits * (self.weights - self.zeros) // max(self.weights, 1)

    def follows(self, rule: Rule) -> bool:
        """Whether the weights follow `rule` along the input channels."""
        aligned = not isinstance(rule, Pattern) or self.channels_in % rule.block == 0
        return aligned and follows(self.matrix, rule)

    def sparse_refusal(self) -> str:
        """Why a runtime with 2:4 sparse tensor cores (cuSPARSELt, TensorRT) cannot use the layer; empty where it can."""
        if self.depthwise:
            return "depthwise"
        if not self.follows(Pattern(2, 4)):
            return "not 2:4 along the input channels"
        if self.groups != 1:
            return "grouped"
        multiple = _MULTIPLE.get(self.weight_bits, _MULTIPLE[8])
        rows, columns = self.matrix.shape
        if rows % multiple or columns % multiple:
            return f"{rows} x {columns} is not made of multiples of {multiple}"
        return ""

    def as_json(self) -> dict[str, Any]:
        """One entry of the report."""
        return {
            "node": self.node,
            "op": self.op,
            "weights": self.weights,
            "zeros": self.zeros,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "macs": self.macs,
            "bops": self.bops,
        }


def count_layers(model: str | Path, feeds: Feeds | None = None) -> list[LayerCount]:
    """The weighted layers of the file in graph order; `feeds`: inputs of one run, for MACs. Raises ModelError."""
    graph = Graph.load(model)
    graph.sort()
    layers = [n for n in graph.nodes if n.op in _INPUT and n.input(_INPUT[n.op]) is not None]
    known: dict[Tensor, tuple[Array, int] | None] = {}
    found = [(n, _weights(graph, n.inputs[_INPUT[n.op]], known)) for n in layers]
    weighted = [(n, w) for n, w in found if w is not None and w[0].ndim >= 2]
    sizes = output_sizes(graph, [n for n, _ in weighted], feeds) if feeds is not None else {}
    types = _Types(graph)
    return [_count(node, *weight, sizes.get(node), types) for node, weight in weighted]


def count_tables(model: str | Path) -> list[tuple[int, int]]:
    """(values, bits as stored) of every embedding table of the file: a matrix of integers whose rows Gather looks up."""
    graph = Graph.load(model)
    graph.sort()
    known: dict[Tensor, tuple[Array, int] | None] = {}
    tables = dict.fromkeys(n.inputs[0] for n in graph.nodes if n.op == "Gather" and n.attr("axis", 0) == 0)
    found = [_weights(graph, t, known) for t in tables]
    # Integers alone: a float table was not quantised; int64 matrices are indices and shapes.
    return [(int(t[0].size), t[1]) for t in found if t is not None and t[0].ndim == 2 and t[0].dtype.itemsize == 1]


def totals(layers: Sequence[LayerCount]) -> dict[str, int | None]:
    """{"parameters", "zeros", "macs", "bops"} of all layers together; parameters are weights, biases not counted."""
    macs, bops = [x.macs for x in layers], [x.bops for x in layers]
    return {
        "parameters": sum(x.weights for x in layers),
        "zeros": sum(x.zeros for x in layers),
        "macs": None if None in macs else sum(m or 0 for m in macs),
        "bops": None if None in bops else sum(b or 0 for b in bops),
    }


def share_that_follows(layers: Sequence[LayerCount], rule: Rule) -> float:
    """The share of all weights, depthwise ones aside, in layers that follow `rule`; 0 where there are none."""
    able = [x for x in layers if not x.depthwise]
    total = sum(x.weights for x in able)
    return sum(x.weights for x in able if x.follows(rule)) / total if total else 0.0


@dataclass
class _Types:
    """Element types of computed tensors, inferred when first asked for."""

    graph: Graph

    @cached_property
    def wiring(self) -> Wiring:
        return Wiring.of(self.graph.to_proto())

    def is_wide(self, dequantise: Node) -> bool:
        """Whether it turns 32-bit integers into floats, which holds more than 8 bits. (Those have no zero point.)"""
        return dequantise.input(2) is None and self.wiring.elem_type(dequantise.inputs[0].name) == TensorProto.INT32


def _count(node: Node, weight: Array, width: int, outputs: int | None, types: _Types) -> LayerCount:
    groups, depthwise = 1, False
    if node.op in _CONVOLUTIONS:
        matrix = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
        groups = int(node.attr("group", 1))
        depthwise = groups > 1 and weight.shape[1] == 1
        channels = int(weight.shape[1])
    else:
        matrix = weight if node.attr("transB", 0) else np.swapaxes(weight, -1, -2)
        channels = int(matrix.shape[-1])
        matrix = matrix.reshape(-1, channels)
    zero = node.constant(_INPUT[node.op] + 2) if node.op in _INTEGER else None
    if zero is not None and zero.array().any():  # one number, or one a channel, which batches of matrices repeat
        matrix = matrix.astype(np.int16) - np.resize(zero.array().astype(np.int16), len(matrix))[:, None]
    macs = None if outputs is None else outputs * int(matrix.shape[1])
    source = node.inputs[0].producer
    dequantised = source is not None and source.op == "DequantizeLinear" and width < _FLOAT_BITS
    activations = _FLOAT_BITS
    if node.op in _INTEGER or (source is not None and dequantised and not types.is_wide(source)):
        integers = source.inputs[0] if source is not None and dequantised else node.inputs[0]
        activations = clipped_bits(integers)
    return LayerCount(node.label, node.op, matrix, depthwise, groups, channels, width, activations, macs)


def _weights(graph: Graph, tensor: Tensor, known: dict[Tensor, tuple[Array, int] | None]) -> tuple[Array, int] | None:
    """(values, bits as stored) of a constant tensor, DequantizeLinear looked through; None where it is computed from inputs."""
    if tensor not in known:
        known[tensor] = _evaluate(graph, tensor, known)
    return known[tensor]


def _evaluate(graph: Graph, tensor: Tensor, known: dict[Tensor, tuple[Array, int] | None]) -> tuple[Array, int] | None:
    if isinstance(tensor, Const):
        return (tensor.array(), _bits(tensor)) if tensor.elem_type != TensorProto.STRING else None
    node = tensor.producer
    if node is None:
        return None
    if node.op == "DequantizeLinear":
        integers = _weights(graph, node.inputs[0], known)
        return None if integers is None else _about_zero(node, *integers)
    nodes, leaves = _makers(graph, tensor)
    if nodes is None:
        return None
    value = segment_session(graph, nodes, [], [tensor]).run({})[tensor.name]
    return value, min((_bits(c) for c in leaves if _is_data(c)), default=_planes(leaves, value.size))


def _planes(leaves: Sequence[Const], size: int) -> int:
    """How many bits each of `size` weights has where they lie in planes of single bits (`qcompile.bit_planes`), else those of a
    float."""
    planes = [c.dims for c in leaves if c.elem_type == TensorProto.UINT8 and len(c.dims) == 2]
    return planes[0][0] if len(planes) == 1 and planes[0][1] == -(-size // 8) else _FLOAT_BITS


def _about_zero(node: Node, values: Array, width: int) -> tuple[Array, int] | None:
    """What DequantizeLinear `node` multiplies by its scale; None for zero points of blocks."""
    const = node.constant(2)
    zero = None if const is None else np.asarray(const.array())
    if zero is None or not zero.any():
        return values, width
    if zero.size != 1 and zero.ndim != 1:
        return None
    axis = int(node.attr("axis", 1)) % values.ndim
    shape = [-1 if a == axis and zero.size != 1 else 1 for a in range(values.ndim)]
    return values.astype(np.int16) - zero.astype(np.int16).reshape(shape), width


def _makers(graph: Graph, tensor: Value) -> tuple[list[Node] | None, list[Const]]:
    """The nodes that compute `tensor` from constants alone, in order, and those constants; None where an input takes part."""
    nodes: set[Node] = set()
    leaves: dict[Const, None] = {}
    stack: list[Tensor] = [tensor]
    while stack:
        current = stack.pop()
        if isinstance(current, Const):
            leaves[current] = None
        elif current.name and (current.producer is None or current.producer.bodies):
            return None, []
        elif current.producer is not None and current.producer not in nodes:
            nodes.add(current.producer)
            stack.extend(current.producer.inputs)
    return [n for n in graph.nodes if n in nodes], list(leaves)


def _is_data(const: Const) -> bool:
    return const.elem_type in (TensorProto.INT4, TensorProto.INT8, TensorProto.FLOAT) and len(const.dims) >= 2


def _bits(const: Const) -> int:
    return bits(const.elem_type)


def output_sizes(graph: Graph, nodes: Sequence[Node], feeds: Feeds) -> dict[Node, int]:
    """Elements of the output of each of `nodes` in one run of `graph` on `feeds`."""
    names = {n: n.outputs[0].name for n in nodes}
    watched = graph.copy()
    present = {o.name for o in watched.outputs}
    values = {v.name: v for v in watched.values()}
    watched.outputs += [values[name] for name in dict.fromkeys(names.values()) if name not in present]
    ran = graph_session(watched, optimisation=Optimisation.OFF, fuse_qdq=False).run(feeds)
    return {node: int(ran[name].size) for node, name in names.items()}
