"""Verdicts on an accuracy drop: exact tails against scipy, error rates by enumeration, decisions, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, multinomial

from qcompile.errors import DataError, InputError
from qcompile.verdict import drop_interval, judge_drop, samples_needed


@st.composite
def counts(draw: st.DrawFn, most: int = 300) -> tuple[int, int, int]:
    """(lost, won, samples)."""
    samples = draw(st.integers(1, most))
    lost = draw(st.integers(0, samples))
    return lost, draw(st.integers(0, samples - lost)), samples


def most_likely_rates(lost: int, won: int, samples: int, drop: float) -> tuple[float, float]:
    """(p10, p01) by maximising the trinomial likelihood on a fine grid, independent of Tango's quadratic."""
    p01 = np.linspace(max(0.0, -drop), (1 - drop) / 2, 200_001)
    rest = np.clip(1 - 2 * p01 - drop, 0, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(k == 0, 0.0, k * np.log(p)) for k, p in ((lost, p01 + drop), (won, p01), (samples - lost - won, rest))]
    best = float(p01[np.argmax(sum(terms))])
    return best + drop, best


def tail_at(lost: int, won: int, samples: int, drop: float, *, above: bool) -> float:
    """Mid-p tail of lost - won if the true drop is `drop`: a sum of scipy's binomials over the number lost."""
    p10, p01 = most_likely_rates(lost, won, samples, drop)
    b = np.arange(samples + 1)
    c = b - (lost - won)  # the number won that gives the observed difference
    left, rate = samples - b, min(1.0, p01 / (1 - p10)) if p10 < 1 else 0.0
    tail = binom.cdf(c - 1, left, rate) if above else binom.sf(c, left, rate)
    return float(np.sum(binom.pmf(b, samples, p10) * (tail + 0.5 * binom.pmf(c, left, rate))))


@pytest.mark.parametrize(
    ("lost", "won", "samples"),
    [(8, 5, 500), (30, 2, 500), (0, 9, 200), (14, 0, 1000), (3, 4, 10), (60, 55, 872), (5, 0, 5)],
    ids=str,
)
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_each_bound_is_where_the_tail_of_the_exact_law_is_half_of_alpha(
    lost: int, won: int, samples: int, confidence: float
) -> None:
    low, high = drop_interval(lost, won, samples, confidence=confidence)
    alpha = (1 - confidence) / 2
    if high < 1:
        assert tail_at(lost, won, samples, high, above=False) == pytest.approx(alpha, rel=1e-3)
    if low > -1:
        assert tail_at(lost, won, samples, low, above=True) == pytest.approx(alpha, rel=1e-3)


@pytest.mark.parametrize("samples", [1, 2, 10, 300, 50_000], ids=str)
def test_without_discordant_samples_the_bounds_have_a_closed_form(samples: int) -> None:
    # Nothing lost, nothing won: P(D = 0 | drop t) / 2 = (1 - t)^n / 2 = 0.025.
    low, high = drop_interval(0, 0, samples, confidence=0.95)
    assert high == pytest.approx(1 - 0.05 ** (1 / samples), rel=1e-6)
    assert low == -high


def test_all_lost_has_a_closed_form() -> None:
    low, high = drop_interval(20, 0, 20, confidence=0.95)
    assert high == 1
    # With nothing won the likelihood (t + p01)^n is largest where no sample agrees: p10 = (1 + t) / 2.
    assert ((1 + low) / 2) ** 20 / 2 == pytest.approx(0.025, rel=1e-6)


def enumerated_error_rates(samples: int, drop: float, won_rate: float) -> tuple[float, float]:
    """Exact probabilities that a model whose true drop *is* the limit fails, and that it passes."""
    rates = np.array([won_rate + drop, won_rate, 1 - drop - 2 * won_rate])
    most = [int(binom.ppf(1 - 1e-6, samples, rate)) + 1 for rate in rates[:2]]
    failed = passed = 0.0
    for lost, won in itertools.product(range(most[0] + 1), range(most[1] + 1)):
        if lost + won > samples:
            continue
        weight = float(multinomial.pmf([lost, won, samples - lost - won], samples, rates))
        if weight < 1e-7:
            continue
        outcome = judge_drop(lost, won, samples, 100 * drop).outcome
        failed += weight * (outcome == "fail")
        passed += weight * (outcome == "pass")
    return failed, passed


