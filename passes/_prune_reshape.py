"""Channels through Reshape and Flatten: [N, C, H, W] to [N, C H W], [N, L, h d] to [N, L, h, d] (heads) and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from qcompile.graph import Node
from qcompile.passes._prune_trace import Ids, Trace, own_constant

_WHY = "its channels are reshaped in a way that does not keep them apart"


def flatten(t: Trace, node: Node) -> None:
    """All axes from `axis` on become one."""
    label, dims = t.label(node.inputs[0]), node.inputs[0].dims
    if label is None:
        return
    axis = int(node.attr("axis", 1))
    tail = [d for d in (dims or ())[axis + 1 :] if isinstance(d, int)]
    if dims is None or axis < 0 or label.axis != axis or len(tail) != len(dims) - axis - 1:
        t.freeze(label.ids, _WHY)
        return
    t.mark(node.outputs[0], 1, np.repeat(label.ids, prod(tail)))


def reshape(t: Trace, node: Node) -> None:
    """What comes before the channels must stay; the channels are joined with what follows, split into heads, or left alone."""
    label, shape = t.label(node.inputs[0]), node.constant(1)
    old, new = node.inputs[0].dims, node.outputs[0].dims
    if label is None:
        t.freeze_inputs(node, _WHY)
        return
    found = None
    if shape is not None and old is not None and new is not None:
        found = _carried(t, label.ids, list(old), list(new), label.axis)
    if found is None:
        t.freeze_inputs(node, _WHY)
        return
    axis, ids = found
    t.mark(node.outputs[0], axis, ids)
    assert shape is not None
    wanted = [int(d) for d in shape.array()]

    def change(keep: npt.NDArray[np.bool_]) -> None:
        if wanted[axis] > 0:
            now = list(wanted)
            now[axis] = int(keep.sum())
            own_constant(t.graph, node, 1, np.asarray(now, np.int64))

    t.resize(ids, change)


def _carried(t: Trace, ids: Ids, old: Sequence[object], new: Sequence[object], axis: int) -> tuple[int, Ids] | None:
    """(axis, atoms) behind the Reshape."""
    if not _alike(old[:axis], new[:axis]):
        return None
    rest, after = old[axis:], new[axis:]
    if not all(isinstance(d, int) and d > 0 for d in [*rest, *after]) or rest[0] != len(ids):
        return None
    tail, sizes = prod(int(d) for d in rest[1:]), [int(d) for d in after]  # type: ignore[call-overload]
    if prod(sizes) != len(ids) * tail or not sizes:
        return None
    if sizes[0] == len(ids):
        return axis, ids
    if prod(sizes[1:]) == 1:
        return axis, np.repeat(ids, tail)
    if tail != 1 or len(sizes) < 2:
        return None
    heads = len(sizes) - 2  # (.., heads, width of a head)
    table = np.moveaxis(ids.reshape(sizes), heads, 0).reshape(sizes[heads], -1)
    t.unite(np.repeat(table[:, :1], table.shape[1] - 1, axis=1), table[:, 1:])
    return axis + heads, table[:, 0]


def _alike(old: Sequence[object], new: Sequence[object]) -> bool:
    """Whether the axes before the channels hold as many elements, as far as is known."""
    unknown = [sum(not isinstance(d, int) for d in dims) for dims in (old, new)]
    known = [prod(d for d in dims if isinstance(d, int)) for dims in (old, new)]
    return (unknown[0] == unknown[1] <= 1 and known[0] == known[1]) or list(old) == list(new)
