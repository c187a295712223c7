"""i-GELU: the published error, the choice of the rounded constants, both tails, the arithmetic against fractions."""

from __future__ import annotations

from fractions import Fraction
from math import log, pi, sqrt

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.kernels import IGelu
from qcompile.kernels.igelu import polynomial_gelu

SCALES = [2.0**-13, *np.exp(np.linspace(log(2.0**-13), log(0.1), 400)[1:-1]).tolist(), 0.1, float(np.float32(0.1))]


def exact(x: np.ndarray) -> np.ndarray:
    return x / 2 * scipy.special.erfc(-x / sqrt(2))


def test_the_polynomial_in_float64() -> None:
    """I-BERT says 1.8e-2; its printed coefficients give 1.815e-2."""
    x = np.linspace(-8, 8, 1_600_001)
    assert 1.80e-2 < np.abs(polynomial_gelu(x) - exact(x)).max() <= 1.82e-2


def test_every_scale_is_within_the_tolerance() -> None:
    """At most 2.0e-2 wherever S <= .1, for all q of +-8 (a few thousand of them where there are more)."""
    worst = 0.0
    for scale in SCALES:
        kernel = IGelu(scale)
        q = np.unique(np.linspace(-8 / scale, 8 / scale, 6000).astype(np.int32))
        worst = max(worst, float(np.abs(kernel.real(kernel.reference(q)) - exact(q * scale)).max()))
    assert 1.8e-2 < worst <= 1.90e-2


def test_the_tanh_form_maps_here_too() -> None:
    x = np.linspace(-8, 8, 100_001)
    tanh = x / 2 * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    assert np.abs(tanh - exact(x)).max() < 4.8e-4
    for scale in SCALES[::8]:
        kernel = IGelu(scale, tanh=True)
        q = np.unique(np.linspace(-8 / scale, 8 / scale, 6000).astype(np.int32))
        real = kernel.real(kernel.reference(q))
        assert np.abs(real - np.interp(q * scale, x, tanh)).max() <= kernel.tolerance
        np.testing.assert_allclose(kernel.oracle(q), np.interp(q * scale, x, tanh), atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-13, 1e-3, 0.0037, 0.00375, 0.05, 0.1], ids=str)
def test_the_tails_are_exact(scale: float) -> None:
    """0 below -2.6, x above 2.6 up to where the output saturates, which is at 8 or more."""
    kernel = IGelu(scale)
    highest = kernel.attributes()["highest"]
    assert highest * scale >= 8
    edge = round(2.6 / scale)
    q = np.unique(np.linspace(edge, highest, 5000).astype(np.int64)).astype(np.int32)
    one = round(scale / kernel.output_scale)  # steps of the output for one of the input
    np.testing.assert_allclose(one * kernel.output_scale, scale, rtol=1e-12)
    np.testing.assert_array_equal(kernel.reference(q), q.astype(np.int64) * one)
    assert not kernel.reference(-q).any()
    beyond = np.array([highest + 1, 2**31 - 1]) if highest < 2**31 - 1 else np.array([2**31 - 1])
    np.testing.assert_array_equal(kernel.reference(beyond.astype(np.int32)), highest * one)
    assert kernel.reference(np.array([-(2**31), 0], np.int32)).tolist() == [0, 0]


def test_nothing_overflows_at_any_scale() -> None:
    """The bounds that the comments of the module claim, over the whole domain of scales."""
    for scale in SCALES:
        kernel = IGelu(scale)
        found = kernel.attributes()
        b, c, highest, step = found["b"], found["c"], found["highest"], found.get("step", 1)
        assert b * b < c and 2 * c < 2**31 and b <= highest
        assert highest * (2 * c // step) < 2**31
        assert (2 * c) % step == 0 and step & (step - 1) == 0
        assert (step == 1) == (kernel.name == "IGelu")


@settings(max_examples=400, deadline=None)
@given(st.floats(2.0**-13, 0.1), st.integers(-(2**31), 2**31 - 1) | st.integers(-30000, 30000))
def test_against_fractions(scale: float, q: int) -> None:
    """q / 2 (1 + erf) with erf = sgn (1 - (min(|q|, B) - B)^2 / C) in exact fractions, floored to `step` once."""
    kernel = IGelu(scale)
    found = kernel.attributes()
    b, c, step = Fraction(found["b"]), Fraction(found["c"]), found.get("step", 1)
    q_in = min(q, found["highest"])
    sign = (q_in > 0) - (q_in < 0)
    erf = sign * (1 - (min(abs(q_in), b) - b) ** 2 / c)
    assert kernel.reference(np.array([q], np.int32))[0] == q_in * ((1 + erf) * c / step // 1)


@pytest.mark.parametrize("scale", [0.0, -0.05, 2.0**-14, 0.1001, float("inf"), float("nan")], ids=str)
def test_scales_outside_the_domain_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"i-GELU: input scale {scale:g} is outside 0\.00012207\.\.0\.1: use a table"):
        IGelu(scale)
