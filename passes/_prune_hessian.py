"""Hessian-aware pruning (HAP, Yu et al. 2022): Trace(H_pp) / (2 p) |w_p|^2 for each unit of channels.

w_p are the p weights that make the unit, in all layers that write it; H the Hessian of KL(f || f(w)), which needs no labels. The
trace of its block is the mean of 2 KL(f || f(w + e v)) / e^2 over v of random signs on w_p and 0 elsewhere (Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompile.divergence import Divergence, noise
from qcompile.graph import Array, Const, Graph, Value
from qcompile.passes._prune_trace import Trace
from qcompile.sessions import segment_session

_SAMPLES = 16  # that a probe runs on: one unit costs a few passes of the model over them
_PROBES = 4
_STEP = 2.0**-4  # of the unit's root mean square: a unit is a small part of the model, and must move the outputs beyond rounding


def hessian(trace: Trace, graph: Graph, samples: Sequence[dict[str, Array]], seed: int) -> dict[int, float]:
    """By root. Models without classes are judged by noise / signal of their outputs."""
    model = _Movable(graph, trace, samples[:: -(-len(samples) // _SAMPLES)])
    return {root: model.score(root, seed) for root in sorted(model.rows)}


class _Movable:
    """The model with the weights that make channels as inputs, and which rows of them belong to which root."""

    def __init__(self, graph: Graph, trace: Trace, feeds: Sequence[Mapping[str, Array]]) -> None:
        self.rows: dict[int, list[tuple[str, int, Array]]] = {}  # weight, axis, places along it
        self.weights: dict[str, Array] = {}
        for slot in trace.of_role("out"):
            const = slot.node.inputs[slot.index]
            assert isinstance(const, Const)
            self.weights[const.name] = const.array()
            roots = trace.roots(slot.ids)
            for root in np.unique(roots).tolist():
                self.rows.setdefault(root, []).append((const.name, slot.axis, np.flatnonzero(roots == root)))
        own = graph.copy()
        own.sort()
        moved = {name: Value(name) for name in self.weights}
        for name, value in moved.items():
            own.replace_uses(own.constants[name], value)
        outputs = [t for t in own.outputs if isinstance(t, Value) and t.producer is not None]
        entries = [(v, np.asarray(feeds[0][v.name]).dtype) for v in own.inputs]
        entries += [(v, self.weights[n].dtype) for n, v in moved.items()]
        self.session = segment_session(own, own.nodes, entries, outputs, threads=1)
        self.feeds = [{v.name: np.asarray(f[v.name]) for v in own.inputs} for f in feeds]
        self.clean = [self.session.run({**f, **self.weights}) for f in self.feeds]
        self.divergence = Divergence.of(self.clean)

    def score(self, root: int, seed: int) -> float:
        """Trace(H_pp) / (2 p) |w_p|^2."""
        parts = [(name, axis, places, np.take(self.weights[name], places, axis)) for name, axis, places in self.rows[root]]
        count = sum(part.size for *_, part in parts)
        energy = sum(float(np.square(part.astype(np.float64)).sum()) for *_, part in parts)
        if energy == 0:
            return 0.0
        step = _STEP * float(np.sqrt(energy / count))
        random = np.random.default_rng([seed, root])
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

    def _distance(self, weights: Mapping[str, Array]) -> float:
        value = scale = 0.0
        for feed, clean in zip(self.feeds, self.clean, strict=True):
            got = self.session.run({**feed, **weights})
            pair = noise(clean, got) if self.divergence.classes is None else self.divergence.kl(clean, got)
            value, scale = value + pair[0], scale + pair[1]
        return value / max(scale, 1e-300)
