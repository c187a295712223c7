"""The work that is done for each layer by itself: curvature probes, and what the layer costs at each width. Pure functions.

A task gets the `Study` (model, samples, layers), a layer and what to do, and returns numbers; it draws what is random from a seed
of (study, layer, probe) and sums in a fixed order with one thread, so that its result is the same in whatever process it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import is_not
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from qcompile.context import FLOAT_BITS
from qcompile.cut_layer import CutLayer, LayerSpec
from qcompile.divergence import Divergence, noise
from qcompile.graph import Array, Graph, Value
from qcompile.sessions import graph_session
from qcompile.source_groups import SourceGroup
from qcompile.widths import narrow_layer, narrow_source

_LARGEST_STEP = 2.0**-5  # of the weights' root mean square
_SMALLEST_STEP = 2.0**-10
_STEP_PROBES = 4
_PROBED = 64  # samples at most that a probe runs on
_STEP_TOLERANCE = 0.05
_STEP = ("scale", "low", "high")
_ROUNDED = "qcompile_rounded_"  # inputs that say how


@dataclass
class Study:
    """What all tasks share; sent once to each process. model: the float model, serialised. labels: a sample's, or None."""

    model: bytes
    feeds: list[dict[str, Array]]
    labels: list[int | Array | None]
    layers: list[LayerSpec]
    loss: str = "kl"
    seed: int = 0
    candidates: int = 4
    groups: list[SourceGroup] = field(default_factory=list)
    _state: dict[int, _Layer] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "feeds", "labels", "layers", "loss", "seed", "candidates", "groups")
        return {**{name: getattr(self, name) for name in kept}, "_state": {}}

    @cached_property
    def graph(self) -> Graph:
        """The float model."""
        graph = Graph.from_proto(ModelProto.FromString(self.model))
        graph.sort()
        return graph

    @cached_property
    def divergence(self) -> Divergence:
        """How outputs are compared."""
        session = graph_session(self.graph, threads=1)
        return Divergence.of([session.run(feed) for feed in self.feeds])

    def layer(self, index: int) -> _Layer:
        """Layer `index` brought up to its input; the last one asked for is kept."""
        if index not in self._state:
            self._state = {index: _Layer(self, self.layers[index])}
        return self._state[index]


