"""Convolution, pooling and products of integers in numpy: parts, bounds, and windows that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.errors import ModelError
from qcompile.integer_windows import Window, convolve, exact_matmul, max_pool


def test_large_convolution_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """im2col cut into rows gives the same as in one piece."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-255, 256, (2, 6, 11, 10)), rng.integers(-127, 128, (4, 3, 3, 2))
    attributes = {"strides": [2, 1], "pads": [1, 0, 2, 1]}
    window = Window.from_attributes(attributes, (3, 2), (11, 10))
    whole = convolve(x, w, window, 2)
    monkeypatch.setattr("qcompile.integer_windows._IM2COL_BYTES", 1)
    assert np.array_equal(convolve(x, w, window, 2), whole)


def test_exact_matmul_in_both_ranges() -> None:
    rng = np.random.default_rng(0)
    for limit in (2**20, 2**29):  # float64 product, then int64 product
        a, b = rng.integers(-limit, limit, (3, 4, 5)), rng.integers(-limit, limit, (3, 5, 6))
        assert np.array_equal(exact_matmul(a, b), np.matmul(a.astype(object), b.astype(object)).astype(np.int64))
    with pytest.raises(ModelError, match="beyond int64"):
        exact_matmul(np.full((1, 4), 2**31), np.full((4, 1), 2**31))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({}, "does not fit"), ({"pads": [-1, 0, 0, 0]}, "negative pads")],
    ids=["too-large", "negative"],
)
def test_windows_that_do_not_fit(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Window.from_attributes(attributes, (9, 9), (4, 4))


def test_convolution_checks() -> None:
    window = Window.from_attributes({}, (1, 1), (2, 2))
    with pytest.raises(ModelError, match="do not fit 3 input channels"):
        convolve(np.zeros((1, 3, 2, 2), int), np.zeros((2, 2, 1, 1), int), window)
    with pytest.raises(ModelError, match="beyond 2"):
        convolve(np.full((1, 1, 2, 2), 2**31), np.full((1, 1, 1, 1), 2**31), window)


def test_max_pool_padding_never_wins() -> None:
    x = np.full((1, 1, 2, 2), -128, np.int8)
    window = Window.from_attributes({"pads": [1, 1, 1, 1]}, (2, 2), (2, 2))
    assert np.array_equal(max_pool(x, window), np.full((1, 1, 3, 3), -128))
