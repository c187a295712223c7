"""Scales judged by the error after rounding: on the dyadic grid, never worse than their start, brute force on tiny layers."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from qcompile.lattice import Grid, round_on_lattice
from qcompile.runtime import Array

SX, SY = np.float32(0.023), np.float32(0.041)


def grid(**changes: object) -> Grid:
    options: dict[str, object] = {"pair_rule": False, "top": 7, "candidates": 32}
    return Grid(SX, SY, **{**options, **changes})  # type: ignore[arg-type]


def problem(seed: int, width: int = 9, channels: int = 6) -> tuple[Array, Array, Array, Array]:
    draw = np.random.default_rng(seed)
    rows = np.maximum(draw.normal(size=(256, 4)) @ draw.normal(size=(4, width)) + 0.3 * draw.normal(size=(256, width)), 0)
    weight = draw.normal(size=(1, channels, width))
    scale = (np.abs(weight).max(axis=2) / 7).astype(np.float32)
    return weight, scale, np.cov(rows.T).reshape(1, width, width), np.zeros(scale.shape)


def error(weight: Array, scale: Array, moment: Array, q: Array) -> Array:
    e = weight - q.astype(np.float64) * scale.astype(np.float64)[:, :, None]
    return np.einsum("gci,gij,gcj->gc", e, moment, e)


@pytest.mark.parametrize("width", [9, 65, 130])
def test_chosen_scales_are_dyadic(width: int) -> None:
    weight, scale, moment, least = problem(1, width)
    _, chosen = round_on_lattice(weight, scale, moment, least, grid())
    moved = chosen != scale
    assert moved.any()
    for value in chosen[moved]:
        ratio = Fraction(float(np.float32(np.float32(SX * value) / SY)))
        assert (ratio * 2**16).denominator == 1


def test_a_layer_that_ends_in_float_may_take_any_scale() -> None:
    weight, scale, moment, least = problem(2)
    q, chosen = round_on_lattice(weight, scale, moment, least, Grid(SX, None, False, 7, candidates=32))
    plain = np.rint(weight / scale.astype(np.float64)[:, :, None])
    assert (error(weight, chosen, moment, q) <= error(weight, scale, moment, plain)).all()
    assert error(weight, chosen, moment, q).sum() < 0.5 * error(weight, scale, moment, plain).sum()


@pytest.mark.parametrize("candidates", [0, 8, 32])
def test_no_channel_is_worse_than_round_to_nearest_and_more_candidates_help(candidates: int) -> None:
    weight, scale, moment, least = problem(3, channels=16)
    damped = moment + 0.01 * np.trace(moment[0]) / 9 * np.eye(9)
    plain = error(weight, scale, damped, np.clip(np.rint(weight / scale[:, :, None]), -7, 7))
    q, chosen = round_on_lattice(weight, scale, moment, least, grid(candidates=candidates))
    reached = error(weight, chosen, damped, q)
    assert (reached <= plain * (1 + 1e-9)).all()
    fewer, few_scales = round_on_lattice(weight, scale, moment, least, grid(candidates=0))
    assert (reached <= error(weight, few_scales, damped, fewer) * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(6))
def test_two_weights_come_close_to_brute_force_at_the_chosen_scale(seed: int) -> None:
    weight, scale, moment, least = problem(seed, width=2)
    q, chosen = round_on_lattice(weight, scale, moment, least, grid())
    reached = error(weight, chosen, moment, q)
    everything = np.stack(
        [error(weight, chosen, moment, np.broadcast_to(v, weight.shape)) for v in product(range(-7, 8), repeat=2)]
    )
    assert (reached <= everything.min(axis=0) * 1.05 + 1e-6).all()


def test_scales_stay_above_what_the_accumulator_needs() -> None:
    weight, scale, moment, _ = problem(4)
    floor = np.asarray(scale, np.float64) * 0.97
    _, chosen = round_on_lattice(weight, scale, moment, floor, grid())
    step = float(SY) / float(SX) / 2**16  # the grid's own pitch
    assert (chosen >= floor - step).all()


def test_a_moment_of_zeros_rounds_to_nearest() -> None:
    weight, scale, moment, least = problem(5)
    q, chosen = round_on_lattice(weight, scale, moment * 0, least, grid())
    np.testing.assert_array_equal(q, np.clip(np.rint(weight / scale.astype(np.float64)[:, :, None]), -7, 7))
    np.testing.assert_array_equal(chosen, scale)
