"""What a model says about its own inputs, for data that have to be made up.

Floats: the first BatchNormalization holds mean and variance of what it reads. Right at the input these are the input's; behind a
first convolution  y = W x  they give the input's mean by least squares,  sum_k W[c, i, k] m[i] = E[y_c],  and its deviation from
the gain that  var y_c  shows over the variance that synthetic inputs of deviation 1 lead to.
Integers: an index into a constant table (Gather) is at least 0 and less than the table has rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import TensorProto

from qcompile.graph import Array, Graph, Node, Tensor, Value
from qcompile.runtime import Feeds
from qcompile.sessions import segment_session
from qcompile.synthetic import InputMoments, limited

_MOVES = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Slice", "Dropout")
_LEAST_CHANNELS = 2  # channels that must agree on the deviation


def vocabularies(graph: Graph) -> dict[str, int]:
    """Number of rows of the smallest constant table that each integer input indexes; inputs that index none are left out."""
    found = {}
    for value in graph.inputs:
        if value.elem_type in (TensorProto.INT64, TensorProto.INT32):
            tables = [(n.constant(0), n.attr("axis", 0)) for n in _gathers(value)]
            rows = [table.dims[axis] for table, axis in tables if table is not None]
            if rows:
                found[value.name] = min(rows)
    return found


def _gathers(tensor: Tensor) -> Iterator[Node]:
    """Gather nodes whose indices are `tensor`, moved or cast at most."""
    stack, seen = [tensor], {tensor}
    while stack:
        current = stack.pop()
        for node in current.consumers:
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op == "Gather" and node.inputs[1] is current:
                yield node
            elif node.op in _MOVES and node.inputs[0] is current:
                fresh = [o for o in node.outputs if o not in seen]
                seen.update(fresh)
                stack.extend(fresh)


def input_moments(graph: Graph, unit: Sequence[Feeds]) -> dict[str, InputMoments]:
    """Mean by channel and deviation of float inputs that a BatchNormalization tells, by name.

    unit: a few made-up samples of deviation 1. Inputs that no BatchNormalization reads, directly or behind one Conv with
    constant weights and a single group, are left out.
    """
    found = {}
    for value in graph.inputs:
        for reader in value.consumers:
            moments = _moments(value, reader, unit)
            if moments is not None:
                found[value.name] = moments
                break
    return found


def _moments(value: Value, reader: Node, unit: Sequence[Feeds]) -> InputMoments | None:
    if reader.inputs[0] is not value:
        return None
    if reader.op == "BatchNormalization":
        return _finite(_running(reader), None)
    weight = reader.constant(1)
    if reader.op != "Conv" or weight is None or weight.elem_type != TensorProto.FLOAT or reader.attr("group", 1) != 1:
        return None
    running = next((_running(n) for n in reader.outputs[0].consumers if n.op == "BatchNormalization"), None)
    bias = reader.constant(2)
    if running is None or (bias is None and reader.input(2) is not None):
        return None
    mean, variance = running
    if bias is not None:
        mean = mean - bias.array()
    values = weight.array().astype(np.float64)
    at_input = np.linalg.lstsq(values.sum(axis=tuple(range(2, values.ndim))), mean, rcond=None)[0]
    return _finite((at_input, variance), _unit_variance(reader, value.name, unit))


def _finite(found: tuple[Array, Array] | None, unit_variance: Array | None) -> InputMoments | None:
    """The moments where all is well defined: the deviation is the median over channels, which dead ones cannot move."""
    if found is None:
        return None
    mean, variance = found
    if unit_variance is None:
        unit_variance = np.ones_like(variance)
    alive = (variance > 0) & (unit_variance > 0)
    if alive.sum() < min(_LEAST_CHANNELS, len(variance)):
        return None
    deviation = float(np.sqrt(np.median(variance[alive] / unit_variance[alive])))
    return InputMoments(mean, deviation) if np.isfinite(mean).all() and 0 < deviation < np.inf else None


def _running(node: Node) -> tuple[Array, Array] | None:
    mean, variance = node.constant(3), node.constant(4)
    if mean is None or variance is None or node.attr("training_mode", 0):
        return None
    return mean.array().astype(np.float64), variance.array().astype(np.float64)


def _unit_variance(conv: Node, name: str, unit: Sequence[Feeds]) -> Array:
    """Variance of each output channel of `conv` (its bias changes nothing), around the mean over all samples."""
    source, result = Value("x"), Value("y")
    copy = Node("Conv", "first", [source, *conv.inputs[1:2]], [result], attrs=dict(conv.attrs))
    try:
        session = segment_session(None, [copy], [(source, np.dtype(np.float32))], [result])
    finally:
        copy.inputs.clear()  # the weight must not remember this copy as a consumer
    total, squares, count = np.zeros(1), np.zeros(1), 0
    for feed in unit:
        y = session.run({"x": limited(np.asarray(feed[name], np.float32))})["y"].astype(np.float64)
        axes = (0, *range(2, y.ndim))
        total, squares, count = total + y.sum(axis=axes), squares + np.square(y).sum(axis=axes), count + y.size // y.shape[1]
    return np.asarray(squares / max(count, 1) - np.square(total / max(count, 1)))
