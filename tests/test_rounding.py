"""Second-order rounding: never worse than round to nearest on the moment, near the optimum where that can be enumerated."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.graph import Array
from qcompile.qparams import round_pairs
from qcompile.rounding import second_order_round

seeds = st.integers(0, 2**32 - 1)


def start_of(weight: Array, scale: Array, pair_rule: bool, top: int = 127) -> Array:
    target = weight.astype(np.float64) / scale[..., None]
    return (round_pairs(target, top=top) if pair_rule else np.clip(np.rint(target), -top, top)).astype(np.int8)


def error(weight: Array, scale: Array, q: Array, moment: Array) -> Array:
    """e H e^T of each channel, in float64, written as the mean of squares over a factor of H where it has one."""
    e = weight.astype(np.float64) - q.astype(np.float64) * scale[..., None].astype(np.float64)
    return np.einsum("gck,gkl,gcl->gc", e, moment, e)


def layer(seed: int, groups: int, channels: int, width: int, rows: int, spread: float = 1.0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(groups, channels, width)).astype(np.float32) * spread
    scale = (np.abs(weight).max(axis=2) / rng.uniform(20, 127)).astype(np.float32)
    x = rng.normal(size=(groups, rows, width)) @ rng.normal(size=(groups, width, width))
    return weight, scale, np.matmul(np.swapaxes(x, 1, 2), x) / rows


def check_pairs(q: Array) -> None:
    even = q.shape[-1] // 2 * 2
    a, b = q[..., 0:even:2].astype(int), q[..., 1:even:2].astype(int)
    assert (np.abs(a + b)[a * b > 0] <= 128).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    groups=st.integers(1, 3),
    channels=st.integers(1, 5),
    width=st.integers(1, 12),
    rows=st.sampled_from([1, 2, 5, 400]),
    pair_rule=st.booleans(),
)
def test_never_worse_and_within_the_rules(seed: int, groups: int, channels: int, width: int, rows: int, pair_rule: bool) -> None:
    weight, scale, moment = layer(seed, groups, channels, width, rows)
    start = start_of(weight, scale, pair_rule)
    q = second_order_round(weight, scale, moment, start, pair_rule=pair_rule)
    assert q.dtype == np.int8 and q.shape == weight.shape
    assert np.abs(q.astype(int)).max() <= 127
    if pair_rule:
        check_pairs(q)
    before, after = (error(weight, scale, r, moment) for r in (start, q))
    assert (after <= before * (1 + 1e-9) + 1e-15).all()


@pytest.mark.parametrize("width", [16, 64, 65, 200])
@pytest.mark.parametrize("pair_rule", [False, True])
def test_a_real_gain_on_correlated_inputs_across_blocks(width: int, pair_rule: bool) -> None:
    """Widths about the block size of 64: the updates between blocks count too."""
    rng = np.random.default_rng(width)
    weight = rng.normal(size=(1, 16, width)).astype(np.float32)
    scale = (np.abs(weight).max(axis=2) / 15).astype(np.float32)
    common = rng.normal(size=(4000, 1)) * 3 + rng.normal(size=(4000, width))
    moment = np.cov(common, rowvar=False)[None]
    start = start_of(weight, scale, pair_rule)
    q = second_order_round(weight, scale, moment, start, pair_rule=pair_rule)
    assert error(weight, scale, q, moment).sum() < 0.7 * error(weight, scale, start, moment).sum()


@pytest.mark.parametrize("pair_rule", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_close_to_the_enumerated_optimum(width: int, pair_rule: bool) -> None:
    """All integers near the target are tried: the error summed over 60 layers is within half of their optimum."""
    reached = best = nearest = 0.0
    reach = 3 if width == 4 else 5
    for seed in range(60):
        weight, scale, moment = layer(seed, 1, 1, width, 50)
        start = start_of(weight, scale, pair_rule)
        q = second_order_round(weight, scale, moment, start, pair_rule=pair_rule, damping=1e-6)
        base = np.rint(weight[0, 0] / scale[0, 0]).astype(int)
        candidates = np.array(list(product(*(range(b - reach, b + reach + 1) for b in base))))
        candidates = candidates[(np.abs(candidates) <= 127).all(axis=1)]
        if pair_rule:
            a, b = candidates[:, 0], candidates[:, 1]
            keep = (a * b <= 0) | (np.abs(a + b) <= 128)
            if width == 4:
                c, d = candidates[:, 2], candidates[:, 3]
                keep &= (c * d <= 0) | (np.abs(c + d) <= 128)
            candidates = candidates[keep]
        e = weight[0, 0].astype(np.float64) - candidates * float(scale[0, 0])
        best += float(np.einsum("nk,kl,nl->n", e, moment[0], e).min()) if len(candidates) else 0.0
        reached += float(error(weight, scale, q, moment)[0, 0]) if len(candidates) else 0.0
        nearest += float(error(weight, scale, start, moment)[0, 0]) if len(candidates) else 0.0
    assert reached < 1.5 * best
    assert reached < 0.9 * nearest


def test_uncorrelated_inputs_leave_round_to_nearest() -> None:
    weight, scale, _ = layer(0, 1, 4, 9, 10)
    start = start_of(weight, scale, False)
    moment = np.diag(np.arange(1.0, 10.0))[None]
    np.testing.assert_array_equal(second_order_round(weight, scale, moment, start, pair_rule=False), start)


def zero_moment(width: int) -> Array:
    return np.zeros((width, width))


def rank_one(width: int) -> Array:
    x = np.random.default_rng(3).normal(size=(1, width))
    return x.T @ x


def noise_of_one_sample(width: int) -> Array:
    """A covariance that is zero but for float32 rounding, of either sign."""
    x = np.random.default_rng(4).normal(size=width) * 100
    return np.outer(x, x).astype(np.float32).astype(np.float64) - np.outer(x, x)


def one_live_column(width: int) -> Array:
    made = np.zeros((width, width))
    made[1, 1] = 5.0
    return made


def huge_spread(width: int) -> Array:
    return np.diag(10.0 ** np.linspace(-12, 6, width))


MOMENTS = [zero_moment, rank_one, noise_of_one_sample, one_live_column, huge_spread]


@pytest.mark.parametrize("pair_rule", [False, True])
@pytest.mark.parametrize("make", MOMENTS, ids=lambda f: f.__name__)
def test_moments_without_full_rank(make: object, pair_rule: bool) -> None:
    weight, scale, _ = layer(5, 1, 4, 10, 10)
    moment = make(10)[None]  # type: ignore[operator]
    start = start_of(weight, scale, pair_rule)
    q = second_order_round(weight, scale, moment, start, pair_rule=pair_rule)
    assert (error(weight, scale, q, moment) <= error(weight, scale, start, moment) + 1e-12).all()
    if make is zero_moment:
        np.testing.assert_array_equal(q, start)


def test_a_dead_group_beside_a_live_one() -> None:
    weight, scale, moment = layer(6, 2, 3, 8, 300)
    moment[0] = 0
    start = start_of(weight, scale, True)
    q = second_order_round(weight, scale, moment, start, pair_rule=True)
    np.testing.assert_array_equal(q[0], start[0])
    assert (error(weight, scale, q, moment)[1] <= error(weight, scale, start, moment)[1]).all()


def test_a_dead_channel_stays_dead() -> None:
    weight, scale, moment = layer(7, 1, 3, 8, 300)
    weight[0, 1] = 0
    start = start_of(weight, scale, True)
    q = second_order_round(weight, scale, moment, start, pair_rule=True)
    assert not q[0, 1].any()


def test_four_bit_weights_stay_inside_their_range() -> None:
    weight, _, moment = layer(8, 1, 8, 16, 300)
    scale = (np.abs(weight).max(axis=2) / 7).astype(np.float32)
    start = start_of(weight, scale, False, top=7)
    q = second_order_round(weight, scale, moment, start, pair_rule=False, top=7)
    assert np.abs(q.astype(int)).max() <= 7


def test_the_pair_rule_binds_where_weights_are_large() -> None:
    weight = np.full((1, 2, 6), 1.0, np.float32)
    scale = np.full((1, 2), 1 / 100, np.float32)  # the target is 100 everywhere: 64 + 64 is what is left
    moment = np.eye(6)[None] + 0.3
    start = start_of(weight, scale, True)
    q = second_order_round(weight, scale, moment, start, pair_rule=True)
    check_pairs(q)
    assert (error(weight, scale, q, moment) <= error(weight, scale, start, moment) + 1e-12).all()


def test_the_inputs_are_not_changed() -> None:
    weight, scale, moment = layer(9, 1, 3, 8, 300)
    kept = weight.copy(), scale.copy(), moment.copy()
    start = start_of(weight, scale, True)
    first = second_order_round(weight, scale, moment, start, pair_rule=True)
    for now, before in zip((weight, scale, moment), kept, strict=True):
        np.testing.assert_array_equal(now, before)
    second = second_order_round(weight, scale, moment, start, pair_rule=True)
    assert first.tobytes() == second.tobytes()


def test_a_moment_that_is_not_finite_is_refused() -> None:
    weight, scale, moment = layer(10, 1, 3, 8, 300)
    moment[0, 2, 2] = np.inf
    with pytest.raises(FloatingPointError, match="not finite"), np.errstate(all="ignore"):
        second_order_round(weight, scale, moment, start_of(weight, scale, True), pair_rule=True)


# ---- a scale a column: blocks with zero points ----
def blocks_of(seed: int, channels: int, width: int, block: int) -> tuple[Array, Array, tuple[Array, Array], Array]:
    """weight, scale by column, limits by column and integers rounded to nearest, for 4 bits with zero points."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(1, channels, width)).astype(np.float32)
    blocks = -(-width // block)
    scale = np.repeat(rng.uniform(0.1, 0.4, (1, channels, blocks)), block, axis=2)[:, :, :width].astype(np.float32)
    zero = np.repeat(rng.integers(4, 12, (1, channels, blocks)), block, axis=2)[:, :, :width]
    limits = (-zero, 15 - zero)
    start = np.clip(np.rint(weight.astype(np.float64) / scale), *limits).astype(np.int8)
    return weight, scale, limits, start


def block_error(weight: Array, scale: Array, q: Array, moment: Array) -> Array:
    e = weight.astype(np.float64) - q.astype(np.float64) * scale.astype(np.float64)
    return np.einsum("gck,gkl,gcl->gc", e, moment, e)


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    channels=st.integers(1, 4),
    width=st.integers(1, 80),
    block=st.sampled_from([4, 16, 32]),
    rows=st.sampled_from([1, 5, 300]),
)
def test_blocks_are_never_worse_and_within_their_limits(seed: int, channels: int, width: int, block: int, rows: int) -> None:
    weight, scale, limits, start = blocks_of(seed, channels, width, block)
    x = np.random.default_rng(seed + 1).normal(size=(rows, width)) + 0.5
    moment = (x.T @ x / rows)[None]
    q = second_order_round(weight, scale, moment, start, pair_rule=False, limits=limits)
    assert (limits[0] <= q).all() and (q <= limits[1]).all()
    before, after = (block_error(weight, scale, r, moment) for r in (start, q))
    assert (after <= before * (1 + 1e-9) + 1e-15).all()


