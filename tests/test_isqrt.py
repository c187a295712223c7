"""The integer square root against math.isqrt, and its number of steps in fractions."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import roots as numbers
from kernel_models import assert_lowered_equals_reference, assert_other_evaluators_agree, element_types
from onnx import TensorProto
from runtime_marks import needs_empty_products

from qcompile.kernels.isqrt import STEPS, ISqrt, integer_root, start

WIDTHS = pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])


@WIDTHS
def test_reference_is_the_exact_floor(wide: bool) -> None:
    n = numbers(wide)
    assert ISqrt(wide).reference(n).tolist() == [isqrt(v) for v in n.tolist()]


@given(st.integers(0, 2**63 - 1))
def test_reference_is_the_exact_floor_everywhere(n: int) -> None:
    assert int(integer_root(np.asarray(n))) == isqrt(n)


@WIDTHS
@pytest.mark.parametrize(
    "shape", [(-1,), (-1, 1), (), pytest.param((0, 1), marks=needs_empty_products)], ids=["vector", "column", "scalar", "empty"]
)
def test_lowered_equals_reference(wide: bool, shape: tuple[int, ...]) -> None:
    n = numbers(wide)
    n = n[-1:].reshape(()) if shape == () else n[:0].reshape(shape) if 0 in shape else n.reshape(shape)
    assert_lowered_equals_reference(ISqrt(wide), n)


@WIDTHS
def test_other_evaluators_agree(wide: bool) -> None:
    assert_other_evaluators_agree(ISqrt(wide), numbers(wide)[::97])


@WIDTHS
def test_number_of_steps_is_proven_for_every_size_of_n(wide: bool) -> None:
    """For 2^k <= n < 2^(k+1): the excess a = x - sqrt n starts at most at x0 - sqrt 2^k, and a^2 / 2x <= a^2 / (2 sqrt n)."""
    for k in range(63 if wide else 31):
        least = Fraction(isqrt(2**k * 2**80), 2**40)  # sqrt 2^k from below, to 40 bits
        assert start(k) ** 2 >= 2 ** (k + 1) > 2**k
        excess = start(k) - least
        for _ in range(STEPS[wide]):
            excess = excess * excess / (2 * (least + excess))
        assert excess < 1


@WIDTHS
def test_one_step_less_would_not_do(wide: bool) -> None:
    """The proof is not slack: with one step less there is an n whose x is beyond floor + 1, where the correction fails."""
    n = 2 ** (62 if wide else 30)
    x = start(62 if wide else 30)
    for _ in range(STEPS[wide] - 1):
        x = (x + n // x) // 2
    assert x > isqrt(n) + 1


def test_integers_alone() -> None:
    for wide in (False, True):
        kinds = element_types(ISqrt(wide), numbers(wide)[:4])
        assert kinds <= {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}


def test_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="-4 is negative"):
        ISqrt().reference(np.array([3, -4], np.int32))
