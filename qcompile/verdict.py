"""Has accuracy dropped by more than the limit? A paired test on the same samples (`--max-drop`).

Both models see the same n samples. `lost` of them are right in float and wrong quantised, `won` the other way round; all
other samples say nothing about the difference. The drop is (lost - won) / n, a difference of paired proportions. Its
confidence interval inverts a mid-p test: a drop t stays in the interval unless the observed difference D = lost - won has

    P(D < d | t) + P(D = d | t) / 2 <= alpha / 2      or the same in the other tail.

The law of D is exact: a sum of n independent steps +1, -1, 0 with probabilities p10, p01 and the rest, where
p10 - p01 = t. Its probabilities come from its characteristic function by FFT. Only the nuisance p01 is estimated, by its
maximum likelihood under the drop t (Tango, Statistics in Medicine 17, 1998: the positive root of his quadratic).

Why not condition on m = lost + won, as McNemar's test does? That is right for t = 0 only. For t > 0 m itself carries the
information: a model that loses samples and wins none has all its discordant pairs on one side, the conditional interval
ends at the observed drop m/n, and half of the models that are worse than the limit would pass. Computed by enumeration
(n = 100 and 500, drops 0 to 5 points, p01 0 to 3 %), at a nominal 2.5 % for each of the two wrong verdicts:

    conditional mid-p   wrongly passed up to 74 %, wrongly failed up to 13 %
    this interval       wrongly passed up to 4.0 %, wrongly failed up to 3.4 %

**The documented rate** is 5 % for each (`CONFIDENCE` is two-sided): a model whose true drop *is* the limit fails with about that
probability, a false alarm. By the same enumeration: wrongly failed 4.2 to 6.7 %, wrongly passed 3.7 to 5.5 %.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from qcompile.errors import DataError, InputError
from qcompile.statistics import CONFIDENCE, MOST_SAMPLES, Outcome, advice, check_confidence, finite, round_up

_BISECTIONS = 50  # interval ends to 2^-50, far below one sample in MOST_SAMPLES


@dataclass(frozen=True)
class Verdict:
    """What the samples say about a limit on the accuracy drop. `drop_points`, `low`, `high` are in percentage points.

    `low` and `high` bound the drop with two-sided `confidence`, so each wrong verdict has half of the rest.
    `samples_needed` is set where the outcome is inconclusive and more samples can be expected to decide it.
    """

    outcome: Outcome
    drop_points: float
    low: float
    high: float
    confidence: float
    samples: int
    samples_needed: int | None
    reason: str

    def as_json(self) -> dict[str, object]:
        """The fields under their own names; ends that are infinite are None."""
        return {**asdict(self), **{name: finite(getattr(self, name)) for name in ("drop_points", "low", "high")}}


def judge_drop(
    lost: int,
    won: int,
    samples: int,
    max_drop_points: float,
    *,
    identical: bool = False,
    confidence: float = CONFIDENCE,
) -> Verdict:
    """Decide whether the accuracy drop is within `max_drop_points` percentage points.

    `lost` samples are right in float and wrong quantised, `won` the opposite, of `samples` in all. Passes where the upper
    bound is at most the limit, fails where the lower bound is above it. `identical` outputs, bit for bit, pass whatever
    the number of samples. Raises DataError on counts that cannot be and InputError on a limit or confidence out of range.
    """
    _check(lost, won, samples, max_drop_points, confidence)
    if identical:
        if lost or won:
            raise DataError(f"outputs cannot be identical with {lost} samples lost and {won} won")
        reason = "outputs are bit-identical"
        return Verdict("pass", 0.0, 0.0, 0.0, confidence, samples, None, reason)
    low, high = (100 * bound for bound in drop_interval(lost, won, samples, confidence=confidence))
    drop = 100 * (lost - won) / samples
    about = f"drop {drop:.2f} points, {100 * confidence:g} % interval {low:.2f} to {high:.2f}"
    limit = f"limit {max_drop_points:g}"
    if high <= max_drop_points:
        return Verdict("pass", drop, low, high, confidence, samples, None, f"{about}, within {limit}")
    if low > max_drop_points:
        return Verdict("fail", drop, low, high, confidence, samples, None, f"{about}, above {limit}")
    needed = samples_needed(lost, won, samples, max_drop_points, confidence=confidence)
    reason = f"{about}, {limit}: {samples} samples are too few; {advice(needed)}"
    return Verdict("inconclusive", drop, low, high, confidence, samples, needed, reason)


def drop_interval(lost: int, won: int, samples: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two-sided mid-p interval of the drop (lost - won) / samples, as fractions in [-1, 1]. See the module's head."""
    tail = (1 - confidence) / 2
    high = _upper_bound(lost, won, samples, tail)
    low = -_upper_bound(won, lost, samples, tail)  # the gain is the drop with the two models exchanged
    return low, high


