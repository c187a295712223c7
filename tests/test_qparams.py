"""Scales, the dyadic grid and the pair rule, against exact fractions and brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.graph import Array
from qcompile.qparams import ACTIVATIONS, QuantisedWeight, activation_params, exact_weight_scale, quantise_weight, round_pairs

U8 = ACTIVATIONS["any"]
scales = st.floats(min_value=2.0**-20, max_value=2.0**6, width=32)
seeds = st.integers(min_value=0, max_value=2**32 - 1)


def multiplier(input_scale: np.float32, weight_scale: Array, output_scale: np.float32) -> Array:
    """fl(fl(Sx*Sw)/Sy), each step one float32 operation."""
    product = np.multiply(np.float32(input_scale), weight_scale.astype(np.float32), dtype=np.float32)
    return np.divide(product, np.float32(output_scale), dtype=np.float32)


# ---- activation_params ----
@given(
    low=st.floats(min_value=-1e6, max_value=1e6),
    high=st.floats(min_value=-1e6, max_value=1e6),
    kind=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_a_range_is_covered_and_zero_is_exact(low: float, high: float, kind: str) -> None:
    low, high = min(low, high), max(low, high)
    chosen = ACTIVATIONS[kind]
    scale, zero = activation_params(low, high, chosen)
    assert scale.dtype == np.float32
    assert scale > 0
    assert chosen.low <= zero <= chosen.high
    step = Fraction(float(scale))
    # The zero point rounds, so either end may lie up to half a step outside what the integers reach.
    reach = [(Fraction(end) - zero) * step for end in (chosen.low, chosen.high)]
    slack = step * Fraction(502, 1000) + Fraction(2.0**-60)
    assert reach[0] - slack <= Fraction(min(low, 0.0))
    assert Fraction(max(high, 0.0)) <= reach[1] + slack
    if chosen.symmetric:
        assert zero == 0


@pytest.mark.parametrize(
    ("low", "high", "kind", "expected"),
    [
        pytest.param(0.0, 0.0, "any", (1.0, 0), id="dead-u8"),
        pytest.param(0.0, 0.0, "arm", (1.0, -128), id="dead-s8"),
        pytest.param(0.0, 0.0, "tensorrt", (1.0, 0), id="dead-symmetric"),
        pytest.param(0.0, 255.0, "any", (1.0, 0), id="relu-u8"),
        pytest.param(0.0, 255.0, "arm", (1.0, -128), id="relu-s8"),
        pytest.param(-127.0, 3.0, "tensorrt", (1.0, 0), id="symmetric-by-low"),
        pytest.param(2.0, 255.0, "any", (1.0, 0), id="widened-down-to-zero"),
        pytest.param(-255.0, -2.0, "any", (1.0, 255), id="widened-up-to-zero"),
        pytest.param(-128.0, 127.0, "any", (1.0, 128), id="signed-u8"),
        pytest.param(0.0, 1e-30, "any", (2.0**-60, 0), id="least-scale"),
    ],
)
def test_known_parameters(low: float, high: float, kind: str, expected: tuple[float, int]) -> None:
    scale, zero = activation_params(low, high, ACTIVATIONS[kind])
    assert (float(scale), zero) == expected


# ---- exact_weight_scale ----
@given(input_scale=scales, output_scale=scales, seed=seeds)
def test_a_scale_that_is_found_is_exactly_dyadic(input_scale: float, output_scale: float, seed: int) -> None:
    b = np.random.default_rng(seed).integers(1, 2**24, 64)
    x, y = np.float32(input_scale), np.float32(output_scale)
    found = exact_weight_scale(b, x, y)
    good = ~np.isnan(found)
    assert good.any()
    for got, numerator in zip(multiplier(x, found[good], y).tolist(), b[good].tolist(), strict=True):
        assert Fraction(got) == Fraction(numerator, 2**16)
    start = (b.astype(np.float64) / 2**16 * float(y) / float(x)).astype(np.float32)
    neighbours = [start]
    for direction in (np.inf, 0.0):
        candidate = start
        for _ in range(2):
            candidate = np.nextafter(candidate, np.float32(direction))
            neighbours.append(candidate)
    hit = np.any([multiplier(x, c, y).astype(np.float64) == b / 2.0**16 for c in neighbours], axis=0)
    np.testing.assert_array_equal(good, hit)  # NaN only where none of the neighbours works


def test_the_scale_lies_within_two_neighbours_of_the_quotient() -> None:
    x, y, b = np.float32(0.0173), np.float32(0.0421), np.arange(1, 5000)
    found = exact_weight_scale(b, x, y)
    good = ~np.isnan(found)
    wanted = b[good] / 2.0**16 * float(y) / float(x)
    assert good.mean() > 0.5
    np.testing.assert_allclose(found[good], wanted, rtol=3 * 2.0**-23)


# ---- round_pairs ----
@settings(max_examples=60, deadline=None)
@given(seed=seeds, width=st.integers(1, 9), spread=st.sampled_from([1.0, 60.0, 70.0, 130.0, 400.0]))
def test_pairs_obey_the_rule_and_are_the_nearest_that_do(seed: int, width: int, spread: float) -> None:
    target = np.random.default_rng(seed).normal(size=(8, width)) * spread
    q = round_pairs(target)
    check_limits(q, pair_rule=True)
    for row in range(8):
        for column in range(0, width // 2 * 2, 2):
            np.testing.assert_allclose(
                np.square(target[row, column : column + 2] - q[row, column : column + 2]).sum(),
                nearest_pair_error(target[row, column], target[row, column + 1]),
                rtol=1e-12,
                atol=1e-12,
            )
    if width % 2:
        np.testing.assert_array_equal(q[:, -1], np.clip(np.rint(target[:, -1]), -127, 127))


def nearest_pair_error(first: float, second: float) -> float:
    """The least squared error of all pairs that the rule allows."""
    a, b = np.meshgrid(np.arange(-127, 128), np.arange(-127, 128), indexing="ij")
    allowed = (a * b <= 0) | (np.abs(a + b) <= 128)
    return float(np.where(allowed, (a - first) ** 2 + (b - second) ** 2, np.inf).min())


def test_a_smaller_limit_against_brute_force() -> None:
    grid = np.linspace(-5, 5, 41)
    target = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    q = round_pairs(target, limit=4, top=3)
    a, b = np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij")
    allowed = (a * b <= 0) | (np.abs(a + b) <= 4)
    pairs = np.stack([a[allowed], b[allowed]], axis=1)
    best = np.square(target[:, None] - pairs[None]).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(np.square(target - q).sum(axis=1), best, atol=1e-12)


# ---- quantise_weight ----
def check_limits(q: Array, pair_rule: bool) -> None:
    assert np.abs(q).max(initial=0) <= 127
    if pair_rule:
        even = q.shape[-1] // 2 * 2
        a, b = q[..., 0:even:2].astype(int), q[..., 1:even:2].astype(int)
        assert (np.abs(a + b)[a * b > 0] <= 128).all()


def squared_error(weight: Array, result: QuantisedWeight) -> Array:
    return np.square(weight.astype(np.float64) - result.values * result.scale[:, None].astype(np.float64)).sum(axis=1)


def adversarial(kind: str, rng: np.random.Generator, channels: int, width: int) -> Array:
    rows = {
        "normal": lambda: rng.normal(size=(channels, width)),
        "equal": lambda: np.full((channels, width), 127.0),
        "negative": lambda: np.full((channels, width), -0.3),
        "outlier": lambda: np.where(np.arange(width) == 0, 1000.0, rng.normal(size=(channels, width))),
        "alternating": lambda: np.where(np.arange(width) % 2, -1.0, 1.0) * np.ones((channels, 1)),
        "integers": lambda: rng.integers(-64, 65, (channels, width)).astype(float),
        "tiny": lambda: rng.normal(size=(channels, width)) * 1e-20,
        "dead": lambda: np.zeros((channels, width)),
        "mixed": lambda: rng.normal(size=(channels, width)) * 10.0 ** rng.integers(-6, 3, (channels, 1)),
    }
    return np.asarray(rows[kind](), np.float32)


KINDS = ["normal", "equal", "negative", "outlier", "alternating", "integers", "tiny", "dead", "mixed"]


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=seeds,
    width=st.integers(1, 17),
    pair_rule=st.booleans(),
    free=st.booleans(),
    input_scale=scales,
    output_scale=scales,
)
def test_weights_are_within_every_limit(
    kind: str, seed: int, width: int, pair_rule: bool, free: bool, input_scale: float, output_scale: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = adversarial(kind, rng, 3, width)
    x, y = np.float32(input_scale), None if free else np.float32(output_scale)
    # A bias as large as a real output range allows: the output's 255 steps, or any at all where it stays float.
    bias = rng.normal(size=3) * (100.0 if y is None else 60 * float(y))
    result = quantise_weight(weight, x, y, pair_rule=pair_rule, bias=bias)
    check_limits(result.values, pair_rule)
    assert result.values.dtype == np.int8
    assert result.scale.dtype == np.float32
    assert (result.scale > 0).all() and np.isfinite(result.scale).all()
    step = np.multiply(x, result.scale, dtype=np.float32).astype(np.float64)
    assert (step >= 2.0**-126).all(), "the bias scale is no normal float32 number"
    accumulator = 255 * np.abs(result.values.astype(np.int64)).sum(axis=1) + np.abs(np.rint(bias / step))
    assert (accumulator < 2**31).all()
    if y is None:
        assert result.b is None
    else:
        assert result.b is not None
        assert ((result.b >= 1) & (result.b < 2**24)).all()
        np.testing.assert_array_equal(multiplier(x, result.scale, y).astype(np.float64), result.b / 2.0**16)


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from([k for k in KINDS if k != "tiny"]), seed=seeds, width=st.integers(1, 16))
def test_the_pair_rule_never_does_worse_than_seven_bit_weights(kind: str, seed: int, width: int) -> None:
    weight = adversarial(kind, np.random.default_rng(seed), 3, width)
    result = quantise_weight(weight, np.float32(0.02), None, pair_rule=True)
    step = (np.maximum(np.abs(weight).max(axis=1), 1e-30) / 64).astype(np.float32)[:, None].astype(np.float64)
    plain = np.square(weight - np.clip(np.rint(weight / step), -64, 64) * step).sum(axis=1)
    # Float32 scales move an error of zero to 2^-24 of each weight.
    rounding = (2.0**-23 * np.abs(weight.astype(np.float64))).sum(axis=1) ** 2
    assert (squared_error(weight, result) <= plain * (1 + 1e-6) + rounding + 1e-60).all()


def test_the_pair_rule_costs_nothing_where_it_does_not_bind() -> None:
    weight = np.where(np.arange(64) % 2, -1.0, 1.0)[None] * np.random.default_rng(0).uniform(0.1, 1, (4, 64))
    bound, free = (quantise_weight(weight, np.float32(0.02), None, pair_rule=rule) for rule in (True, False))
    assert (squared_error(weight, bound) <= squared_error(weight, free) * 1.3).all()


def test_the_dyadic_grid_costs_little() -> None:
    """DESIGN section 3: where b is large the grid is fine; the error stays within a few per cent of free scales."""
    weight = np.random.default_rng(1).normal(size=(16, 144))
    free = squared_error(weight, quantise_weight(weight, np.float32(0.02), None, pair_rule=True)).sum()
    grid = squared_error(weight, quantise_weight(weight, np.float32(0.02), np.float32(0.1), pair_rule=True)).sum()
    assert grid <= free * 1.05


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(8, 32))
    weight[:, 0] *= 8
    importance = np.tile(np.where(np.arange(32) == 0, 1e-6, 1.0), (8, 1))
    plain = quantise_weight(weight, np.float32(0.02), None, pair_rule=False)
    weighted = quantise_weight(weight, np.float32(0.02), None, pair_rule=False, importance=importance)

    def error(result: QuantisedWeight) -> float:
        difference = weight - result.values * result.scale[:, None].astype(np.float64)
        return float((importance * np.square(difference)).sum())

    assert error(weighted) < error(plain)


def test_four_bit_weights() -> None:
    weight = np.random.default_rng(3).normal(size=(4, 33))
    result = quantise_weight(weight, np.float32(0.02), np.float32(0.1), pair_rule=False, top=7)
    assert np.abs(result.values).max() == 7


def test_huge_biases_widen_the_scale_of_a_near_dead_channel() -> None:
    weight = np.array([[1e-9, -1e-9], [1.0, -1.0]])
    bias = np.array([1000.0, 1000.0])
    result = quantise_weight(weight, np.float32(0.01), None, pair_rule=True, bias=bias)
    reach = np.abs(bias) / (0.01 * result.scale) + 255 * np.abs(result.values.astype(int)).sum(axis=1)
    assert (reach < 2**30).all()
    assert (result.values[0] == 0).all()
    assert result.values[1].any()


def test_a_very_wide_row_keeps_the_accumulator_in_int32() -> None:
    weight = np.ones((1, 100_000), np.float32)
    result = quantise_weight(weight, np.float32(0.01), None, pair_rule=False)
    assert 255 * int(np.abs(result.values.astype(np.int64)).sum()) < 2**31
    assert 255 * 127 * 100_000 > 2**31  # so the bound did something


def test_the_same_weights_give_the_same_bytes() -> None:
    weight = np.random.default_rng(4).normal(size=(8, 27)).astype(np.float32)
    first, second = (quantise_weight(weight.copy(), np.float32(0.013), np.float32(0.07), pair_rule=True) for _ in range(2))
    assert first.values.tobytes() == second.values.tobytes()
    assert first.scale.tobytes() == second.scale.tobytes()


def test_no_weight_is_lost_without_a_word() -> None:
    with pytest.raises(ValueError, match=r"channel 1: .*not finite"):
        quantise_weight(np.array([[1.0, 2.0], [np.nan, 1.0]]), np.float32(0.01), None, pair_rule=True)


def test_a_channel_without_an_exact_scale_is_named() -> None:
    # The weight scale would have to be 1e60, beyond float32.
    with pytest.raises(ValueError, match=r"channel 0: no float32 weight scale"):
        quantise_weight(np.ones((1, 4)), np.float32(1e-30), np.float32(1e30), pair_rule=True)
