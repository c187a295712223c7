"""Mixed precision: which width each layer's weights get under limits on the whole model (`--bits mixed --limit ...`).

Sensitivities (`qcompile.sensitivity`) are the costs of an integer program (`qcompile.assignment`). The errors of layers are taken
to add up, which they do nearly; so the optimum by each measure that was asked for is compiled with one half of the calibration
samples, and the one whose outputs come nearest to the float model's on the other half is kept. (On the samples that rounding was
learned from, layers that learn them by heart look good: behind a global pool each sample is one row.)

    avg-bits   stored bits of the chosen layers' weights over their number
    size       bytes of the file over those of the float file
    bops       multiply-accumulates * weight bits * activation bits, over those of the model with 8 and 8 bits
    latency    time of a run over the float model's, from times of single layers measured on this machine
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from qcompile.assignment import Choice, Options, solve
from qcompile.context import FLOAT_BITS, WIDTHS, Settings
from qcompile.errors import InputError
from qcompile.sensitivity import Effort, LayerSensitivity, Sensitivity

Assigned: TypeAlias = tuple[tuple[str, int], ...]
UNIFORM = "uniform"  # beside the measures: one width for all, as wide as the limits allow
LIMITS = ("avg-bits", "size", "bops", "latency")
_REST = "everything but the layers' weights"
_ROUNDS = 4  # of correcting the bytes that are not weights
_MARGIN = 512  # bytes by which the final file may exceed the one that was tried: other constants may happen to be equal
_SPARE = 1.05  # times what other matrices add to the average: it grows a little as the layers get narrower
_ROUNDING = 1 + 1e-9  # sums of shares, for whole widths
_SLACK = 0.002  # of the float file's bytes: an estimate that was off by more is corrected though the limit holds


@dataclass(frozen=True)
class Mixing:
    """What `--bits mixed` was asked for. limits: (name, value) of `LIMITS`; widths: open to weights, 32 for float; by: the
    measures whose optima are compiled; pareto: how many points of the front are compiled and measured beside them."""

    limits: tuple[tuple[str, float], ...]
    widths: tuple[int, ...] = WIDTHS
    by: tuple[str, ...] = ("noise", "hessian", UNIFORM)
    pareto: int = 0
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of each layer in integers and in float, in the order of the layers, and of the whole float model."""

    integer: tuple[float, ...]
    floating: tuple[float, ...]
    whole: float


@dataclass(frozen=True)
class Tried:
    """One compilation: SQNR on samples that it did not learn from (None: no error), bytes and average bits of its file."""

    sqnr_db: float | None
    size_bytes: int
    average_bits: float


