"""Layer-wise reconstruction behind the activation: weights that give the float model's *outputs* from the quantised inputs.

    V, b = argmin  mean h(x' V^T + b - t) + l |V - W|^2,     t = clip(W x + b_0, low, high)

x is the input in the float model, x' in the quantised one. [low, high] is what the output's integers can hold, so a folded Relu
is its lower end. h is the square, but one-sided where t stands at an end: whatever
lies beyond it is clipped anyway (the rectified objective of AdaRound, Nagel et al. 2020, equation 25, made convex). Behind a Relu
most errors lie in the dead part and cost nothing, which a regression of the linear output cannot know.

Solved by majorisation: h's curvature is at most that of the square, so each step is a ridge regression with one and the same
factor, and never raises the objective. l is chosen on samples that were left out, as in `qcompile.compensation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.qparams import Array, FloatArray
from qcompile.quadratic import damped, mean_level

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
_TRIAL_STEPS = 5
_STEPS = 12


@dataclass(frozen=True)
class Rows:
    """What one layer sees: noisy inputs [groups, N, K] and targets [groups, N, channels], all float32."""

    inputs: Array
    targets: Array
    low: float
    high: float

    @property
    def count(self) -> int:
        """N."""
        return int(self.inputs.shape[1])

    def part(self, chosen: slice) -> Rows:
        """Some of the rows."""
        return Rows(self.inputs[:, chosen], self.targets[:, chosen], self.low, self.high)

    def residual(self, weight: Array, bias: Array) -> Array:
        """t - y where an error counts, else 0, [groups, N, channels]; weight [groups, channels, K], bias [groups, channels]."""
        y = np.matmul(self.inputs, np.swapaxes(weight, 1, 2).astype(np.float32))
        y += bias[:, None, :].astype(np.float32)
        r: Array = self.targets - y
        if np.isfinite(self.low):
            np.maximum(r, 0, out=r, where=(self.targets >= self.high))
        if np.isfinite(self.high):
            np.minimum(r, 0, out=r, where=(self.targets <= self.low))
        return r

    def loss(self, weight: Array, bias: Array) -> float:
        """mean h of all outputs."""
        return float(np.square(self.residual(weight, bias)).mean(dtype=np.float64))


class _Solver:
    """Majorised ridge regression on `rows` around `weight`; the moment of the rows serves all strengths."""

    def __init__(self, rows: Rows, weight: FloatArray) -> None:
        self.rows = rows
        self.weight = weight
        mean = rows.inputs.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        self.centred = rows.inputs - mean
        self.mean = mean[:, 0].astype(np.float64)
        self.moment = np.matmul(np.swapaxes(self.centred, 1, 2), self.centred).astype(np.float64) / rows.count

    def run(self, strength: float, start: FloatArray, bias: FloatArray, steps: int) -> tuple[FloatArray, FloatArray]:
        pull = strength * mean_level(self.moment)[:, None, None]
        inverse = np.linalg.inv(damped(self.moment, strength))
        weight, across = start, np.swapaxes(self.centred, 1, 2)
        for _ in range(steps):
            r = self.rows.residual(weight, bias)
            # d/dV of the mean square, in the centred coordinates in which the bias takes the mean.
            towards = np.swapaxes(np.matmul(across, r), 1, 2).astype(np.float64) / self.rows.count
            move = (towards - pull * (weight - self.weight)) @ inverse
            weight = weight + move
            bias = bias + r.mean(axis=1, dtype=np.float64) - np.einsum("gck,gk->gc", move, self.mean)
        return weight, bias


def reconstruct(rows: Rows, weight: Array, start: Array, bias: Array) -> tuple[FloatArray, FloatArray, float]:
    """(V, b, l) for `weight` [groups, channels, K], from `start` (as large) and `bias` [groups, channels].

    Half of the rows judge what the other half learned; l is infinity, and `start` with its own best bias comes back, where no
    strength does better than that.
    """
    matrix, first = np.asarray(weight, np.float64), np.asarray(start, np.float64)
    bias = np.asarray(bias, np.float64)
    middle = rows.count // 2
    if middle == 0:
        return first, fit_bias(rows, first, bias), np.inf
    halves = rows.part(slice(0, middle)), rows.part(slice(middle, None))
    errors = np.zeros(len(STRENGTHS) + 1)
    for train, test in (halves, halves[::-1]):
        errors[-1] += test.loss(first, fit_bias(train, first, bias))
        solver = _Solver(train, matrix)
        for index, strength in enumerate(STRENGTHS):
            errors[index] += test.loss(*solver.run(strength, first, bias, _TRIAL_STEPS))
    best = int(np.argmin(errors))
    if best == len(STRENGTHS):
        return first, fit_bias(rows, first, bias), np.inf
    fitted, moved = _Solver(rows, matrix).run(STRENGTHS[best], first, bias, _STEPS)
    return fitted, moved, STRENGTHS[best]


def fit_bias(rows: Rows, weight: Array, bias: Array, steps: int = 8) -> FloatArray:
    """The bias [groups, channels] that `weight`, held fixed, wants."""
    bias = np.asarray(bias, np.float64)
    for _ in range(steps):
        bias = bias + rows.residual(weight, bias).mean(axis=1, dtype=np.float64)
    return bias
