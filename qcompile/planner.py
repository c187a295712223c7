"""The integer program of one model: what each pair of widths costs each layer and uses of every resource, for any limits.

    avg-bits   stored bits of the chosen layers' weights over their number
    size       bytes of the file over those of the float file
    bops       multiply-accumulates * weight bits * activation bits, over those of the model with 8 and 8 bits
    latency    time of a run over the float model's, from times of single layers measured on this machine

Costs of weights belong to a layer, costs of activations to a group that has one width (`source_groups`); all add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qcompile.assignment import Choice, Options, solve
from qcompile.context import FLOAT_BITS, WIDTHS, Settings
from qcompile.errors import InputError
from qcompile.sensitivity import Effort, GroupSensitivity, LayerSensitivity, Sensitivity

Bits: TypeAlias = tuple[tuple[str, int], ...]
UNIFORM = "uniform"  # beside the measures: one width for all, as wide as the limits allow
LIMITS = ("avg-bits", "size", "bops", "latency")
_REST = "everything but the layers' weights"
_MARGIN = 512  # bytes by which the final file may exceed the one that was tried: other constants may happen to be equal
_ROUNDING = 1 + 1e-9  # sums of shares, for whole widths


@dataclass(frozen=True)
class Assigned:
    """weights: (layer, bits) of every layer; activations: (layer, bits) of those that read other than the usual width."""

    weights: Bits
    activations: Bits = ()


@dataclass(frozen=True)
class Mixing:
    """What `--bits mixed` was asked for. limits: (name, value) of `LIMITS`; widths: open to weights, 32 for float; activations:
    open to activations, the same, of which the widest of integers is the usual one; by: the measures whose optima are compiled;
    pareto: how many points of the front are compiled and measured beside them."""

    limits: tuple[tuple[str, float], ...]
    widths: tuple[int, ...] = WIDTHS
    by: tuple[str, ...] = ("noise", "hessian", UNIFORM)
    pareto: int = 0
    effort: Effort = field(default_factory=Effort)
    activations: tuple[int, ...] = (8,)

    @property
    def usual_activations(self) -> int:
        """The width of what no layer asks anything of."""
        return max(bits for bits in self.activations if bits != FLOAT_BITS)

    @property
    def chooses_activations(self) -> bool:
        """Whether there is more than one width of activations to choose from."""
        return len(self.activations) > 1


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of each layer in integers and in float, in the order of the layers, and of the whole float model."""

    integer: tuple[float, ...]
    floating: tuple[float, ...]
    whole: float


