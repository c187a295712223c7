"""The verdict on an agreement limit: its interval against sums of binomial probabilities in fractions."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.agreement import agreement_interval, judge_agreement
from qcompile.errors import DataError, InputError


def mid_p(count: int, samples: int, share: float) -> float:
    """P(K < count) + P(K = count) / 2, exactly."""
    p = Fraction(share)
    terms = [comb(samples, k) * p**k * (1 - p) ** (samples - k) for k in range(count + 1)]
    return float(sum(terms[:-1]) + terms[-1] / 2)


@given(samples=st.integers(1, 80), data=st.data())
def test_the_interval_inverts_the_mid_p_test(samples: int, data: st.DataObject) -> None:
    agreed = data.draw(st.integers(0, samples))
    low, high = agreement_interval(agreed, samples)
    assert 0 <= low <= agreed / samples <= high <= 1
    if agreed == 0:
        assert low == 0
    else:  # P(K > agreed) + P(K = agreed) / 2 at the lower end
        assert 1 - mid_p(agreed, samples, low) == pytest.approx(0.05, abs=1e-9)
    if agreed == samples:
        assert high == 1
    else:
        assert mid_p(agreed, samples, high) == pytest.approx(0.05, abs=1e-9)


def test_many_samples_do_not_underflow() -> None:
    low, high = agreement_interval(199_000, 200_000)
    assert 0.9946 < low < 0.995 < high < 0.9954


@pytest.mark.parametrize(
    ("agreed", "samples", "least", "outcome"),
    [
        pytest.param(1000, 1000, 0.99, "pass", id="all-of-many"),
        pytest.param(999, 1000, 0.99, "pass", id="most"),
        pytest.param(950, 1000, 0.99, "fail", id="too-few-agree"),
        pytest.param(988, 1000, 0.99, "inconclusive", id="just-below"),
        pytest.param(20, 20, 0.99, "inconclusive", id="few-samples"),
        pytest.param(0, 50, 0.5, "fail", id="none"),
    ],
)
def test_outcomes(agreed: int, samples: int, least: float, outcome: str) -> None:
    verdict = judge_agreement(agreed, samples, least)
    assert verdict.outcome == outcome
    assert verdict.samples == samples
    assert verdict.as_json()["agreement"] == agreed / samples
    assert (verdict.samples_needed is not None) == (outcome == "inconclusive")
    if verdict.samples_needed is not None:
        assert verdict.samples_needed > samples
        assert f"about {verdict.samples_needed} samples" in verdict.reason
        more = judge_agreement(round(agreed / samples * 2 * verdict.samples_needed), 2 * verdict.samples_needed, least)
        assert more.outcome != "inconclusive"


def test_no_number_of_samples_decides_a_share_that_is_the_limit() -> None:
    verdict = judge_agreement(90, 100, 0.9)
    assert (verdict.outcome, verdict.samples_needed) == ("inconclusive", None)
    assert "choose another limit" in verdict.reason


def test_a_limit_of_one_is_never_proven() -> None:
    assert judge_agreement(50, 50, 1.0).samples_needed is None
    assert judge_agreement(49, 50, 1.0).outcome == "fail"


def test_identical_outputs_pass_on_one_sample() -> None:
    assert judge_agreement(1, 1, 1.0, identical=True).outcome == "pass"
    assert judge_agreement(1, 1, 1.0).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("agreed", "samples", "least", "error"),
    [
        pytest.param(0, 0, 0.9, DataError, id="no-samples"),
        pytest.param(3, 2, 0.9, DataError, id="more-than-all"),
        pytest.param(1, 2, 0.0, InputError, id="limit-zero"),
        pytest.param(1, 2, 1.1, InputError, id="limit-above-one"),
    ],
)
def test_bad_arguments(agreed: int, samples: int, least: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        judge_agreement(agreed, samples, least)
