"""Calls of the rescaling kernels in a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import helper

from qcompile.dyadic import MAX_NUMERATOR, Array, as_dyadic
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.kernels.ratio import RatioRescale
from qcompile.kernels.rescale import DyadicRescale
from qcompile.passes._kernel_call import kernel_call


def common_shift(multiplier: Array) -> tuple[Array, int]:
    """`M = b / 2^c` of exactly dyadic multipliers with one c >= 1 for all: (b as int32 of M's shape, c).

    An M beyond 256 becomes 256, or the greatest below it: every accumulator but 0 saturates 8 bits either way.
    """
    b, c = as_dyadic(multiplier)
    shift = max(1, int(c.max(initial=1)))
    return np.minimum(b << (shift - c), min(1 << (shift + 8), MAX_NUMERATOR - 1)).astype(np.int32), shift  # b < 2^24: below 2^40


def dyadic_rescale(
    graph: Graph, x: Tensor, b: Array, c: int, zero: int, result: Value, elem_type: int, name: str, notes: Mapping[str, str]
) -> Node:
    """Append `result = DyadicRescale(x, b, c, zero)`; `b` must broadcast to `x`. notes: the node's metadata."""
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name
    kernel = DyadicRescale(tuple(b.reshape(-1).tolist()), (c,), zero, dtype, axis=-max(1, b.ndim))
    return kernel_call(graph, kernel, [x], result, name, notes)


def ratio_rescale(
    graph: Graph, x: Tensor, p: int, q: int, zero: int, result: Value, elem_type: int, name: str, notes: Mapping[str, str]
) -> Node:
    """Append `result = RatioRescale(x, p, q, zero)`. notes: the node's metadata."""
    kernel = RatioRescale(p, q, zero, np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name)
    return kernel_call(graph, kernel, [x], result, name, notes)
