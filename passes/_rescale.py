"""Calls of the rescaling kernels in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from onnx import helper

from qcompile.dyadic import MAX_NUMERATOR, Array, as_dyadic
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.kernels.ratio import RatioRescale
from qcompile.kernels.rescale import MOST_BIAS, DyadicRescale
from qcompile.passes._integer_sums import int32_value, plumb
from qcompile.passes._kernel_call import kernel_call


def common_shift(multiplier: Array) -> tuple[Array, int]:
    """`M = b / 2^c` of exactly dyadic multipliers with one c >= 1 for all: (b as int32 of M's shape, c).

    An M beyond 256 becomes 256, or the greatest below it: every accumulator but 0 saturates 8 bits either way.
    """
    b, c = as_dyadic(multiplier)
    shift = max(1, int(c.max(initial=1)))
    return np.minimum(b << (shift - c), min(1 << (shift + 8), MAX_NUMERATOR - 1)).astype(np.int32), shift  # b < 2^24: below 2^40


def dyadic_rescale(
    graph: Graph,
    x: Tensor,
    b: Array,
    c: int,
    zero: int,
    result: Value,
    elem_type: int,
    name: str,
    notes: Mapping[str, str],
    bias: Array | None = None,
) -> Node:
    """Append `result = DyadicRescale(x + bias, b, c, zero)`; `b` and `bias` (int32) must broadcast to `x`. notes: metadata.

    The bias goes into the kernel where that takes it; else it is added before.
    """
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name
    if bias is not None:
        b = np.broadcast_to(b, np.broadcast_shapes(b.shape, bias.shape))
    kernel = DyadicRescale(tuple(b.reshape(-1).tolist()), (c,), zero, dtype, axis=-max(1, b.ndim))
    if bias is None or not bias.any():
        return kernel_call(graph, kernel, [x], result, name, notes)
    if kernel.takes_bias and int(np.abs(bias.astype(np.int64)).max()) <= MOST_BIAS:
        kernel = replace(kernel, bias=tuple(np.broadcast_to(bias, b.shape).reshape(-1).tolist()))
        return kernel_call(graph, kernel, [x], result, name, notes)
    total = int32_value(graph, result.name + "_sum", x)
    plumb(graph, "Add", [x, graph.constant(f"{result.name}_bias", bias.astype(np.int32))], total)
    return kernel_call(graph, kernel, [total], result, name, notes)


def ratio_rescale(
    graph: Graph, x: Tensor, p: int, q: int, zero: int, result: Value, elem_type: int, name: str, notes: Mapping[str, str]
) -> Node:
    """Append `result = RatioRescale(x, p, q, zero)`. notes: the node's metadata."""
    kernel = RatioRescale(p, q, zero, np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name)
    return kernel_call(graph, kernel, [x], result, name, notes)
