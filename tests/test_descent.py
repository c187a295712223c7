"""Coordinate descent: a local minimum, never worse than its start, inside the limits; brute force on tiny layers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.descent import descend
from qcompile.runtime import Array


def problem(seed: int, groups: int = 1, channels: int = 3, width: int = 6, rank: int | None = None) -> tuple[Array, Array, Array]:
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(groups, 64, rank or width)) @ draw.normal(size=(groups, rank or width, width))
    weight = draw.normal(size=(groups, channels, width))
    moment = np.swapaxes(rows, 1, 2) @ rows / 64
    return weight, np.abs(weight).max(axis=2) / 7, moment


def error(weight: Array, scale: Array, moment: Array, q: Array) -> Array:
    """e H e^T of each channel, by plain loops."""
    e = weight - q * scale[:, :, None]
    found = np.zeros(scale.shape)
    for g in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            found[g, c] = e[g, c] @ moment[g] @ e[g, c]
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.sampled_from([1, 3]))
def test_never_worse_than_its_start_and_within_the_limits(seed: int, width: int, groups: int) -> None:
    weight, scale, moment = problem(seed, groups=groups, width=width, rank=max(1, width // 2))
    start = np.clip(np.rint(weight / scale[:, :, None]), -7, 7)
    q = descend(weight, scale, moment, start, pair_rule=False, top=7)
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max() <= 7
    assert (error(weight, scale, moment, q) <= error(weight, scale, moment, start) * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_single_step_improves_on_the_end(seed: int) -> None:
    weight, scale, moment = problem(seed, width=12)
    damped = moment + 0.01 * np.trace(moment[0]) / 12 * np.eye(12)
    start = np.clip(np.rint(weight / scale[:, :, None]), -7, 7)
    q = descend(weight, scale, moment, start, pair_rule=False, top=7, sweeps=50).astype(float)
    best = error(weight, scale, damped, q)
    unmoved = (q == start).all(axis=2)  # a channel that the plain moment judged worse went back to its start
    for column, step in product(range(12), (-1, 1)):
        other = q.copy()
        other[:, :, column] = np.clip(other[:, :, column] + step, -7, 7)
        assert ((error(weight, scale, damped, other) >= best - 1e-9) | unmoved).all()


@pytest.mark.parametrize("seed", range(8))
def test_one_weight_ends_at_the_brute_force_optimum(seed: int) -> None:
    weight, scale, moment = problem(seed, width=1, channels=5)
    start = np.full(weight.shape, 7.0)
    q = descend(weight, scale, moment, start, pair_rule=False, top=7)
    trials = np.stack([error(weight, scale, moment, np.full(weight.shape, float(v))) for v in range(-7, 8)])
    np.testing.assert_array_equal(q[:, :, 0], trials.argmin(axis=0) - 7)


@pytest.mark.parametrize("seed", range(4))
def test_the_pair_rule_holds_where_it_binds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    weight = np.abs(draw.normal(size=(1, 4, 9))) + 1.0
    scale = weight.max(axis=2) / 127
    moment = np.cov(draw.normal(size=(9, 64)))[None]
    start = np.full(weight.shape, 40.0)
    q = descend(weight, scale, moment, start, pair_rule=True, top=127).astype(int)
    a, b = q[..., 0:8:2], q[..., 1:8:2]
    assert (np.abs(a + b)[a * b > 0] <= 128).all()
    assert (error(weight, scale, moment, q) < error(weight, scale, moment, start)).all()


def test_a_moment_of_zeros_keeps_the_start() -> None:
    weight, scale, moment = problem(0)
    start = np.clip(np.rint(weight / scale[:, :, None]), -7, 7)
    np.testing.assert_array_equal(descend(weight, scale, moment * 0, start, pair_rule=False, top=7), start)


def test_dead_columns_do_not_divide_by_zero() -> None:
    weight, scale, moment = problem(1)
    moment[:, 2] = moment[:, :, 2] = 0
    start = np.clip(np.rint(weight / scale[:, :, None]), -7, 7)
    q = descend(weight, scale, moment, start, pair_rule=False, top=7)
    assert (error(weight, scale, moment, q) <= error(weight, scale, moment, start) * (1 + 1e-9)).all()
