"""Weights that expect the noise of their inputs: against stacked least squares, and on data that were not seen."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import floats, model

from qcompile import compensation
from qcompile.compensation import STRENGTHS, PairMoments, compensate, pair_moments
from qcompile.graph import Graph, Node
from qcompile.runtime import Array


def rows(count: int, width: int, seed: int, rank: int | None = None) -> Array:
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(rank or width, width)) / np.sqrt(rank or width)
    return (draw.normal(size=(count, rank or width)) @ mixing + 3.0).astype(np.float32)


def noisy(x: Array, step: float) -> Array:
    """Rounded so coarsely, through a mixing that a later layer can undo, that much of the noise is a function of x."""
    return (np.rint(x / step) * step).astype(np.float32)


def samples(x: Array, count: int) -> list[Array]:
    return np.split(x, count)


def moments_of(x: Array, y: Array, count: int = 8) -> list[PairMoments]:
    node = Node("Gemm", "gemm", [], [], attrs={})
    return pair_moments(node, (x.shape[1], 5), samples(x, count), samples(y, count), count)


def stacked(weight: Array, x: Array, y: Array, strength: float) -> Array:
    """argmin |W x - V x'|^2 / n + strength * level * |V - W|^2, means removed, by one least-squares problem of all rows."""
    a, b = (v.astype(np.float64) - v.mean(axis=0, dtype=np.float64) for v in (x, y))
    level = strength * np.square(b).mean(axis=0).mean()
    left = np.concatenate([b / np.sqrt(len(b)), np.sqrt(level) * np.eye(b.shape[1])])
    right = np.concatenate([a @ weight.T / np.sqrt(len(a)), np.sqrt(level) * weight.T])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


def test_folds_add_up_to_numpys_covariances() -> None:
    x = rows(512, 6, 1)
    y = noisy(x, 0.8)
    folds = moments_of(x, y)
    assert [f.rows for f in folds] == [256, 256]
    cross, own = (folds[0] + folds[1]).covariances()
    expected = np.cov(np.concatenate([x, y], axis=1).astype(np.float64).T, bias=True)
    np.testing.assert_allclose(cross[0], expected[:6, 6:], atol=2e-5)
    np.testing.assert_allclose(own[0], expected[6:, 6:], atol=2e-5)


def test_the_chosen_regression_is_the_least_squares_solution() -> None:
    x = rows(1024, 8, 2, rank=5)
    y = noisy(x, 1.5)
    weight = np.random.default_rng(3).normal(size=(5, 8))
    target, strength = compensate(weight[None], moments_of(x, y))
    assert strength in STRENGTHS
    np.testing.assert_allclose(target[0], stacked(weight, x, y, strength), rtol=1e-3, atol=1e-4)


def error(weight: Array, target: Array, x: Array, y: Array) -> float:
    difference = x @ weight.T - y @ target.T
    return float(np.square(difference - difference.mean(axis=0)).sum())


def test_it_helps_on_rows_that_were_not_seen() -> None:
    x, fresh = rows(2048, 16, 4, rank=6), rows(2048, 16, 5, rank=6)
    weight = np.random.default_rng(6).normal(size=(5, 16))
    target, strength = compensate(weight[None], moments_of(x, noisy(x, 1.5)))
    assert np.isfinite(strength)
    y = noisy(fresh, 1.5)
    assert error(weight, target[0], fresh, y) < 0.8 * error(weight, weight, fresh, y)


def test_without_noise_nothing_moves() -> None:
    x = rows(512, 8, 7)
    weight = np.random.default_rng(8).normal(size=(1, 5, 8))
    target, strength = compensate(weight, moments_of(x, x))
    assert strength == np.inf
    np.testing.assert_array_equal(target, weight)


def test_where_samples_disagree_nothing_moves() -> None:
    """Noise without any relation to the input, from fewer rows than columns: each fold would learn what harms the other."""
    x = rows(16, 32, 9)
    y = x + 0.01 * np.random.default_rng(10).normal(size=x.shape).astype(np.float32)
    weight = np.random.default_rng(11).normal(size=(1, 5, 32))
    target, strength = compensate(weight, moments_of(x, y))
    assert np.abs(target - weight).max() < 0.05 * np.abs(weight).max()
    assert strength >= 1.0


@pytest.mark.parametrize("case", ["one sample", "constant", "dead column"])
def test_degenerate_inputs(case: str) -> None:
    weight = np.random.default_rng(12).normal(size=(1, 5, 4))
    x = rows(64, 4, 13)
    if case == "constant":
        x = np.full_like(x, 2.0)
    if case == "dead column":
        x[:, 2] = 0.0
    y = noisy(x, 1.0)
    target, strength = compensate(weight, moments_of(x, y, 1 if case == "one sample" else 8))
    assert np.isfinite(target).all()
    if case != "dead column":
        assert strength == np.inf
        np.testing.assert_array_equal(target, weight)
    else:
        np.testing.assert_allclose(target[0, :, 2], weight[0, :, 2])


def test_depthwise_groups_are_regressed_each_for_itself() -> None:
    proto = model("g (float[1, 3, 6, 6] x) => (float[1, 3, 5, 5] y) { y = Conv <group = 3> (x, w) }", w=floats(3, 1, 2, 2))
    node = Graph.from_proto(proto).nodes[0]
    draw = np.random.default_rng(14)
    x = draw.normal(size=(8, 3, 6, 6)).astype(np.float32)
    y = noisy(x, 1.2)
    folds = pair_moments(node, (3, 1, 2, 2), list(x[:, None]), list(y[:, None]), 8)
    weight = draw.normal(size=(3, 1, 4))
    target, strength = compensate(weight, folds)
    assert np.isfinite(strength)
    patches = [
        np.stack([v[:, c, i : i + 5, j : j + 5].reshape(-1) for i in range(2) for j in range(2)], axis=1)
        for c in (1,)
        for v in (x, y)
    ]
    alone = stacked(weight[1], patches[0], patches[1], strength)
    np.testing.assert_allclose(target[1], alone, rtol=1e-3, atol=1e-4)


def test_the_widest_layer_stays_within_its_memory() -> None:
    assert 32 * compensation.WIDEST**2 < 0.35e9


def test_a_dead_group_beside_live_ones_is_left_alone() -> None:
    """Its moments hold nothing but cancellation, which need not be invertible at any small damping."""
    live = np.eye(4)
    ghost = np.full((4, 4), 1e-12)
    noisy = np.stack([live, ghost])
    cross = np.stack([0.9 * live, np.zeros((4, 4))])
    folds = [PairMoments(100, np.zeros((2, 4)), np.zeros((2, 4)), 100 * cross, 100 * noisy) for _ in range(2)]
    weight = np.random.default_rng(15).normal(size=(2, 1, 4))
    target, strength = compensate(weight, folds)
    assert np.isfinite(strength)
    np.testing.assert_allclose(target[1], weight[1], atol=1e-3)
    np.testing.assert_allclose(target[0], weight[0] * (0.9 + strength) / (1 + strength), rtol=1e-6)
