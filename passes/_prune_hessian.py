"""Hessian-aware pruning (HAP, Yu et al. 2022): Trace(H_pp) / (2 p) |w_p|^2 for each unit of channels.

w_p are the p weights that make the unit, in all layers that write it; H the Hessian of KL(f || f(w)), which needs no labels. The
trace of its block is the mean of 2 KL(f || f(w + e v)) / e^2 over v of random signs on w_p and 0 elsewhere (Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompile.cut_layer import behind, read_by, values_of
from qcompile.divergence import Divergence, noise
from qcompile.graph import Array, Const, Graph, Value
from qcompile.passes._prune_trace import Trace
from qcompile.sessions import graph_session, segment_session

_SAMPLES = 16  # that a probe runs on: one unit costs a few passes of the model over them
_PROBES = 4
_STEP = 2.0**-4  # of the unit's root mean square: a unit is a small part of the model, and must move the outputs beyond rounding


def hessian(trace: Trace, graph: Graph, samples: Sequence[dict[str, Array]], seed: int) -> dict[int, float]:
    """By root, frozen ones left out. Models without classes are judged by noise / signal of their outputs."""
    feeds = samples[:: -(-len(samples) // _SAMPLES)]
    session = graph_session(graph, threads=1)
    divergence = Divergence.of([session.run({v.name: np.asarray(f[v.name]) for v in graph.inputs}) for f in feeds])
    rows: dict[int, list[tuple[str, int, Array]]] = {}  # weight, axis, places along it
    for slot in trace.of_role("out"):
        const = slot.node.inputs[slot.index]
        assert isinstance(const, Const)
        roots = trace.roots(slot.ids)
        for root in np.unique(roots).tolist():
            if trace.frozen(root) is None:
                rows.setdefault(root, []).append((const.name, slot.axis, np.flatnonzero(roots == root)))
    groups: dict[tuple[str, ...], list[int]] = {}
    for root, places in rows.items():
        groups.setdefault(tuple(dict.fromkeys(name for name, *_ in places)), []).append(root)
    found = {}
    for names, members in groups.items():
        model = _Movable(graph, names, feeds, divergence)
        found.update({root: model.score(rows[root], [seed, root]) for root in members})
    return found


class _Movable:
    """What follows the first layer of some whose weights `names` are inputs; what stands before it is computed once."""

    def __init__(self, graph: Graph, names: Sequence[str], feeds: Sequence[Mapping[str, Array]], divergence: Divergence) -> None:
        own = graph.copy()
        own.sort()
        self.weights = {name: own.constants[name].array() for name in names}
        moved = {name: Value(name) for name in names}
        for name, value in moved.items():
            own.replace_uses(own.constants[name], value)
        nodes = behind(own, list(moved.values()))
        made = {o for n in nodes for o in n.outputs}
        before = [t for t in read_by(nodes) if t not in made and t not in moved.values()]
        outputs = [t for t in own.outputs if isinstance(t, Value)]
        self.feeds = values_of(own, before, feeds)
        self.fixed = values_of(own, [t for t in outputs if t not in made], feeds)
        entries = [(v, self.feeds[0][v.name].dtype) for v in before]
        entries += [(v, self.weights[n].dtype) for n, v in moved.items()]
        self.session = segment_session(own, nodes, entries, [t for t in outputs if t in made], threads=1)
        self.clean = [self._run(i, self.weights) for i in range(len(feeds))]
        self.divergence = divergence

    def score(self, rows: Sequence[tuple[str, int, Array]], seed: Sequence[int]) -> float:
        """Trace(H_pp) / (2 p) |w_p|^2 of the places `rows`."""
        parts = [(name, axis, places, np.take(self.weights[name], places, axis)) for name, axis, places in rows]
        count = sum(part.size for *_, part in parts)
        energy = sum(float(np.square(part.astype(np.float64)).sum()) for *_, part in parts)
        if energy == 0:
            return 0.0
        step = _STEP * float(np.sqrt(energy / count))
        random = np.random.default_rng(seed)
        total = 0.0
        for _ in range(_PROBES):
            weights = dict(self.weights)
            for name, axis, places, part in parts:
                signs = np.where(random.integers(0, 2, part.shape, dtype=np.int8) == 1, step, -step)
                moved = weights[name].copy()
                moved[(slice(None),) * axis + (places,)] = part + signs
                weights[name] = moved.astype(part.dtype)
            total += 2 * self._distance(weights) / step**2
        return total / _PROBES / (2 * count) * energy

    def _run(self, index: int, weights: Mapping[str, Array]) -> dict[str, Array]:
        return {**self.fixed[index], **self.session.run({**self.feeds[index], **weights})}

    def _distance(self, weights: Mapping[str, Array]) -> float:
        value = scale = 0.0
        for index, clean in enumerate(self.clean):
            got = self._run(index, weights)
            pair = noise(clean, got) if self.divergence.classes is None else self.divergence.kl(clean, got)
            value, scale = value + pair[0], scale + pair[1]
        return value / max(scale, 1e-300)
