"""2:4 weights stored as the two of every four that stay, with 2-bit indices; onnxruntime folds them back when it loads the model.

    w int8 [O, I, kh, kw]    ->    Sparse24(values [blocks, 2], indices [blocks / 2]) = w

`Sparse24` is a model-local function of standard operators on constants, so the same kernel then runs on the same integers: same
bits, same latency, .625 of the bytes (4 bits: 3 bits a weight). The blocks lie along the input channels, as `sparsify` made them.

It must not fire for `--sparse-storage dense`, for `--target tensorrt`, whose builder wants to see plain weights, nor on a weight
that two nodes read in unlike ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from qcompile.block_packing import int4_tensor
from qcompile.context import Context
from qcompile.graph import Array, Const, Graph, Node, Value
from qcompile.kernels._protocol import DOMAIN
from qcompile.passes._kernel_call import declare_storage
from qcompile.rewrite import Exact, Promise, Report
from qcompile.sparse_storage import compress
from qcompile.sparsity import Pattern, parse_sparsity

_MEANING = "The dense weight of two values in every four along the last axis of `shape`, their places 2 bits each."
FUNCTION = "Sparse24"
_BODY = """
<domain: "qcompile", opset_import: ["" : 21]>
Sparse24 <to, shape, perm> (values, indices) => (y)
{
  four = Constant <value = int32 {4}> ()
  sixteen = Constant <value = int32 {16}> ()
  one = Constant <value = int64[1] {1}> ()
  blocks = Constant <value = int64[2] {-1, 1}> ()
  kept = Cast <to: int = @to> (values)
  bytes = Cast <to = 6> (indices)
  second_code = Div (bytes, sixteen)
  above = Mul (second_code, sixteen)
  first_code = Sub (bytes, above)
  first_column = Unsqueeze (first_code, one)
  second_column = Unsqueeze (second_code, one)
  pairs = Concat <axis = 1> (first_column, second_column)
  codes = Reshape (pairs, blocks)
  second_place = Div (codes, four)
  base = Mul (second_place, four)
  first_place = Sub (codes, base)
  places = Concat <axis = 1> (first_place, second_place)
  none = Sub (kept, kept)
  empty = Concat <axis = 1> (none, none)
  dense = ScatterElements <axis = 1> (empty, places, kept)
  size = Constant <value_ints: ints = @shape> ()
  matrix = Reshape (dense, size)
  y = Transpose <perm: ints = @perm> (matrix)
}
"""
_WEIGHT_INPUT = {
    "Conv": 1, "Gemm": 1, "MatMul": 1, "ConvInteger": 1, "MatMulInteger": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


@dataclass(frozen=True)
class CompressSparse:
    """Compressed storage of 2:4 weights."""

    name: str = "compress_sparse"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a weight tensor."""
        report = Report()
        settings = context.settings
        if context.sparse is None or settings.sparsity is None or not isinstance(parse_sparsity(settings.sparsity), Pattern):
            return report
        if settings.sparse_storage == "dense":
            return report
        narrow = _narrow(context)
        kinds = (TensorProto.INT8, TensorProto.FLOAT)
        for const in [c for c in graph.constants.values() if c.elem_type in kinds and len(c.dims) >= 2]:
            order = _order(graph, const)
            if order is None:
                continue
            if settings.target == "tensorrt":
                report.refuse(const.name, "TensorRT's builder finds 2:4 in plain weights alone")
                continue
            if _compress(graph, const, order, narrow=const.name in narrow):
                report.rewrites += 1
        if report.rewrites:
            graph.cleanup()
            graph.sort()
        return report


def _narrow(context: Context) -> set[str]:
    """Names of weights of at most 4 bits."""
    if context.plan is None:
        return set()
    sites = [s for s in context.plan.linears if context.settings.bits_for(s.node.name) <= 4]
    return {s.stored.name for s in sites if s.stored is not None}


def _order(graph: Graph, const: Const) -> tuple[int, ...] | None:
    """The axes of `const` that bring its input channels last, for all nodes that multiply by it; None where they differ."""
    if graph.is_pinned(const):
        return None
    readers: list[tuple[Node, Const | Value]] = []
    for node in const.consumers:
        if node.op == "DequantizeLinear" and node.inputs[0] is const:
            readers += [(reader, node.outputs[0]) for reader in node.outputs[0].consumers]
        else:
            readers.append((node, const))
    orders = {_order_at(node, tensor, len(const.dims)) for node, tensor in readers}
    return orders.pop() if len(orders) == 1 else None


def _order_at(node: Node, tensor: Const | Value, rank: int) -> tuple[int, ...] | None:
    place = _WEIGHT_INPUT.get(node.op)
    if place is None or node.input(place) is not tensor or sum(t is tensor for t in node.inputs) != 1:
        return None
    if node.op in _CONVOLUTIONS:
        return (0, *range(2, rank), 1)
    if rank != 2:
        return None
    return (0, 1) if node.attr("transB", 0) else (1, 0)


def _compress(graph: Graph, const: Const, order: tuple[int, ...], *, narrow: bool) -> bool:
    matrix = np.ascontiguousarray(np.transpose(const.array(), order))
    stored = compress(matrix)
    if stored is None:
        return False
    declare_storage(graph, FUNCTION, _BODY, _MEANING)
    values: Array | TensorProto = stored.values
    if narrow and np.abs(stored.values.astype(np.int64)).max(initial=0) <= 7:
        values = int4_tensor(stored.values, signed=True)
    name, dense = const.name, Value(graph.fresh_name(const.name + "_dense"))
    inputs = [graph.constant(name + "_values", values), graph.constant(name + "_indices", stored.indices)]
    graph.replace_uses(const, dense)
    back = [order.index(axis) for axis in range(len(order))]
    graph.node(FUNCTION, inputs, [dense], domain=DOMAIN, to=const.elem_type, shape=list(matrix.shape), perm=back)
    return True
