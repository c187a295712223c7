"""Latency of models side by side: in turn, on few threads, medians and paired ratios.

A machine's speed drifts by more than two models differ. So every round runs all models, each for one slot of time, and
models are compared inside a round. Even rounds go forwards and odd rounds backwards, so that a steady drift cancels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from qcompile.errors import InputError
from qcompile.runtime import Feeds, Session

_MOST_REPEATS = 1 << 20  # a slot ends here even if the clock stands still


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of (first model's time / this model's time), and an interval of that median.

    `low` and `high` are order statistics: for any distribution they hold the true median with probability `confidence`
    (the sign test's binomial). Fewer than six rounds reach less than 95 %; `confidence` says what they do reach.
    """

    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Latency:
    """Times of several models in milliseconds a run. `round_ms[model][round]`; `speedups` are against the first model."""

    round_ms: tuple[tuple[float, ...], ...]
    median_ms: tuple[float, ...]
    speedups: tuple[Ratio, ...]
    threads: int

    def as_json(self) -> dict[str, object]:
        """The report's `latency_ms` of a float and a quantised model, in this order. ValueError for another number."""
        if len(self.median_ms) != 2:
            raise ValueError(f"the report compares two models, not {len(self.median_ms)}")
        speedup = self.speedups[1]
        return {
            "float": self.median_ms[0],
            "quantised": self.median_ms[1],
            "speedup": speedup.median,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
            "threads": self.threads,
        }


def measure_latency(
    models: Sequence[str | Path | onnx.ModelProto],
    feeds: Feeds | Sequence[Feeds],
    *,
    rounds: int = 11,
    slot_seconds: float = 0.05,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time `models` in turn on the same feeds, or on one feeds a model where their inputs differ.

    Takes about `rounds * slot_seconds * len(models)` seconds. `clock` returns seconds. Raises InputError on arguments that
    make no measurement, ModelError where a model cannot be loaded or run.
    """
    if not models:
        raise InputError("no model to measure")
    if rounds < 1 or not slot_seconds > 0 or threads < 1:
        raise InputError("latency needs at least one round, a slot longer than 0 seconds and one thread")
    each = [feeds] * len(models) if isinstance(feeds, Mapping) else list(feeds)
    if len(each) != len(models):
        raise InputError(f"{len(models)} models but {len(each)} feeds; give one for all or one for each model")
    runs: list[Callable[[], object]] = [
        _runner(Session(model, threads=threads, label=_label(model, index)), feed)
        for index, (model, feed) in enumerate(zip(models, each, strict=True))
    ]
    repeats = [_repeats_for(run, slot_seconds, clock) for run in runs]
    seconds = np.empty((len(runs), rounds))
    for turn in range(rounds):
        order = range(len(runs)) if turn % 2 == 0 else range(len(runs) - 1, -1, -1)
        for index in order:
            runs[index]()  # untimed: the model before has emptied the caches
            seconds[index, turn] = _elapsed(runs[index], repeats[index], clock) / repeats[index]
    if not (seconds > 0).all():
        raise InputError("the clock did not advance during a slot; give a longer slot")
    milliseconds = seconds * 1e3
    return Latency(
        round_ms=tuple(tuple(float(t) for t in row) for row in milliseconds),
        median_ms=tuple(float(t) for t in np.median(milliseconds, axis=1)),
        speedups=tuple(paired_ratio(milliseconds[0].tolist(), row.tolist()) for row in milliseconds),
        threads=threads,
    )


def median_interval(times: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, high, confidence) of the median: the sign interval, as in `paired_ratio`."""
    found = paired_ratio(times, [1.0] * len(times), confidence=confidence)
    return found.low, found.high, found.confidence


def paired_ratio(first: Sequence[float], other: Sequence[float], *, confidence: float = 0.95) -> Ratio:
    """Median of first/other over pairs, with the narrowest sign interval of at least `confidence`, or the widest there is."""
    ratios = np.sort(np.asarray(first, np.float64) / np.asarray(other, np.float64))
    pairs = len(ratios)
    # The median lies outside [ratios[k], ratios[-1-k]] with probability 2 P(Binomial(pairs, 1/2) <= k).
    skipped, outside = 0, 2 * 0.5**pairs
    cumulative = 1
    for k in range(1, (pairs + 1) // 2):
        cumulative += math.comb(pairs, k)
        if 2 * cumulative / 2**pairs > 1 - confidence:
            break
        skipped, outside = k, 2 * cumulative / 2**pairs
    low, high = float(ratios[skipped]), float(ratios[pairs - 1 - skipped])
    return Ratio(float(np.median(ratios)), low, high, 1 - outside)


def _runner(session: Session, feeds: Feeds) -> Callable[[], object]:
    return lambda: session.run(feeds)


def _label(model: str | Path | onnx.ModelProto, index: int) -> str:
    return f"model {index}" if isinstance(model, onnx.ModelProto) else str(model)


def _elapsed(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start


def _repeats_for(run: Callable[[], object], slot: float, clock: Callable[[], float]) -> int:
    """Runs that fill a slot: double the number, which also warms the model up, until it takes a quarter of the slot."""
    repeats = 1
    run()
    while (elapsed := _elapsed(run, repeats, clock)) < slot / 4 and repeats < _MOST_REPEATS:
        repeats *= 2
    return min(_MOST_REPEATS, max(1, round(repeats * slot / elapsed))) if elapsed > 0 else repeats