def packed_bytes(weights: int, bits: int) -> int:
    """Bytes of `weights` weights in the file."""
    if bits in (8, FLOAT_BITS):
        return weights * bits // 8
    return -(-weights // 2) if bits == 4 else bits * -(-weights // 8)


class Planner:
    """The integer program of one model for any limits."""

    def __init__(
        self,
        sensitivity: Sensitivity,
        mixing: Mixing,
        settings: Settings,
        float_bytes: int,
        times: LayerTimes | None = None,
    ) -> None:
        self.layers, self.groups, self.mixing, self.settings = sensitivity.layers, sensitivity.groups, mixing, settings
        self.float_bytes, self.times = float_bytes, times
        self.weights = sum(x.spec.weights for x in self.layers)
        self.macs = max(sum(x.macs for x in self.layers), 1)
        # What is not weights: biases stay as large, each channel gets a scale; corrected by the first file that is written.
        self.rest = float_bytes - 4 * self.weights + sum(4 * x.spec.channels for x in self.layers)
        self.ties = _ties(self.layers)
        self._group_of = {name: g for g in self.groups for name in g.source.layers}

    def solve(self, measure: str, limits: Mapping[str, float]) -> Assigned | None:
        """The optimum by `measure`; None where a layer has no such cost (no trace).

        Raises InputError where limits cannot be kept."""
        if measure == UNIFORM:
            return self._uniform(limits)
        options = [self._options(index, layer, measure) for index, layer in enumerate(self.layers)]
        if None in options:
            return None
        known = [o for o in options if o is not None]
        uses = {"size": ((self.rest + _MARGIN) / self.float_bytes,), "avg-bits": (0.0,), "bops": (0.0,)}
        if self.times is not None:
            linear = sum(self.times.floating)
            uses["latency"] = (max(0.0, self.times.whole - linear) / self.times.whole,)
        known.append(Options(_REST, (Choice(FLOAT_BITS, FLOAT_BITS),), (0.0,), uses))
        links: dict[str, Sequence[str]] = {}
        for group in self.groups if self.mixing.chooses_activations else ():
            known.append(self._group_options(group, measure, uses))
            links[group.source.name] = group.source.layers
        names = {name: f"--limit {name}" for name in LIMITS}
        found = solve(known, limits, self.ties, names=names, links=links)
        chosen = dict(zip((x.spec.node for x in self.layers), found.choices, strict=False))
        if all(choice.weights == FLOAT_BITS for choice in chosen.values()):
            raise InputError("the limits let every layer stay float; give a tighter --limit, or --widths without float")
        if all(FLOAT_BITS in (choice.weights, choice.activations) for choice in chosen.values()):
            raise InputError("the limits let every layer read float; give a --limit bops=, or --activation-widths without float")
        widths = {o.layer: c.activations for o, c in zip(known, found.choices, strict=True) if o.layer in links}
        return self._assigned(tuple((node, c.weights) for node, c in chosen.items()), widths)

    def narrowest(self) -> Assigned:
        """Every layer at its least width."""
        least = {g.source.name: self._open(g)[0] for g in self.groups}
        return self._assigned(self._of_one_width(min(self.mixing.widths)), least)

    def seems_too_large(self, limit: float) -> bool:
        """Whether no assignment keeps `limit` on bytes, as far as is known."""
        return self.uses(self.narrowest())["size"] + _MARGIN / self.float_bytes > limit

    def _of_one_width(self, bits: int) -> Bits:
        pinned = [(x.spec.node, self.settings.pinned(x.spec.node)) for x in self.layers]
        return tuple((node, bits if asked is None else asked) for node, asked in pinned)

    def _uniform(self, limits: Mapping[str, float]) -> Assigned | None:
        """The widest width of integers that all layers (but pinned ones) can have, with the activations' width that then has the
        least noise; None where no width keeps the limits."""
        found: list[Assigned] = []
        for activations in self.mixing.activations:
            open_to = {g.source.name: self._open(g) for g in self.groups}
            widths = {name: activations if activations in bits else bits[-1] for name, bits in open_to.items()}
            for bits in sorted((b for b in self.mixing.widths if b != FLOAT_BITS), reverse=True):
                assigned = self._assigned(self._of_one_width(bits), widths)
                if set(self.activation_bits(assigned).values()) == {FLOAT_BITS}:
                    continue
                used = self.uses(assigned)
                used["size"] += _MARGIN / self.float_bytes
                if all(used[name] <= limit * _ROUNDING for name, limit in limits.items()):
                    found.append(assigned)
                    break
        return min(found, key=self.predicted, default=None)

    def _assigned(self, weights: Bits, widths: Mapping[str, int]) -> Assigned:
        """With the activations of layers whose groups have `widths` other than what all are given anyway."""
        if not self.mixing.chooses_activations:
            return Assigned(weights)
        usual, bits = self.settings.activation_bits, dict(weights)
        narrow = {name: widths[g.source.name] for name, g in self._group_of.items() if widths[g.source.name] != usual}
        return Assigned(weights, tuple((n, narrow[n]) for n, b in bits.items() if n in narrow and b != FLOAT_BITS))

    def predicted(self, assigned: Assigned) -> float:
        """Noise / signal of the outputs where what was measured of layers and groups adds up."""
        bits = dict(assigned.weights)
        total = sum(c.noise for x in self.layers for c in x.weights if c.bits == bits[x.spec.node])
        widths = self.group_widths(assigned)
        return total + sum(c.noise for g in self.groups for c in g.costs if c.bits == widths[g.source.name])

    def group_widths(self, assigned: Assigned) -> dict[str, int]:
        """The width of each group of activations, by its name."""
        chosen, found = dict(assigned.activations), {}
        for group in self.groups:
            usual = max(self._pinned(group), default=self.settings.activation_bits)
            found[group.source.name] = max((chosen[n] for n in group.source.layers if n in chosen), default=usual)
        return found

    def activation_bits(self, assigned: Assigned) -> dict[str, int]:
        """The width of what each layer reads; 32 where it stays float."""
        widths = self.group_widths(assigned)
        read = {x.spec.node: self._group_of.get(x.spec.node) for x in self.layers}
        bits = {node: 8 if group is None else widths[group.source.name] for node, group in read.items()}
        return {node: FLOAT_BITS if width == FLOAT_BITS else bits[node] for node, width in assigned.weights}

    def uses(self, assigned: Assigned) -> dict[str, float]:
        """Of each resource, in the limits' units."""
        bits, activations = dict(assigned.weights), self.activation_bits(assigned)
        found = {"avg-bits": 0.0, "size": self.rest / self.float_bytes, "bops": 0.0}
        if self.times is not None:
            found["latency"] = max(0.0, self.times.whole - sum(self.times.floating)) / self.times.whole
        for index, layer in enumerate(self.layers):
            node = layer.spec.node
            for name, value in self._uses(index, layer, Choice(bits[node], activations[node])).items():
                found[name] += value
        return found

    def learn(self, assigned: Assigned, size_bytes: int) -> float:
        """Take over what a written file really needs beside weights; returns by how much the estimate was off, in bytes."""
        bits = dict(assigned.weights)
        rest = size_bytes - sum(packed_bytes(x.spec.weights, bits[x.spec.node]) for x in self.layers)
        off, self.rest = abs(rest - self.rest), rest
        return off

    def _open(self, group: GroupSensitivity) -> tuple[int, ...]:
        """The rising widths that a group may have: a user's where one is given, the widest of several. Float only where no
        integer convolution writes it: that kernel has no other result."""
        pinned = self._pinned(group)
        if pinned:
            return (max(pinned),)
        return tuple(b for b in self.mixing.activations if b != FLOAT_BITS or not group.source.convolved)

    def _pinned(self, group: GroupSensitivity) -> list[int]:
        pinned = [self.settings.pinned_activations(name) for name in group.source.readers]
        widest = 8 if group.source.convolved else FLOAT_BITS
        return [min(bits, widest) for bits in pinned if bits is not None]

    def _options(self, index: int, layer: LayerSensitivity, measure: str) -> Options | None:
        asked = self.settings.pinned(layer.spec.node)
        widths = self.mixing.widths if asked is None else (asked,)
        if layer.spec.kind == "table":  # no row is read in float where others are integers: 8 bits lose nothing there
            widths = tuple(b for b in widths if b != FLOAT_BITS) or (8,)
        group = self._group_of.get(layer.spec.node)
        read = (8,) if group is None else self._open(group)
        costs = {c.bits: layer.cost(c, measure) for c in layer.weights}
        # From narrow to wide: the error of a single layer never grows with its width but by chance, which must not decide.
        choices, values, worst = [], [], math.inf
        for bits in sorted(widths):
            value = costs[bits]
            if value is None:
                return None
            worst = min(worst, value)
            for activations in read if bits != FLOAT_BITS else (FLOAT_BITS,):
                choices.append(Choice(bits, activations))
                values.append(worst)
        used = [self._uses(index, layer, choice) for choice in choices]
        uses = {name: tuple(u[name] for u in used) for name in used[0]}
        return Options(layer.spec.node, tuple(choices), tuple(values), uses)

    def _group_options(self, group: GroupSensitivity, measure: str, uses: Mapping[str, tuple[float, ...]]) -> Options:
        """The widths of a group of activations, which use nothing by themselves."""
        costs = {c.bits: group.cost(c, measure) for c in group.costs}
        widths, values = self._open(group), []
        worst = math.inf
        for bits in widths:
            worst = min(worst, costs[bits])
            values.append(worst)
        nothing = {name: (0.0,) * len(widths) for name in uses}
        return Options(group.source.name, tuple(Choice(FLOAT_BITS, b) for b in widths), tuple(values), nothing)

    def _uses(self, index: int, layer: LayerSensitivity, choice: Choice) -> dict[str, float]:
        bits = choice.weights
        found = {
            "avg-bits": bits * layer.spec.weights / self.weights,
            "size": packed_bytes(layer.spec.weights, bits) / self.float_bytes,
            "bops": layer.macs * bits * choice.activations / (self.macs * 64),
        }
        if self.times is not None:
            # Integers that multiply floats run as float32; that they are dequantised at every run is left out.
            row = self.times.floating if FLOAT_BITS in (bits, choice.activations) else self.times.integer
            found["latency"] = row[index] / self.times.whole
        return found


def _ties(layers: Sequence[LayerSensitivity]) -> list[list[str]]:
    """Layers that share a weight share its width."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.spec.weight, []).append(layer.spec.node)
    return [names for names in groups.values() if len(names) > 1]
