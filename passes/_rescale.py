"""Calls of rescaling kernels in a graph: model-local functions, which the file holds once each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto, helper

from qcompile.dyadic import MAX_NUMERATOR, Array, as_dyadic
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.kernels._protocol import DOMAIN, OPSET, Kernel
from qcompile.kernels.ratio import RatioRescale
from qcompile.kernels.rescale import DyadicRescale


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
    return call(graph, kernel, x, result, name, notes)


def ratio_rescale(
    graph: Graph, x: Tensor, p: int, q: int, zero: int, result: Value, elem_type: int, name: str, notes: Mapping[str, str]
) -> Node:
    """Append `result = RatioRescale(x, p, q, zero)`. notes: the node's metadata."""
    return call(
        graph, RatioRescale(p, q, zero, np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name), x, result, name, notes
    )


def call(graph: Graph, kernel: Kernel, x: Tensor, result: Value, name: str, notes: Mapping[str, str]) -> Node:
    """Append `result = kernel(x)`, the kernel's constants named after `name`. notes: the node's metadata."""
    declare(graph, kernel)
    constants = [graph.constant(f"{name}_{role}", value) for role, value in kernel.constants().items()]
    node = graph.node(kernel.name, [x, *constants], [result], domain=DOMAIN)
    node.attrs.update({key: helper.make_attribute(key, value) for key, value in kernel.attributes().items()})
    node.name = ""  # the metadata say whose rescale it is
    node.source = NodeProto()
    for key, value in notes.items():
        node.source.metadata_props.add(key=f"qcompile.{key}", value=value)
    return node


def declare(graph: Graph, kernel: Kernel) -> None:
    """Let the model hold the function of `kernel`; once however often it is called.

    It imports the model's own opset, 13 or later: the operators of rescales mean the same in all of them.
    """
    if any(f.name == kernel.name and f.domain == DOMAIN for f in graph.shell.functions):
        return
    body = kernel.lower()
    del body.opset_import[:]
    body.opset_import.append(helper.make_opsetid("", graph.opset() or OPSET))
    graph.shell.functions.append(body)
    graph.shell.ir_version = max(graph.shell.ir_version, 8)  # the first with local functions