@pytest.mark.parametrize(
    ("samples", "drop", "won_rate"),
    [
        (100, 0.05, 0.0),
        (100, 0.01, 0.03),
        (100, 0.0, 0.02),
        (500, 0.005, 0.01),
        (500, 0.01, 0.0),
        (500, 0.01, 0.002),
        (500, 0.02, 0.002),
        (500, 0.05, 0.002),
    ],
    ids=str,
)
def test_a_model_exactly_at_the_limit_is_rarely_failed_and_rarely_passed(samples: int, drop: float, won_rate: float) -> None:
    # Nominal 5 % each. The conditional (McNemar) interval passes up to 74 % of these at a nominal 2.5 %.
    failed, passed = enumerated_error_rates(samples, drop, won_rate)
    assert 0.02 <= failed <= 0.07
    assert 0.02 <= passed <= 0.07


@pytest.mark.parametrize(
    ("samples", "drop", "won_rate"),
    [(500, 0.03, 0.01), (500, 0.0, 0.02), (1000, 0.01, 0.02), (5000, 0.005, 0.002)],
    ids=str,
)
def test_simulated_false_alarms_are_as_documented(samples: int, drop: float, won_rate: float) -> None:
    """A false alarm is a `fail` at a true drop equal to the limit: 5 % are documented, 2 to 7 % allowed, over 2000 trials."""
    assert samples * (drop + 2 * won_rate) >= 20  # discordant pairs expected
    rates = [drop + won_rate, won_rate, 1 - drop - 2 * won_rate]
    draws = np.random.default_rng(20).multinomial(samples, rates, size=2000)[:, :2]
    pairs, times = np.unique(draws, axis=0, return_counts=True)
    failed = np.array([judge_drop(int(b), int(c), samples, 100 * drop).outcome == "fail" for b, c in pairs])
    assert 0.02 <= float(times @ failed) / 2000 <= 0.07


def test_simulated_verdicts_far_from_the_limit_have_power() -> None:
    rng = np.random.default_rng(7)
    draws = rng.multinomial(5000, [0.02, 0.01, 0.97], size=60)  # a true drop of 1 point
    passed = sum(judge_drop(int(b), int(c), 5000, 2.0).outcome == "pass" for b, c, _ in draws)
    failed = sum(judge_drop(int(b), int(c), 5000, 0.2).outcome == "fail" for b, c, _ in draws)
    assert passed >= 57  # 4 standard errors away
    assert failed >= 50


@given(counts())
def test_the_interval_holds_the_estimate_and_stays_in_range(case: tuple[int, int, int]) -> None:
    lost, won, samples = case
    low, high = drop_interval(lost, won, samples)
    assert -1 <= low <= (lost - won) / samples <= high <= 1
    assert low < high


@given(counts())
def test_exchanging_the_models_mirrors_the_interval(case: tuple[int, int, int]) -> None:
    lost, won, samples = case
    low, high = drop_interval(lost, won, samples)
    assert drop_interval(won, lost, samples) == (-high, -low)


@given(counts(), st.floats(0, 100), st.floats(0, 100))
def test_a_looser_limit_never_turns_a_pass_into_less_nor_a_doubt_into_a_fail(
    case: tuple[int, int, int], one: float, other: float
) -> None:
    order = ["fail", "inconclusive", "pass"]
    tight, loose = (order.index(judge_drop(*case, limit).outcome) for limit in sorted((one, other)))
    assert tight <= loose


@given(counts())
def test_one_more_lost_sample_never_looks_better(case: tuple[int, int, int]) -> None:
    lost, won, samples = case
    if lost + won < samples:
        low, high = drop_interval(lost, won, samples)
        worse_low, worse_high = drop_interval(lost + 1, won, samples)
        assert worse_low >= low - 1e-9
        assert worse_high >= high - 1e-9


@given(counts())
def test_higher_confidence_is_wider(case: tuple[int, int, int]) -> None:
    low, high = drop_interval(*case, confidence=0.8)
    wide_low, wide_high = drop_interval(*case, confidence=0.99)
    assert wide_low <= low
    assert high <= wide_high