def samples_needed(lost: int, won: int, samples: int, max_drop_points: float, *, confidence: float = CONFIDENCE) -> int | None:
    """About how many samples would decide, if the rates of lost and won samples stay as they are.

    The least number at which the scaled, rounded counts pass or fail, rounded up to two figures. If the true rates are the
    measured ones, that many samples decide about every second time; twice as many nearly always. None past ten million:
    the drop lies on the limit, or the limit is 0 and nothing was lost.
    """
    tail, limit = (1 - confidence) / 2, max_drop_points / 100

    def decided(n: int) -> bool:
        b, c = round(lost * n / samples), round(won * n / samples)
        below, above = _tails(b, c, n, limit)
        return min(below, above) <= tail

    undecided, n = samples, 2 * samples
    while not decided(n):
        if n >= MOST_SAMPLES:
            return None
        undecided, n = n, 2 * n
    while n - undecided > max(1, undecided // 100):
        middle = (n + undecided) // 2
        undecided, n = (undecided, middle) if decided(middle) else (middle, n)
    return round_up(n)


def _upper_bound(lost: int, won: int, samples: int, tail: float) -> float:
    """Largest drop not rejected. The rejected end of the bisection is returned: the interval errs on the wide side."""
    kept, rejected = (lost - won) / samples, 1.0
    for _ in range(_BISECTIONS):
        middle = (kept + rejected) / 2
        if _tails(lost, won, samples, middle)[0] <= tail:
            rejected = middle
        else:
            kept = middle
    return rejected


def _tails(lost: int, won: int, samples: int, drop: float) -> tuple[float, float]:
    """Mid-p tails (P(D < d) + P(D = d)/2, P(D > d) + P(D = d)/2) of d = lost - won if the true drop is `drop`.

    D is the sum of `samples` steps of +1 (p10), -1 (p01) or 0. Its characteristic function is the n-th power of one
    step's, and an FFT over more points than D has likely values gives its probabilities to about 1e-13.
    """
    p10, p01 = _rates_at(lost, won, samples, drop)
    difference, mean = lost - won, samples * drop
    deviation = math.sqrt(max(0.0, samples * (p10 + p01 - drop * drop)))
    # Twelve deviations and a margin for the Poisson tail of rare events; 2n + 1 values are all there are.
    reach = min(2 * samples + 1, math.ceil(2 * (abs(difference - mean) + 12 * deviation + 64)))
    points = 1 << (reach - 1).bit_length()
    angle = 2 * np.pi * np.arange(points // 2 + 1) / points
    step = (1 - p10 - p01) + p10 * np.exp(-1j * angle) + p01 * np.exp(1j * angle)
    probabilities = np.fft.irfft(step**samples * np.exp(1j * difference * angle), points)
    # Entry k is P(D - d = k modulo points); read it over the window centred on the mean of D - d.
    first = round(mean - difference) - points // 2
    offsets = np.arange(first, first + points)
    probabilities = probabilities[offsets % points]
    half = float(probabilities[offsets == 0].sum()) / 2
    return float(probabilities[offsets < 0].sum()) + half, float(probabilities[offsets > 0].sum()) + half


def _rates_at(lost: int, won: int, samples: int, drop: float) -> tuple[float, float]:
    """(p10, p01): the most likely rates of lost and won samples with p10 - p01 = drop (Tango 1998, his quadratic)."""
    if drop < 0:
        p01, p10 = _rates_at(won, lost, samples, -drop)
        return p10, p01
    b = (2 * samples - lost + won) * drop - (lost + won)
    c = -won * drop * (1 - drop)
    root = (-b + math.sqrt(max(0.0, b * b - 8 * samples * c))) / (4 * samples)
    p01 = min(max(root, 0.0), (1 - drop) / 2)
    return p01 + drop, p01


def _check(lost: int, won: int, samples: int, max_drop_points: float, confidence: float) -> None:
    if samples < 1:
        raise DataError("no labelled samples to judge the accuracy drop on; give --eval data with labels")
    if lost < 0 or won < 0 or lost + won > samples:
        raise DataError(f"{lost} samples lost and {won} won cannot be among {samples} samples")
    if not 0 <= max_drop_points <= 100:
        raise InputError(f"--max-drop {max_drop_points:g} is not a number of points from 0 to 100")
    check_confidence(confidence)