def test_equal_columns_are_one_scale_a_channel() -> None:
    weight, scale, moment = layer(11, 2, 4, 70, 300)
    scale = np.exp2(np.rint(np.log2(scale)))  # powers of two: both ways of dividing are exact
    start = start_of(weight, scale, False)
    by_channel = second_order_round(weight, scale, moment, start, pair_rule=False)
    columns = np.repeat(scale[:, :, None], 70, axis=2)
    np.testing.assert_array_equal(second_order_round(weight, columns, moment, start, pair_rule=False), by_channel)


def test_blocks_gain_on_correlated_inputs_and_come_near_the_optimum() -> None:
    reached = nearest = best = 0.0
    for seed in range(40):
        weight, scale, limits, start = blocks_of(seed, 1, 4, 2)
        x = np.random.default_rng(seed).normal(size=(50, 4)) @ np.random.default_rng(seed + 1).normal(size=(4, 4))
        moment = (x.T @ x / 50)[None]
        q = second_order_round(weight, scale, moment, start, pair_rule=False, damping=1e-6, limits=limits)
        tried = np.array(list(product(*(range(b - 3, b + 4) for b in np.rint(weight[0, 0] / scale[0, 0]).astype(int)))))
        tried = tried[((limits[0][0, 0] <= tried) & (tried <= limits[1][0, 0])).all(axis=1)]
        if not len(tried):
            continue
        e = weight[0, 0].astype(np.float64) - tried * scale[0, 0].astype(np.float64)
        best += float(np.einsum("nk,kl,nl->n", e, moment[0], e).min())
        reached += float(block_error(weight, scale, q, moment)[0, 0])
        nearest += float(block_error(weight, scale, start, moment)[0, 0])
    assert reached < 1.6 * best
    assert reached < 0.9 * nearest


def test_the_pair_rule_is_refused_with_a_scale_a_column() -> None:
    weight, scale, limits, start = blocks_of(0, 2, 8, 4)
    with pytest.raises(ValueError, match="one scale a channel"):
        second_order_round(weight, scale, np.eye(8)[None], start, pair_rule=True, limits=limits)
