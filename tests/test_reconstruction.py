"""Reconstruction behind the activation: against scipy's minimiser, least squares, and rows that were not seen."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from qcompile.reconstruction import Rows, _Solver, fit_bias, reconstruct
from qcompile.runtime import Array


def problem(
    seed: int, count: int = 400, width: int = 5, channels: int = 3, noise: float = 0.8, rank: int = 5
) -> tuple[Rows, Array, Array]:
    """Rows behind a Relu that cuts at about half, their weights and bias; noise that is a function of the input."""
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(rank, width))
    x = draw.normal(size=(1, count, rank)) @ mixing + 0.5
    weight = np.random.default_rng(8).normal(size=(1, channels, width))
    bias = np.random.default_rng(9).normal(size=(1, channels))
    targets = np.clip(x @ weight[0].T + bias[:, None], 0.0, 4.0)
    return Rows((np.rint(x / noise) * noise).astype(np.float32), targets.astype(np.float32), 0.0, 4.0), weight, bias


def objective(rows: Rows, weight: Array, bias: Array) -> float:
    """mean h by plain masks: beyond an end that the target stands at, nothing counts."""
    y = rows.inputs[0].astype(np.float64) @ weight[0].T + bias
    t = rows.targets[0].astype(np.float64)
    wrong = y - t
    wrong[(t <= rows.low) & (y < t)] = 0
    wrong[(t >= rows.high) & (y > t)] = 0
    return float(np.square(wrong).mean())


def test_the_loss_counts_nothing_beyond_an_end() -> None:
    rows, weight, bias = problem(1)
    assert rows.loss(weight, bias) == pytest.approx(objective(rows, weight, bias), rel=1e-5)
    y = rows.inputs[0] @ weight[0].T + bias
    assert rows.loss(weight, bias) < float(np.square(y - rows.targets[0]).mean())


@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_many_steps_reach_scipys_minimum(strength: float) -> None:
    rows, weight, bias = problem(2)
    channels, width = weight.shape[1:]
    level = np.cov(rows.inputs[0].T.astype(np.float64), bias=True).trace() / width

    def penalised(flat: Array) -> float:
        v, b = flat[: channels * width].reshape(weight.shape), flat[channels * width :].reshape(bias.shape)
        # The mean over outputs against the penalty per channel: the ridge of each channel's own problem.
        return objective(rows, v, b) * channels + strength * level * float(np.square(v - weight).sum())

    start = np.concatenate([weight.reshape(-1), bias.reshape(-1)])
    best = minimize(penalised, start, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-10})
    v, b = _Solver(rows, weight).run(strength, weight, bias, 400)
    assert penalised(np.concatenate([v.reshape(-1), b.reshape(-1)])) == pytest.approx(best.fun, rel=1e-4)


def test_no_step_raises_the_objective() -> None:
    rows, weight, bias = problem(3)
    solver = _Solver(rows, weight)
    before = rows.loss(weight, bias)
    for _ in range(10):
        weight, bias = solver.run(1e-9, weight, bias, 1)
        now = rows.loss(weight, bias)
        assert now <= before * (1 + 1e-6)
        before = now


def test_it_helps_on_rows_that_were_not_seen() -> None:
    rows, weight, bias = problem(4, count=4000, rank=2)
    fresh, _, _ = problem(5, count=4000, rank=2)
    v, b, strength = reconstruct(rows, weight, weight, bias)
    assert np.isfinite(strength)
    assert fresh.loss(v, b) < 0.9 * fresh.loss(weight, fit_bias(rows, weight, bias))


def test_without_noise_the_weights_stay_good() -> None:
    rows, weight, bias = problem(6, noise=1e-4)
    v, b, _ = reconstruct(rows, weight, weight, bias)
    assert rows.loss(v, b) < 1e-6


def test_linear_outputs_have_no_dead_part() -> None:
    rows, weight, bias = problem(7)
    linear = Rows(rows.inputs, rows.targets, -np.inf, np.inf)
    y = rows.inputs @ np.swapaxes(weight, 1, 2) + bias[:, None]
    np.testing.assert_allclose(linear.residual(weight, bias), rows.targets - y, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_rows(count: int) -> None:
    rows, weight, bias = problem(8, count=count)
    v, b, _ = reconstruct(rows, weight, weight, bias)
    assert np.isfinite(v).all()
    assert np.isfinite(b).all()


def test_constant_inputs_and_dead_targets() -> None:
    rows, weight, bias = problem(9)
    constant = Rows(np.ones_like(rows.inputs), np.zeros_like(rows.targets), 0.0, 4.0)
    v, b, _ = reconstruct(constant, weight, weight, bias)
    assert np.isfinite(v).all()
    assert constant.loss(v, b) < 1e-4


def test_the_bias_alone_balances_what_counts() -> None:
    rows, weight, bias = problem(10)
    moved = fit_bias(rows, weight * 0.9, bias, steps=200)
    np.testing.assert_allclose(rows.residual(weight * 0.9, moved).mean(axis=1), 0, atol=1e-4)
