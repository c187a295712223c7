"""i-GELU of an 8-bit tensor by its levels: the published arithmetic once for each of 256 values, which elements then look up.

    x: Gemm -> Q -> DQ -> Gelu (-> Mul by a number a channel) -> Q
    levels [256, 1] -> IGelu -> [256, kinds] -> dyadic rescale, one multiplier a kind of channel -> table;   y = table[kind, x]

The integers are those of i-GELU of every element. All but the look-up depends on constants alone: a runtime that folds them does
it when it loads the model, and any other on 256 values instead of on every element.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto, helper

from qcompile.graph import Array, Graph, Node, Value
from qcompile.kernels._functions import gelu
from qcompile.kernels.channel_table import MOST_KINDS, ChannelTable
from qcompile.kernels.igelu import IGelu
from qcompile.kernels.table import Table
from qcompile.levelled import channel_factors
from qcompile.passes._integer_sums import plumb
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._wide import Narrow, Wide, Wides, in_domain

_TYPES: dict[int, type[np.uint8] | type[np.int8]] = {TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8}


def gelu_bound(kernel: IGelu) -> int:
    """The largest |integer| for inputs of 8 bits, whatever their zero point."""
    return int(np.abs(kernel.reference(np.arange(-255, 256, dtype=np.int32))).max())


def behind_factors(graph: Graph, node: Node) -> tuple[Node, Array, int] | None:
    """(Mul, its positive numbers, their axis), where `node` is read by it alone."""
    output = node.outputs[0]
    if len(output.consumers) != 1 or graph.is_pinned(output):
        return None
    found = channel_factors(graph, output.consumers[0])
    return None if found is None else (output.consumers[0], found[1], found[2])


def _int32(graph: Graph, base: str, dims: list[int]) -> Value:
    return Value(graph.fresh_name(base), helper.make_tensor_type_proto(TensorProto.INT32, dims))


def gelu_by_levels(wides: Wides, node: Node, kernel: IGelu, x: Narrow) -> bool:
    """Whether `node` became a look-up: its result, or that times a number a channel of the last axis, is read in 8 bits."""
    graph, last, factors, axis = wides.graph, node, np.ones(1), -1
    quantiser = wides.sole_quantiser(node.outputs[0])
    multiplied = behind_factors(graph, node) if quantiser is None else None
    if multiplied is not None:
        last, factors, axis = multiplied
        quantiser = wides.sole_quantiser(last.outputs[0])
    if quantiser is None or axis != -1 or len(np.unique(factors)) > MOST_KINDS:
        return False
    name, y, kind = node.outputs[0].name, wides.written(quantiser), _TYPES[x.elem_type]
    scales = (float(x.scale), x.zero_point, float(y.scale), y.zero_point)
    in_domain(lambda: Table(gelu, *scales, kind, _TYPES[y.elem_type]))  # refused before the graph is changed
    integers = np.arange(256, dtype=np.int32)[:, None] + np.iinfo(kind).min - x.zero_point
    levels = graph.constant(f"{name}_levels", integers.astype(np.int32))
    made = wides.value(f"{name}_gelu", levels)
    wide, steps = wides.numerators(Wide(made, kernel.output_scale, gelu_bound(kernel)), y, factors, name)
    kinds, kind_of = np.unique(steps, return_inverse=True)
    shape = graph.constant(f"{name}_shape", np.asarray([256, kinds.size], np.int64))
    columns = _int32(graph, f"{name}_columns", [256, kinds.size])
    rows = Value(graph.fresh_name(f"{name}_by_level"), helper.make_tensor_type_proto(y.elem_type, [256, kinds.size]))
    table = Value(graph.fresh_name(f"{name}_by_kind"), helper.make_tensor_type_proto(y.elem_type, [kinds.size, 256]))
    kernel_call(graph, kernel, [levels], made, name)
    plumb(graph, "Expand", [wide.integers, shape], columns)
    graph.remove(quantiser)
    wides.rescale(replace(wide, integers=columns), kinds, y, rows, name)
    plumb(graph, "Transpose", [rows], table, perm=[1, 0])
    numbers = tuple((1.0, 0.0, float(b)) for b in kinds / kinds.max())
    lookup = ChannelTable(gelu, *scales, numbers, tuple(int(k) for k in kind_of.reshape(-1)), -1, kind, _TYPES[y.elem_type])
    assert isinstance(y.integers, Value)
    kernel_call(graph, lookup, [x.integers], y.integers, name, computed={"table": table})
    return True