class _Layer:
    """One layer, and the model's outputs with its weights as they are."""

    def __init__(self, study: Study, spec: LayerSpec) -> None:
        self.study = study
        self.cut = CutLayer(study.graph, spec, study.feeds)
        # By the session that the perturbed outputs come from: another one may differ by rounding.
        self.clean = [self.cut.run(index) for index in range(len(study.feeds))]
        weight = self.cut.weight.astype(np.float64)
        # Rounding that is learned from a few rows (behind a global pool each sample is one) fits them better than any others.
        self.learnt_on = range(0, len(study.feeds), 2)
        self.held_out = range(1 if len(study.feeds) > 1 else 0, len(study.feeds), 2)
        self.probed = range(0, len(study.feeds), -(-len(study.feeds) // _PROBED))
        self.size = float(np.sqrt(np.square(weight).mean())) if weight.any() else 1.0

    def distance(self, samples: Sequence[int] | None = None, **moved: Any) -> tuple[float, float]:
        """(KL in nats a row, noise / signal) of the outputs with `moved` (weight, bias or source by sample) in place.

        samples: on these alone.
        """
        divergence, source = self.study.divergence, moved.pop("source", None)
        kl = energy = signal = 0.0
        rows = 0
        for index, clean in enumerate(self.clean):
            if samples is not None and index not in samples:
                continue
            got = self.cut.run(index, source=None if source is None else source[index], **moved)
            nats, count = divergence.kl(clean, got)
            lost, whole = noise(clean, got)
            kl, rows, energy, signal = kl + nats, rows + count, energy + lost, signal + whole
        return kl / max(rows, 1), energy / max(signal, 1e-300)

    def loss(self, weight: Array | None) -> float:
        """Cross-entropy a row."""
        total, rows = 0.0, 0
        for index in self.probed:
            label = self.study.labels[index]
            nats, count = self.study.divergence.loss(self.cut.run(index, weight=weight), label)
            total, rows = total + nats, rows + count
        return total / max(rows, 1)


def probe(study: Study, layer: int, index: int, step: float) -> float:
    """v'Hv for probe `index` of `layer`, v Rademacher on its weights, by finite differences of `step` (Hutchinson 1990)."""
    state = study.layer(layer)
    random = np.random.default_rng([study.seed, layer, index])
    v = np.where(random.integers(0, 2, state.cut.weight.shape, dtype=np.int8) == 1, 1.0, -1.0)
    weight = state.cut.weight.astype(np.float64)
    moved = (weight + step * v).astype(np.float32)
    if study.loss != "labels":
        kl, lost = state.distance(state.probed, weight=moved)
        return 2 * (kl if study.loss == "kl" else lost) / step**2
    opposite = (weight - step * v).astype(np.float32)
    return (state.loss(moved) + state.loss(opposite) - 2 * state.loss(None)) / step**2


def probes(study: Study, layer: int, indices: tuple[int, ...], step: float) -> list[float]:
    """`probe` for each of `indices`."""
    return [probe(study, layer, index, step) for index in indices]


def choose_step(study: Study, layer: int) -> tuple[float, float]:
    """(step, disagreement): the largest step at which half of it gives the same curvature within a twentieth.

    Where none does (float noise at one end, a loss that is not quadratic at the other), the one that disagrees least. The
    disagreement is that of the mean over four probes, relative.
    """
    state = study.layer(layer)
    best = (np.inf, 0.0)
    relative = _LARGEST_STEP
    coarse = _mean(study, layer, relative * state.size)
    while relative >= _SMALLEST_STEP:
        fine = _mean(study, layer, relative / 2 * state.size)
        scale = max(abs(coarse), abs(fine))
        apart = abs(coarse - fine) / scale if scale > 0 else 0.0
        if apart < best[0]:
            best = (apart, relative / 2 * state.size)
        if apart <= _STEP_TOLERANCE:
            break
        relative, coarse = relative / 2, fine
    return best[1], best[0]


def _mean(study: Study, layer: int, step: float) -> float:
    return float(np.mean([probe(study, layer, -1 - i & 0xFFFFFFFF, step) for i in range(_STEP_PROBES)]))


@dataclass(frozen=True)
class WidthCost:
    """A layer alone at one width. squared: |W - Q(W)|^2; kl, noise: what the model's outputs lose, see `divergence`."""

    bits: int
    squared: float
    kl: float
    noise: float


def measure_widths(study: Study, layer: int, widths: tuple[int, ...]) -> list[WidthCost]:
    """The model with only this layer's weights at each of `widths`, rounded as they will be (32: not at all): learned on every
    other sample, measured on the others."""
    state = study.layer(layer)
    found = []
    for narrowed in narrow_layer(state.cut, widths, study.seed, study.candidates, state.learnt_on):
        kl, lost = state.distance(state.held_out, weight=narrowed.weight, bias=narrowed.bias)
        found.append(WidthCost(narrowed.bits, narrowed.squared, kl, lost))
    return found


def measure_sources(study: Study, layer: int, widths: tuple[int, ...]) -> list[WidthCost]:
    """The same with only this layer's input at each of `widths` (nothing for tables, whose input is integers)."""
    state = study.layer(layer)
    if not state.cut.inputs:
        return []
    found = []
    for bits in widths:
        rounded = narrow_source(state.cut.inputs, bits)
        squared = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(state.cut.inputs, rounded, strict=True))
        kl, lost = state.distance(source=rounded)
        found.append(WidthCost(bits, squared, kl, lost))
    return found


def measure_group(study: Study, group: int, widths: tuple[int, ...]) -> list[WidthCost]:
    """The model with only the tensors of one group rounded to each of `widths` (32: not at all), on the samples that others are
    judged on.

    `squared` is 0: it is not asked for.
    """
    source = study.groups[group]
    graph = study.graph.copy()
    values = {v.name: v for v in graph.values()}
    for index, name in enumerate(source.tensors):
        _round_to(graph, values[name], index)
    session, plain = graph_session(graph, threads=1), graph_session(study.graph, threads=1)
    held_out = range(1 if len(study.feeds) > 1 else 0, len(study.feeds), 2)
    clean = [plain.run(study.feeds[index]) for index in held_out]
    found = []
    for bits in widths:
        if bits == FLOAT_BITS:
            found.append(WidthCost(bits, 0.0, 0.0, 0.0))
            continue
        steps = {f"{_ROUNDED}{field}{i}": getattr(s, field) for i, s in enumerate(source.steps[bits]) for field in _STEP}
        given = {name: np.asarray(value, np.float32) for name, value in steps.items()}
        kl = energy = signal = 0.0
        rows = 0
        for index, wanted in zip(held_out, clean, strict=True):
            got = session.run({**study.feeds[index], **given})
            nats, count = study.divergence.kl(wanted, got)
            lost, whole = noise(wanted, got)
            kl, rows, energy, signal = kl + nats, rows + count, energy + lost, signal + whole
        found.append(WidthCost(bits, 0.0, kl / max(rows, 1), energy / max(signal, 1e-300)))
    return found


def _round_to(graph: Graph, tensor: Value, index: int) -> None:
    """Let everybody read `tensor` rounded; the step and the ends are inputs of the graph."""
    ends = {field: Value(f"{_ROUNDED}{field}{index}", helper.make_tensor_type_proto(TensorProto.FLOAT, [])) for field in _STEP}
    graph.inputs += list(ends.values())
    divided = graph.node("Div", [tensor, ends["scale"]], [f"{tensor.name}_steps"])
    whole = graph.node("Round", divided.outputs, [f"{tensor.name}_whole"])
    kept = graph.node("Clip", [*whole.outputs, ends["low"], ends["high"]], [f"{tensor.name}_kept"])
    rounded = graph.node("Mul", [*kept.outputs, ends["scale"]], [f"{tensor.name}_rounded"])
    graph.replace_uses(tensor, rounded.outputs[0], only=partial(is_not, divided))
    graph.sort()
