"""How many channels go, and which: units in chunks of the runtime's block, the cheapest loss for what it saves first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np

from qcompile.graph import Node
from qcompile.passes._prune_trace import Slot, Trace

_CHUNKS = 4  # that may go at once


@dataclass(frozen=True)
class Step:
    """One chunk of units (roots of atoms) that goes."""

    units: tuple[int, ...]


class Costs:
    """MACs or parameters of all weighted layers as units go: base * kept outputs / outputs * kept inputs / inputs.

    block: `saving` counts widths as the runtime does, in whole blocks.
    """

    def __init__(self, trace: Trace, base: Mapping[Node, float], block: int = 1) -> None:
        self.block = block
        self.base = list(base.values())
        index = {node: i for i, node in enumerate(base)}
        self.sizes = [[1, 1] for _ in self.base]
        self._uses: dict[int, Counter[tuple[int, int]]] = {}
        for slot in trace.of_role("out", "in", "through"):
            at, side = index[slot.node], int(slot.role == "in")
            self.sizes[at][side] = len(slot.ids)
            for root in trace.roots(slot.ids).tolist():
                self._uses.setdefault(root, Counter())[(at, side)] += 1
        self.kept = [list(pair) for pair in self.sizes]

    def saving(self, units: Sequence[int]) -> float:
        """What goes with `units`."""
        gone = self._gone(units)
        return sum(self._blocks(at, (0, 0)) - self._blocks(at, (gone[(at, 0)], gone[(at, 1)])) for at in {at for at, _ in gone})

    def remove(self, units: Sequence[int]) -> None:
        """Let them go."""
        for (at, side), count in self._gone(units).items():
            self.kept[at][side] -= count

    def _gone(self, units: Sequence[int]) -> Counter[tuple[int, int]]:
        found: Counter[tuple[int, int]] = Counter()
        for unit in units:
            found.update(self._uses.get(unit, {}))
        return found

    def _blocks(self, at: int, less: tuple[int, int]) -> float:
        """`_cost` with outputs in whole blocks."""
        rows, kept = self.sizes[at][0], self.kept[at][0] - less[0]
        whole = -(-kept // self.block) * self.block
        return self._cost(at, less) * min(whole, rows) / max(kept, 1)

    def _cost(self, at: int, less: tuple[int, int]) -> float:
        (rows, columns), (kept, read) = self.sizes[at], self.kept[at]
        return self.base[at] * (kept - less[0]) / rows * (read - less[1]) / columns


def groups_of(trace: Trace) -> list[tuple[list[int], int]]:
    """(units, channels a unit) of units that the same layers make, in graph order; frozen ones are left out.

    Units of different parts of a Split are different groups, so that each part keeps some.
    """
    makers: dict[int, list[int]] = {}
    width: Counter[tuple[int, int]] = Counter()
    for index, slot in enumerate(trace.of_role("out")):
        for root in trace.roots(slot.ids).tolist():
            if trace.frozen(root) is None:
                width[(root, index)] += 1
                if index not in makers.setdefault(root, []):
                    makers[root].append(index)
    parts: dict[int, list[int]] = {}
    for index, ids in enumerate(trace.parts):
        for root in np.unique(trace.roots(ids)).tolist():
            parts.setdefault(root, []).append(index)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for root, layers in makers.items():
        found.setdefault((tuple(layers), tuple(parts.get(root, ()))), []).append(root)
    return [(units, width[(units[0], layers[0])]) for (layers, _), units in found.items()]


class Judge(Protocol):
    """What units are worth, as others go."""

    def scores(self) -> Mapping[int, float]:
        """The cost of losing each unit that is left."""

    def remove(self, units: Sequence[int]) -> None:
        """These have gone."""


@dataclass
class Fixed:
    """Scores that do not depend on what has gone."""

    values: Mapping[int, float]

    def scores(self) -> Mapping[int, float]:
        """As given."""
        return self.values

    def remove(self, units: Sequence[int]) -> None:
        """Nothing changes."""


def order(groups: Sequence[tuple[list[int], int]], judge: Judge, costs: Costs, multiple: int) -> Iterator[Step]:
    """Chunks in the order in which they go, until each group is down to one chunk.

    `costs` and `judge` are used up, as far as steps are taken.
    """
    left = [list(units) for units, _ in groups]  # each chunk, or several at once where only they save a block
    sizes = [ceil(multiple / width) for _, width in groups]
    while True:
        scores = judge.scores()
        best, least = -1, float("inf")
        for index, units in enumerate(left):
            ranked = sorted(units, key=lambda unit: scores[unit])
            # The first chunk makes what is left a multiple; the last one stays.
            first = len(units) % sizes[index] or sizes[index]
            for chunk in range(first, len(units) - sizes[index] + 1, sizes[index])[:_CHUNKS]:
                loss = sum(scores[u] for u in ranked[:chunk]) / max(costs.saving(ranked[:chunk]), 1e-30)
                if loss < least:
                    best, least, chosen = index, loss, ranked[:chunk]
        if best < 0:
            return
        left[best] = [u for u in left[best] if u not in set(chosen)]
        costs.remove(chosen)
        judge.remove(chosen)
        yield Step(tuple(chosen))


def layer_slots(trace: Trace, role: str) -> dict[Node, Slot]:
    """The slot of that role of each weighted node."""
    return {slot.node: slot for slot in trace.of_role(role)}
