"""Bootstrap intervals: against scipy's BCa, closed cases, false alarms by simulation, what would decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from qcompile.errors import DataError, InputError
from qcompile.statistics import (
    Array,
    advice,
    bootstrap_interval,
    check_confidence,
    outcome_of,
    round_up,
    samples_for,
)


def mean(means: Array) -> Array:
    found: Array = means[..., 0]
    return found


def ratio(means: Array) -> Array:
    found: Array = 10 * np.log10(means[..., 0] / means[..., 1])
    return found


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("kind", ["mean", "decibels"])
def test_the_interval_is_that_of_scipy(kind: str, confidence: float) -> None:
    rng = np.random.default_rng(5)
    rows = rng.gamma(2.0, size=(200, 2))  # skewed, so that bias and acceleration matter
    score = mean if kind == "mean" else ratio
    found = bootstrap_interval(rows, score, confidence=confidence, resamples=20_000)

    def statistic(a: Array, b: Array, axis: int) -> Array:
        return score(np.stack([a.mean(axis=axis), b.mean(axis=axis)], axis=-1))

    other = stats.bootstrap(
        (rows[:, 0], rows[:, 1]), statistic, paired=True, vectorized=True, confidence_level=confidence, n_resamples=20_000,
        method="BCa", rng=np.random.default_rng(1), axis=-1,
    ).confidence_interval  # fmt: skip
    width = other.high - other.low
    assert float(found.low) == pytest.approx(other.low, abs=0.03 * width)
    assert float(found.high) == pytest.approx(other.high, abs=0.03 * width)
    assert float(found.value) == pytest.approx(float(score(rows.mean(axis=0))))


def test_a_percentile_interval_would_not_do() -> None:
    """The acceleration of a skewed mean: both ends move to the long tail."""
    rows = np.random.default_rng(0).exponential(size=(30, 1)) ** 2
    found = bootstrap_interval(rows, mean, resamples=20_000)
    draws = np.random.default_rng(1).choice(rows[:, 0], size=(20_000, 30)).mean(axis=1)
    assert float(found.low) > np.quantile(draws, 0.05)
    assert float(found.high) > np.quantile(draws, 0.95)


@pytest.mark.parametrize("law", ["normal", "skewed", "small-counts"])
def test_simulated_false_alarms_are_as_documented(law: str) -> None:
    """2000 trials whose true drop is the limit: a fail is a false alarm. All trials share their resamples."""
    rng = np.random.default_rng(11)
    shape = (500, 2000)
    if law == "normal":
        rows, truth = rng.normal(0.3, 1.0, shape), 0.3
    elif law == "skewed":
        rows, truth = rng.exponential(1.0, shape), 1.0
    else:
        rows, truth = rng.poisson(0.1, shape).astype(np.float64), 0.1
    found = bootstrap_interval(rows, lambda means: means, resamples=1000)
    alarms = float((found.low > truth).mean())
    misses = float((found.high <= truth).mean())
    assert 0.02 <= alarms <= 0.07
    assert 0.02 <= misses <= 0.08


def test_the_same_twice_and_in_pieces() -> None:
    rows = np.random.default_rng(2).normal(size=(3000, 2))
    first, second = (bootstrap_interval(rows, mean, seed=4) for _ in range(2))
    assert (float(first.low), float(first.high)) == (float(second.low), float(second.high))
    assert float(first.low) < float(first.value) < float(first.high)
    assert float(bootstrap_interval(rows, mean, seed=5).low) != float(first.low)


def test_what_does_not_vary_has_no_width() -> None:
    found = bootstrap_interval(np.full((40, 1), 0.1), mean)
    assert float(found.low) == pytest.approx(0.1) == float(found.high)


def test_resamples_without_noise_are_infinite_and_no_error() -> None:
    rows = np.ones((30, 2))
    rows[1:, 1] = 0
    with np.errstate(divide="ignore"):
        found = bootstrap_interval(rows, ratio)
    assert float(found.high) == math.inf
    assert math.isfinite(float(found.low))


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        bootstrap_interval(np.zeros((0, 1)), mean)


@pytest.mark.parametrize(
    ("low", "high", "at_most", "outcome"),
    [
        (0.1, 1.0, True, "pass"), (1.1, 2.0, True, "fail"), (0.5, 1.5, True, "inconclusive"), (1.0, 1.5, True, "inconclusive"),
        (1.0, 2.0, False, "pass"), (0.1, 0.9, False, "fail"), (0.5, 1.5, False, "inconclusive"),
    ],
    ids=str,
)  # fmt: skip
def test_outcomes(low: float, high: float, at_most: bool, outcome: str) -> None:
    assert outcome_of(low, high, 1.0, at_most=at_most) == outcome


def test_samples_that_would_decide() -> None:
    assert samples_for(0.5, 0.0, 1.5, 1.0, 100) == 400  # a width of 1 is to become .5
    assert samples_for(2.0, 0.5, 3.0, 1.0, 100) == 230  # 225, rounded up to two figures
    assert samples_for(1.0, 0.5, 1.5, 1.0, 100) is None
    assert samples_for(0.5, 0.0, math.inf, 1.0, 100) is None
    assert samples_for(1 - 1e-9, 0.0, 2.0, 1.0, 100) is None
    assert round_up(1234) == 1300
    assert "about 400 samples" in advice(400)
    assert "another limit" in advice(None)


@pytest.mark.parametrize("confidence", [0.4, 1.0, math.nan], ids=str)
def test_confidence_out_of_range_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence"):
        check_confidence(confidence)
