"""Is the top-1 agreement with the float model at least what was asked for (`--min-agreement`)? Needs no labels.

Of n samples, k keep their class: a binomial count. The interval of the true share inverts a mid-p test, as `verdict` does for
accuracy drops: p stays in it unless P(K < k | p) + P(K = k | p) / 2 <= alpha / 2, or the same in the other tail (Lancaster 1961).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from qcompile.errors import DataError, InputError
from qcompile.statistics import CONFIDENCE, MOST_SAMPLES, Outcome, advice, round_up

_BISECTIONS = 50


@dataclass(frozen=True)
class AgreementVerdict:
    """What the samples say about a limit on the agreement; shares are fractions, `low` and `high` bound the true one.

    `samples_needed` is set where the outcome is inconclusive and more samples can be expected to decide it.
    """

    outcome: Outcome
    agreement: float
    low: float
    high: float
    confidence: float
    samples: int
    samples_needed: int | None
    reason: str

    def as_json(self) -> dict[str, object]:
        """The fields under their own names."""
        return asdict(self)


def judge_agreement(
    agreed: int, samples: int, least: float, *, identical: bool = False, confidence: float = CONFIDENCE
) -> AgreementVerdict:
    """Decide whether the share of samples that keep their class is at least `least`.

    Passes where even the lower bound reaches it, fails where even the upper bound does not. `identical` outputs, bit for bit,
    pass whatever their number. Raises DataError on counts that cannot be and InputError on a limit outside (0, 1].
    """
    if samples < 1 or not 0 <= agreed <= samples:
        raise DataError(f"{agreed} samples that agree cannot be among {samples}; give --eval data")
    if not 0 < least <= 1:
        raise InputError(f"--min-agreement {least:g}: give a share above 0 and at most 1, such as .99")
    if identical:
        return AgreementVerdict("pass", 1.0, 1.0, 1.0, confidence, samples, None, "outputs are bit-identical")
    low, high = agreement_interval(agreed, samples, confidence=confidence)
    share = agreed / samples
    about = f"agreement {share:.4f}, {100 * confidence:g} % interval {low:.4f} to {high:.4f}"
    if low >= least:
        return AgreementVerdict("pass", share, low, high, confidence, samples, None, f"{about}, within limit {least:g}")
    if high < least:
        return AgreementVerdict("fail", share, low, high, confidence, samples, None, f"{about}, below limit {least:g}")
    needed = _samples_needed(agreed, samples, least, confidence)
    reason = f"{about}, limit {least:g}: {samples} samples are too few; {advice(needed)}"
    return AgreementVerdict("inconclusive", share, low, high, confidence, samples, needed, reason)


def agreement_interval(agreed: int, samples: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two-sided mid-p interval of a binomial share."""
    tail = (1 - confidence) / 2
    lost = samples - agreed  # the smaller count as a rule: the sums below run over 0 .. lost
    logs = np.zeros(samples + 1)
    np.cumsum(np.log(np.arange(1, samples + 1)), out=logs[1:])
    k = np.arange(lost + 1)
    ways = logs[samples] - logs[k] - logs[samples - k]

    def mid_p(share: float) -> float:
        """P(K < lost) + P(K = lost) / 2 for K binomial(samples, share), 0 < share < 1: falls as the share grows."""
        probabilities = np.exp(ways + k * math.log(share) + (samples - k) * math.log1p(-share))
        return float(probabilities[:-1].sum() + probabilities[-1] / 2)

    most = 1.0 if agreed == 0 else _crossing(mid_p, tail)
    least = 0.0 if lost == 0 else _crossing(mid_p, 1 - tail)
    return 1 - most, 1 - least


def _crossing(falling: Callable[[float], float], level: float) -> float:
    """Where a falling function of (0, 1) crosses `level`."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


def _samples_needed(agreed: int, samples: int, least: float, confidence: float) -> int | None:
    """About how many samples would decide if the share stays as it is, rounded up to two figures.

    From the score test (Wilson 1927): the share is z standard deviations of the limit away from it.
    """
    distance = abs(agreed / samples - least)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    if distance * distance * MOST_SAMPLES <= z * z * least * (1 - least):
        return None
    needed = max(samples + 1, math.ceil(z * z * least * (1 - least) / (distance * distance)))
    return round_up(needed)