@dataclass
class Mixed:
    """The chosen assignment, and what was tried on the way (`report`)."""

    assigned: Assigned
    report: dict[str, Any]


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
        self.layers, self.mixing, self.settings = sensitivity.layers, mixing, settings
        self.float_bytes, self.times = float_bytes, times
        self.weights = sum(x.spec.weights for x in self.layers)
        self.macs = max(sum(x.macs for x in self.layers), 1)
        # What is not weights: biases stay as large, each channel gets a scale; corrected by the first file that is written.
        self.rest = float_bytes - 4 * self.weights + sum(4 * x.spec.channels for x in self.layers)
        self.ties = _ties(self.layers)

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
        names = {name: f"--limit {name}" for name in LIMITS}
        found = solve(known, limits, self.ties, names=names)
        chosen = zip(self.layers, found.choices, strict=False)
        assigned = tuple((layer.spec.node, choice.weights) for layer, choice in chosen)
        if all(bits == FLOAT_BITS for _, bits in assigned):
            raise InputError("the limits let every layer stay float; give a tighter --limit, or --widths without float")
        return assigned

    def narrowest(self) -> Assigned:
        """Every layer at its least width."""
        pinned = [(x.spec.node, self.settings.pinned(x.spec.node)) for x in self.layers]
        return tuple((node, min(self.mixing.widths) if asked is None else asked) for node, asked in pinned)

    def seems_too_large(self, limit: float) -> bool:
        """Whether no assignment keeps `limit` on bytes, as far as is known."""
        return self.uses(self.narrowest())["size"] + _MARGIN / self.float_bytes > limit

    def _uniform(self, limits: Mapping[str, float]) -> Assigned | None:
        """The widest width of integers that all layers (but pinned ones) can have; None where no width keeps the limits."""
        for bits in sorted((b for b in self.mixing.widths if b != FLOAT_BITS), reverse=True):
            pinned = [(x.spec.node, self.settings.pinned(x.spec.node)) for x in self.layers]
            assigned = tuple((node, bits if asked is None else asked) for node, asked in pinned)
            used = self.uses(assigned)
            used["size"] += _MARGIN / self.float_bytes
            if all(used[name] <= limit * _ROUNDING for name, limit in limits.items()):
                return assigned
        return None

    def predicted(self, assigned: Assigned) -> float:
        """Noise / signal of the outputs where the layers' measured ones add up."""
        bits = dict(assigned)
        return sum(c.noise for x in self.layers for c in x.weights if c.bits == bits[x.spec.node])

    def uses(self, assigned: Assigned) -> dict[str, float]:
        """Of each resource, in the limits' units."""
        bits = dict(assigned)
        pairs = [(i, x, bits[x.spec.node]) for i, x in enumerate(self.layers)]
        found = {"avg-bits": 0.0, "size": self.rest / self.float_bytes, "bops": 0.0}
        if self.times is not None:
            found["latency"] = max(0.0, self.times.whole - sum(self.times.floating)) / self.times.whole
        for index, layer, width in pairs:
            for name, value in self._uses(index, layer, width).items():
                found[name] += value
        return found

    def learn(self, assigned: Assigned, size_bytes: int) -> float:
        """Take over what a written file really needs beside weights; returns by how much the estimate was off, in bytes."""
        bits = dict(assigned)
        rest = size_bytes - sum(packed_bytes(x.spec.weights, bits[x.spec.node]) for x in self.layers)
        off, self.rest = abs(rest - self.rest), rest
        return off

    def _options(self, index: int, layer: LayerSensitivity, measure: str) -> Options | None:
        asked = self.settings.pinned(layer.spec.node)
        widths = self.mixing.widths if asked is None else (asked,)
        if layer.spec.kind == "table":  # no row is read in float where others are integers: 8 bits lose nothing there
            widths = tuple(b for b in widths if b != FLOAT_BITS) or (8,)
        costs = {c.bits: layer.cost(c, measure) for c in layer.weights}
        # From narrow to wide: the error of a single layer never grows with its width but by chance, which must not decide.
        choices, values, worst = [], [], math.inf
        for bits in sorted(widths):
            value = costs[bits]
            if value is None:
                return None
            worst = min(worst, value)
            choices.append(Choice(bits, 8 if bits != FLOAT_BITS else FLOAT_BITS))
            values.append(worst)
        used = [self._uses(index, layer, bits) for bits in sorted(widths)]
        uses = {name: tuple(u[name] for u in used) for name in used[0]}
        return Options(layer.spec.node, tuple(choices), tuple(values), uses)

    def _uses(self, index: int, layer: LayerSensitivity, bits: int) -> dict[str, float]:
        activations = FLOAT_BITS if bits == FLOAT_BITS else 8
        found = {
            "avg-bits": bits * layer.spec.weights / self.weights,
            "size": packed_bytes(layer.spec.weights, bits) / self.float_bytes,
            "bops": layer.macs * bits * activations / (self.macs * 64),
        }
        if self.times is not None:
            row = self.times.floating if bits == FLOAT_BITS else self.times.integer
            found["latency"] = row[index] / self.times.whole
        return found