def test_identical_outputs_pass_any_limit() -> None:
    verdict = judge_drop(0, 0, 1, 0.0, identical=True)
    assert (verdict.outcome, verdict.low, verdict.high, verdict.samples_needed) == ("pass", 0, 0, None)
    assert "identical" in verdict.reason


def test_outcomes_and_their_words() -> None:
    passed = judge_drop(2, 2, 5000, 1.0)
    failed = judge_drop(20, 2, 500, 1.0)
    doubt = judge_drop(8, 5, 500, 1.0)
    assert [v.outcome for v in (passed, failed, doubt)] == ["pass", "fail", "inconclusive"]
    assert failed.drop_points == pytest.approx(3.6)
    assert failed.low > 1
    assert passed.high <= 1
    assert passed.samples_needed is failed.samples_needed is None
    assert doubt.samples_needed is not None
    assert doubt.samples_needed > 500
    assert f"{doubt.samples_needed} samples" in doubt.reason
    assert all("\n" not in v.reason for v in (passed, failed, doubt))
    assert doubt.as_json() == {
        "outcome": "inconclusive",
        "drop_points": doubt.drop_points,
        "low": doubt.low,
        "high": doubt.high,
        "confidence": 0.9,
        "samples": 500,
        "samples_needed": doubt.samples_needed,
        "reason": doubt.reason,
    }


@pytest.mark.parametrize(
    ("lost", "won", "samples", "limit"),
    [(8, 5, 500, 1.0), (2, 2, 500, 1.0), (0, 0, 100, 1.0), (30, 0, 500, 5.0), (1, 0, 1, 1.0)],
    ids=str,
)
def test_the_number_of_samples_asked_for_decides(lost: int, won: int, samples: int, limit: float) -> None:
    needed = samples_needed(lost, won, samples, limit)
    assert needed is not None

    def scaled(factor: float) -> str:
        n = math.ceil(needed * factor) if factor > 1 else math.floor(needed * factor)
        return judge_drop(round(lost * n / samples), round(won * n / samples), n, limit).outcome

    assert scaled(1.2) in ("pass", "fail")
    if needed > 1.5 * samples:
        assert scaled(0.8) == "inconclusive"


@pytest.mark.parametrize(
    ("lost", "won", "samples", "limit"),
    [(5, 0, 500, 1.0), (0, 0, 500, 0.0), (3, 3, 100, 0.0)],
    ids=["on-the-limit", "nothing-lost-limit-0", "balanced-limit-0"],
)
def test_no_number_of_samples_is_promised_where_none_can_decide(lost: int, won: int, samples: int, limit: float) -> None:
    verdict = judge_drop(lost, won, samples, limit)
    assert verdict.outcome == "inconclusive"
    assert verdict.samples_needed is None
    assert "another limit" in verdict.reason


def test_a_million_samples_are_no_trouble() -> None:
    low, high = drop_interval(9_000, 8_000, 1_000_000)
    width = 1.644854 * math.sqrt((17_000 - 1_000**2 / 1e6) / 1e12)  # the normal limit
    assert low == pytest.approx(0.001 - width, abs=0.01 * width)
    assert high == pytest.approx(0.001 + width, abs=0.01 * width)


@pytest.mark.parametrize(("lost", "won", "samples"), [(0, 0, 0), (-1, 0, 5), (0, -1, 5), (3, 3, 5)], ids=str)
def test_impossible_counts_are_refused(lost: int, won: int, samples: int) -> None:
    with pytest.raises(DataError, match="samples"):
        judge_drop(lost, won, samples, 1.0)


def test_identical_outputs_with_lost_samples_are_refused() -> None:
    with pytest.raises(DataError, match="identical"):
        judge_drop(1, 0, 5, 1.0, identical=True)


@pytest.mark.parametrize("limit", [-0.1, 100.1, math.nan, math.inf], ids=str)
def test_limits_out_of_range_are_refused(limit: float) -> None:
    with pytest.raises(InputError, match="--max-drop"):
        judge_drop(0, 0, 5, limit)


@pytest.mark.parametrize("confidence", [0.4, 1.0, math.nan], ids=str)
def test_confidence_out_of_range_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence"):
        judge_drop(0, 0, 5, 1.0, confidence=confidence)
