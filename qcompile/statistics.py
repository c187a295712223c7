"""Intervals and outcomes: what samples say about a limit, by the paired bootstrap. For 0/1 metrics see `verdict`, `agreement`.

The score is a function of means of per-sample terms (an error, squares of signal and noise, counts of a confusion matrix), so
that a resample is a product of its sample weights with those terms. The interval is Efron's BCa (Better bootstrap confidence
intervals, JASA 82, 1987): percentiles of the resampled scores, moved by their median bias z0 and by the acceleration a of
the jackknife. Both models are resampled together: their terms stand in one row.

**False alarms.** `CONFIDENCE` is two-sided, so each of the two wrong verdicts (a fail where the truth is exactly at the limit,
and a pass there) has a nominal probability of 5 %. Simulated in the tests, here and for the exact intervals: between 2 and 7 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError, InputError

Array: TypeAlias = npt.NDArray[Any]
Outcome = Literal["pass", "fail", "inconclusive"]
Score: TypeAlias = Callable[[Array], Array]

CONFIDENCE = 0.9  # two-sided: 5 % for each wrong verdict
RESAMPLES = 2000
LEAST_SAMPLES = 20  # fewer: the resamples are too much alike for any interval
MOST_SAMPLES = 10_000_000  # beyond this "more samples" is no advice
_CHUNK = 1 << 22  # resample weights held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval, scalars or arrays of one shape."""

    value: Array
    low: Array
    high: Array


def bootstrap_interval(
    rows: Array, score: Score, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The BCa interval of score(mean of rows).

    rows: [samples, terms], one row a sample; score: takes means [..., terms], gives [...] or [..., m] for m scores at once.
    A score that no resample changes has an interval of width 0. Raises DataError for no rows.
    """
    if rows.ndim != 2 or len(rows) == 0:
        raise DataError("no samples to judge; give --eval data")
    count, table = len(rows), rows.astype(np.float64)
    total = table.sum(axis=0)
    value = np.asarray(score(total / count))
    scores = _resampled(table, score, resamples, seed)
    left_out = np.asarray(score((total - table) / (count - 1))) if count > 1 else value[None]
    normal = NormalDist()
    ends = [normal.inv_cdf((1 - confidence) / 2), normal.inv_cdf((1 + confidence) / 2)]
    flat, least, best = scores.reshape(resamples, -1), left_out.reshape(len(left_out), -1), value.reshape(-1)
    bounds = np.array([[_bca_end(flat[:, i], least[:, i], best[i], z) for z in ends] for i in range(best.size)])
    return Interval(value, bounds[:, 0].reshape(value.shape), bounds[:, 1].reshape(value.shape))


def outcome_of(low: float, high: float, limit: float, *, at_most: bool) -> Outcome:
    """Pass where the whole interval is within the limit, fail where none of it is, inconclusive between."""
    if (high <= limit) if at_most else (low >= limit):
        return "pass"
    if (low > limit) if at_most else (high < limit):
        return "fail"
    return "inconclusive"


def samples_for(value: float, low: float, high: float, limit: float, samples: int) -> int | None:
    """About how many samples would decide if the estimate stays: an interval shrinks as 1 / sqrt(samples). None: out of reach."""
    width = (high - value) if value <= limit else (value - low)
    distance = abs(limit - value)
    if distance == 0 or not math.isfinite(width) or samples * (width / distance) ** 2 > MOST_SAMPLES:
        return None
    return round_up(max(samples + 1, math.ceil(samples * (width / distance) ** 2)))


def round_up(count: int) -> int:
    """The next number of two figures and zeros."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // unit) * unit


def advice(needed: int | None) -> str:
    """What to do about an inconclusive verdict, in words."""
    if needed is None:
        return "no reachable number of samples would decide it: choose another limit"
    return f"about {needed} samples would decide it"


def finite(number: float | None) -> float | None:
    """As a report holds it: None for what is infinite."""
    return number if number is not None and math.isfinite(number) else None


def check_confidence(confidence: float) -> None:
    """Raise InputError where it is no two-sided confidence."""
    if not 0.5 <= confidence <= 0.9999:
        raise InputError(f"confidence {confidence:g} is not from 0.5 to 0.9999")


def _resampled(table: Array, score: Score, resamples: int, seed: int) -> Array:
    """Scores of `resamples` draws of len(table) rows with replacement."""
    count = len(table)
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    found = []
    for start in range(0, resamples, step):
        drawn = min(step, resamples - start)
        weights = random.multinomial(count, np.full(count, 1 / count), size=drawn)
        found.append(np.asarray(score(weights.astype(np.float64) @ table / count)))
    return np.concatenate(found)


def _bca_end(scores: Array, left_out: Array, value: float, z: float) -> float:
    """One end of the interval, at the normal quantile `z`. Where a resample has no finite score: without acceleration."""
    below = (np.count_nonzero(scores < value) + 0.5 * np.count_nonzero(scores == value)) / len(scores)
    normal = NormalDist()
    edge = 0.5 / len(scores)
    bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
    acceleration = 0.0
    if np.isfinite(left_out).all():
        influence = left_out.mean() - left_out
        spread = float(np.square(influence).sum())
        # Rounding of a score that does not depend on the sample left out is no influence.
        if spread > 1e-24 * len(left_out) * float(value) ** 2:
            acceleration = float((influence**3).sum()) / (6 * spread**1.5)
    moved = bias + (bias + z) / (1 - acceleration * (bias + z))
    return float(np.quantile(scores, normal.cdf(moved), method="inverted_cdf"))