def _ties(layers: Sequence[LayerSensitivity]) -> list[list[str]]:
    """Layers that share a weight share its width."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.spec.weight, []).append(layer.spec.node)
    return [names for names in groups.values() if len(names) > 1]


def mix(sensitivity: Sensitivity, planner: Planner, attempt: Callable[[Assigned], Tried]) -> Mixed:
    """Solve by each measure, compile, keep the best by SQNR. Raises InputError where the limits cannot be kept."""
    mixing, limits = planner.mixing, dict(planner.mixing.limits)
    rows: list[dict[str, Any]] = []
    known: dict[Assigned, Tried] = {}

    def once(assigned: Assigned) -> Tried:
        if assigned not in known:
            known[assigned] = attempt(assigned)
        return known[assigned]

    if "size" in limits and planner.seems_too_large(limits["size"]):
        # Bytes beside the weights are an estimate until a file is written: the smallest one says whether the limit can be kept.
        narrowest = planner.narrowest()
        planner.learn(narrowest, once(narrowest).size_bytes)
    seen: set[Assigned] = set()
    best: tuple[Assigned, Tried, str] | None = None
    for measure in mixing.by:
        found = _within(planner, measure, limits, once)
        if found is None:
            continue
        assigned, tried = found
        if assigned not in seen:
            rows.append({"by": measure, **_row(planner, assigned, tried)})
            if best is None or _decibels(tried) > _decibels(best[1]):
                best = (assigned, tried, measure)
            seen.add(assigned)
    if best is None:
        raise InputError("--bits mixed: no trace was estimated in time; raise --max-seconds, or give --mixed-by noise")
    assigned, tried, measure = best
    front = _front(planner, limits, assigned, tried, once)
    bits = dict(assigned)
    report = {
        "limits": dict(mixing.limits),
        "widths": list(mixing.widths),
        "by": measure,
        "average_bits": tried.average_bits,
        "predicted": planner.uses(assigned),
        "candidates": rows,
        "front": front,
        **sensitivity.as_json(),
    }
    for entry in report["layers"]:
        entry["bits"] = bits[entry["node"]]
    return Mixed(assigned, report)


def _within(
    planner: Planner, measure: str, limits: Mapping[str, float], attempt: Callable[[Assigned], Tried]
) -> tuple[Assigned, Tried] | None:
    """The optimum by `measure` that keeps the limits in the written file; None without such a measure."""
    best: tuple[Assigned, Tried] | None = None
    own, nearest = dict(limits), dict.fromkeys(limits, math.inf)
    for _ in range(_ROUNDS):
        assigned = planner.solve(measure, own)
        if assigned is None:
            return None
        tried = attempt(assigned)
        off = planner.learn(assigned, tried.size_bytes)
        reached = {"size": tried.size_bytes / planner.float_bytes, "avg-bits": tried.average_bits}
        nearest |= {name: min(nearest[name], value) for name, value in reached.items() if name in limits}
        held = all(value <= limits[name] * _ROUNDING for name, value in reached.items() if name in limits)
        if held and (best is None or _decibels(tried) > _decibels(best[1])):
            best = (assigned, tried)
        if held and ("size" not in limits or off <= _SLACK * planner.float_bytes):
            break
        if "avg-bits" in limits:  # matrices that kernels bring along have 8 bits, and count in the file
            beside = tried.average_bits - planner.uses(assigned)["avg-bits"]
            own["avg-bits"] = min(own["avg-bits"], limits["avg-bits"] - max(beside, 0.0) * _SPARE)
    if best is None:
        told = ", ".join(
            f"{name}={limit:g} ({nearest[name]:.4f} was reached)" for name, limit in limits.items() if name in reached
        )
        raise InputError(f"--limit {told}: no file that was tried keeps it; give a little more")
    return best


def _front(
    planner: Planner,
    limits: Mapping[str, float],
    assigned: Assigned,
    tried: Tried,
    attempt: Callable[[Assigned], Tried],
) -> list[dict[str, Any]]:
    """The best predicted SQNR at each average width; as many of them measured as were asked for, evenly spread.

    What the chosen compilation loses beyond its weights' predicted noise (activations) is added to every prediction.
    """
    floor = max(0.0, _noise(tried) - planner.predicted(assigned))
    widths = planner.mixing.widths
    integer = [b for b in widths if b != FLOAT_BITS] or [8]
    targets = [b / 2 for b in range(2 * min(integer), 2 * max(integer) + 1)]
    points: list[Assigned] = []
    for target in targets:
        try:
            found = planner.solve("noise", {"avg-bits": target})
        except InputError:  # pinned layers leave no such average
            continue
        if found is not None and found not in points:
            points.append(found)
    count = min(planner.mixing.pareto, len(points))
    measured = {round(i * (len(points) - 1) / max(count - 1, 1)) for i in range(count)}
    rows = []
    for index, point in enumerate(points):
        made = attempt(point) if index in measured else None
        uses = planner.uses(point)
        rows.append(
            {
                "average_bits": uses["avg-bits"],
                "size_bytes": round(uses["size"] * planner.float_bytes) if made is None else made.size_bytes,
                "predicted_sqnr_db": _in_decibels(planner.predicted(point) + floor),
                "sqnr_db": None if made is None else made.sqnr_db,
            }
        )
    return rows


def _row(planner: Planner, assigned: Assigned, tried: Tried) -> dict[str, Any]:
    return {
        "average_bits": tried.average_bits,
        "size_bytes": tried.size_bytes,
        "predicted_sqnr_db": _in_decibels(planner.predicted(assigned)),
        "sqnr_db": tried.sqnr_db,
        "bits": dict(assigned),
    }


def _decibels(tried: Tried) -> float:
    return math.inf if tried.sqnr_db is None else tried.sqnr_db


def _noise(tried: Tried) -> float:
    return 0.0 if tried.sqnr_db is None else 10 ** (-tried.sqnr_db / 10)


def _in_decibels(noise: float) -> float | None:
    return None if noise <= 0 else -10 * math.log10(noise)


def settings_of(settings: Settings, assigned: Assigned) -> Settings:
    """`settings` with the assignment in it."""
    return replace(settings, assigned=assigned)
