"""Division by the row sum: against fractions, its bounds, a masked row, a whole attention, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.kernels import INormalise, TableExp


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 8192), st.data())
def test_against_fractions(longest: int, data: st.DataObject) -> None:
    kernel = INormalise(0.01, longest=longest)
    total = data.draw(st.integers(1, 255 * longest))
    context = data.draw(st.integers(-255 * total, 255 * total))
    got = kernel.reference(np.array([[context]], np.int32), np.array([[total]], np.int32))[0, 0]
    exact = Fraction(context * kernel.multiplier, total)
    assert got == int(exact)  # towards 0


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 8192), st.data())
def test_rows_of_any_length(longest: int, data: st.DataObject) -> None:
    """Up to `longest` the same integers; beyond, within m / longest of a step more, and nothing leaves int32."""
    kernel = INormalise(0.01, longest=longest, any_length=True)
    room, m = kernel.room, kernel.multiplier
    total = data.draw(st.integers(1, room * m - 1))
    context = data.draw(st.integers(-255 * total, 255 * total))
    given_ = np.array([[context]], np.int64), np.array([[total]], np.int64)
    got = kernel.reference(*given_)[0, 0]
    exact = Fraction(context * m, total)
    if total < room:
        assert got == int(exact)
    assert abs(got - exact) < 1 + Fraction(255 * m, room - 2)
    by = m // (total // room + 1)
    assert by >= 1 and abs(context) * by < 2**31 and total * by + m // 2 < 2**31


def test_the_multiplier_is_the_largest_power_of_two_that_fits() -> None:
    for longest in range(1, 8193):
        kernel = INormalise(1.0, longest=longest)
        m, most = kernel.multiplier, 255 * longest
        assert m >= 4 and m & (m - 1) == 0
        assert most * 255 * m < 2**31
        assert m == 128 or most * 255 * 2 * m >= 2**31


def test_a_masked_row_is_zero() -> None:
    for kernel in (INormalise(0.01), INormalise(0.01, any_length=True)):
        assert kernel.reference(np.zeros((1, 3), np.int32), np.zeros((1, 1), np.int32)).tolist() == [[0, 0, 0]]


def test_a_whole_attention() -> None:
    """exp by table, times v, divided: against float64 softmax times v, within what 8-bit exponentials allow."""
    rng = np.random.default_rng(0)
    scores = np.rint(rng.normal(0, 2, (64, 40)) / 3e-4).astype(np.int32)
    v = rng.integers(-127, 128, (40, 16))
    e = TableExp(3e-4).reference(scores).astype(np.int64)
    kernel = INormalise(0.02, longest=40)
    got = kernel.real(kernel.reference((e @ v).astype(np.int32), e.sum(-1, keepdims=True).astype(np.int32)))
    p = np.exp(scores * 3e-4 - (scores * 3e-4).max(-1, keepdims=True))
    exact = (p / p.sum(-1, keepdims=True)) @ (v * 0.02)
    assert np.abs(got - exact).max() <= 0.02 * 127 * 2 * 40 * 0.5 / e.sum(-1).min()
    assert 20 * np.log10(np.abs(exact).std() / (got - exact).std()) > 35


@pytest.mark.parametrize("longest", [0, 8193], ids=str)
def test_rows_outside_the_domain_are_refused(longest: int) -> None:
    with pytest.raises(ValueError, match=rf"normalisation: longest row {longest} is outside 1\.\.8192"):
        INormalise(0.1, longest=longest)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_scales_outside_the_domain_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"normalisation: scale of v {scale:g} is outside"):
        INormalise(scale)
