"""Which channels stand or fall together: atoms of channels, followed from the layer that makes them to all that read them.

Every output channel of a Conv, Gemm or MatMul is an atom. A tensor's label says along which axis its channels lie and which atom
each is; rules (`_prune_rules`) carry labels through operators. Where two channels are added, multiplied or belong to one head
their atoms are united. Where a rule does not know what to do with a channel its atom is frozen, with the reason: it is never
removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.graph import Const, Graph, Node, Tensor, Value

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Label:
    """The atoms of a tensor's channels, along `axis` (not negative)."""

    axis: int
    ids: Ids


@dataclass(frozen=True)
class Slot:
    """Input `index` of `node` is a constant whose `axis` runs over channels `ids`.

    role: out (a weight's rows that make channels), in (its columns that read them), through (depthwise), other (biases, factors).
    """

    node: Node
    index: int
    axis: int
    ids: Ids
    role: str


@dataclass(frozen=True)
class Cut:
    """What is done to units (roots of atoms): `gone` go; `implants` are moved behind the others of their group of `groups`."""

    gone: frozenset[int]
    implants: frozenset[int] = frozenset()
    groups: tuple[frozenset[int], ...] = ()


@dataclass
class Trace:
    """All atoms and labels of a graph."""

    graph: Graph
    labels: dict[Tensor, Label] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    parts: list[Ids] = field(default_factory=list)  # channels that a Split makes a tensor of their own: none may become empty
    resizes: list[tuple[Ids, Callable[[npt.NDArray[np.bool_]], None]]] = field(default_factory=list)
    _parent: list[int] = field(default_factory=list)
    _frozen: dict[int, str] = field(default_factory=dict)

    # ---- atoms ----
    def fresh(self, count: int) -> Ids:
        """New atoms."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def root(self, atom: int) -> int:
        """What stands for all atoms united with `atom`."""
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, ids: Ids) -> Ids:
        """`root` of each."""
        return np.array([self.root(int(a)) for a in ids.reshape(-1)], np.int64).reshape(ids.shape)

    def unite(self, a: Ids, b: Ids) -> None:
        """Element by element; the older atom stands for both."""
        for left, right in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True):
            first, second = sorted((self.root(left), self.root(right)))
            if first != second:
                self._parent[second] = first
                reason = self._frozen.get(first) or self._frozen.get(second)
                if reason is not None:
                    self._frozen[first] = reason

    def freeze(self, ids: Ids, reason: str) -> None:
        """Keep these for ever."""
        for atom in ids.reshape(-1).tolist():
            self._frozen.setdefault(self.root(atom), reason)

    def frozen(self, root: int) -> str | None:
        """Why the atoms of `root` are kept; None where they may go."""
        return self._frozen.get(root)

    # ---- tensors ----
    def label(self, tensor: Tensor | None) -> Label | None:
        """The label of `tensor`, if it has one."""
        return None if tensor is None else self.labels.get(tensor)

    def mark(self, tensor: Value, axis: int, ids: Ids) -> None:
        """Label `tensor`."""
        self.labels[tensor] = Label(axis, ids)

    def freeze_inputs(self, node: Node, reason: str) -> None:
        """Keep all channels that `node` reads."""
        for tensor in [*node.inputs, *node.captured]:
            found = self.label(tensor)
            if found is not None:
                self.freeze(found.ids, reason)

    def slot(self, node: Node, index: int, axis: int, ids: Ids, role: str) -> None:
        """Remember that a constant runs over channels."""
        self.slots.append(Slot(node, index, axis, ids, role))

    def resize(self, ids: Ids, change: Callable[[npt.NDArray[np.bool_]], None]) -> None:
        """Call `change` with which of `ids` stay, once that is decided and where any goes."""
        self.resizes.append((ids, change))

    def of_role(self, *roles: str) -> Iterable[Slot]:
        """The slots of these roles, in graph order."""
        return (s for s in self.slots if s.role in roles)

    # ---- the end ----
    def cut(self, cut: Cut) -> None:
        """Take what is gone out of every constant and attribute, and move what is moved."""
        for slot in self.slots:
            places = self.places(slot.ids, cut)
            if not np.array_equal(places, np.arange(len(slot.ids))):
                const = slot.node.constant(slot.index)
                assert const is not None
                values = np.take(const.array(), places, axis=slot.axis)
                slot.node.inputs[slot.index] = self.graph.constant(const.name, values)
        for ids, change in self.resizes:
            keep = ~self._among(ids, cut.gone)
            if not keep.all():
                change(keep)
        forget(self.graph)
        self.graph.cleanup()
        self.graph.infer_shapes()

    def places(self, ids: Ids, cut: Cut) -> Ids:
        """Where in `ids` the channels stand that are left, in their new order."""
        places = np.flatnonzero(~self._among(ids, cut.gone))
        for group in cut.groups:
            own = np.flatnonzero(self._among(ids[places], group))
            last = self._among(ids[places[own]], cut.implants)
            places[own] = places[own[np.argsort(last, kind="stable")]]
        return places

    def _among(self, ids: Ids, units: Collection[int]) -> npt.NDArray[np.bool_]:
        return np.isin(self.roots(ids), np.fromiter(units, np.int64, len(units)))


def forget(graph: Graph) -> None:
    """Drop inner tensors' types: their sizes have changed."""
    ends = {v.name for v in [*graph.inputs, *graph.outputs]}
    for value in graph.values():
        if value.name not in ends:
            value.type = value.info = None


def own_constant(graph: Graph, node: Node, index: int, values: Any) -> None:
    """Give `node` its own constant at input `index`."""
    node.inputs[index] = graph.constant(node.inputs[index].name, np.asarray(values))


def is_shared(const: Const) -> bool:
    """Whether more than one node, or one node twice, reads it."""
    return len(const.outputs) != 1
