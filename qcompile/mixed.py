"""Mixed precision: which width each layer gets under limits on the whole model (`--bits mixed --limit ...`).

Sensitivities (`qcompile.sensitivity`) are the costs of an integer program (`qcompile.planner`). The errors of layers are taken
to add up, which they do nearly; so the optimum by each measure that was asked for is compiled with one half of the calibration
samples, and the one whose outputs come nearest to the float model's on the other half is kept; one width for all layers, which no
measure speaks for, where it is better by half a decibel. (On the samples that rounding was
learned from, layers that learn them by heart look good: behind a global pool each sample is one row.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qcompile.context import FLOAT_BITS, Settings
from qcompile.errors import InputError
from qcompile.planner import Assigned, Planner
from qcompile.sensitivity import Sensitivity

_ROUNDS = 4  # of correcting the bytes that are not weights
_SPARE = 1.05  # times what other matrices add to the average: it grows a little as the layers get narrower
_ROUNDING = 1 + 1e-9  # sums of shares, for whole widths
_CLEAR_DB = 0.5  # by which one width for all must be better: half of the samples can be .3 dB wrong (resnet20)
_SLACK = 0.002  # of the float file's bytes: an estimate that was off by more is corrected though the limit holds


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
            if best is None or _decibels(tried) > _decibels(best[1]) + (_CLEAR_DB if measure == "uniform" else 0.0):
                best = (assigned, tried, measure)
            seen.add(assigned)
    if best is None:
        raise InputError("--bits mixed: no trace was estimated in time; raise --max-seconds, or give --mixed-by noise")
    assigned, tried, measure = best
    front = _front(planner, limits, assigned, tried, once)
    bits, activations = dict(assigned.weights), planner.activation_bits(assigned)
    report: dict[str, Any] = {
        "limits": dict(mixing.limits),
        "widths": list(mixing.widths),
        "activation_widths": list(mixing.activations),
        "by": measure,
        "average_bits": tried.average_bits,
        "predicted": planner.uses(assigned),
        "candidates": rows,
        "front": front,
        **sensitivity.as_json(),
    }
    for entry in report["layers"]:
        entry["bits"], entry["activation_bits"] = bits[entry["node"]], activations[entry["node"]]
    for entry, width in zip(report.get("groups", ()), planner.group_widths(assigned).values(), strict=False):
        entry["bits"] = width
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
        "bits": dict(assigned.weights),
        "activations": planner.activation_bits(assigned),
    }


def _decibels(tried: Tried) -> float:
    return math.inf if tried.sqnr_db is None else tried.sqnr_db


def _noise(tried: Tried) -> float:
    return 0.0 if tried.sqnr_db is None else 10 ** (-tried.sqnr_db / 10)


def _in_decibels(noise: float) -> float | None:
    return None if noise <= 0 else -10 * math.log10(noise)


def settings_of(settings: Settings, assigned: Assigned) -> Settings:
    """`settings` with the assignment in it."""
    return replace(settings, assigned=assigned.weights, assigned_activations=assigned.activations)
