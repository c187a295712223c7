"""Weights that expect the noise in their inputs: a regression to the float outputs, its strength chosen by cross-validation.

    W*(l) = W + W (Cov(x, x') - Cov(x', x')) (Cov(x', x') + l * mean variance * I)^-1

x is a layer's input in the float model, x' the quantised one that really reaches it. W* is the ridge regression of W x on x'
that shrinks towards W itself, so that l = infinity changes nothing: least squares with a prior at the trained weights (the
asymmetric target of AdaRound, Nagel et al. 2020, section 3.3, in closed form). With 4-bit weights x' holds much noise that is
a function of x, and the layers behind take a good part of it out again; with 8 bits there is little to gain and a few samples are
soon overfitted. l is therefore chosen by the error on samples that were left out of the regression, for each layer anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qcompile.graph import Node
from qcompile.moments import rows_of, rows_wanted
from qcompile.qparams import Array, FloatArray
from qcompile.quadratic import damped, is_live

STRENGTHS = (0.01, 0.1, 0.5, 2.0, 10.0, 100.0)
_FOLDS = 2
_ROWS_AT_ONCE = 4096
_LEAST_GAIN = 1e-6  # of the output's energy (60 dB below it): float32 sums tell nothing finer
WIDEST = 3072  # K: both folds' moments take 32 K^2 bytes, 0.3 GB here


@dataclass
class PairMoments:
    """Sums over rows x (float) and x' (quantised), each shifted near its mean: [groups, K], [groups, K, K], and their count.

    exact holds x x^T, where it was asked for.
    """

    rows: int
    mean: FloatArray
    mean_noisy: FloatArray
    cross: FloatArray
    noisy: FloatArray
    exact: FloatArray | None = None

    def __add__(self, other: PairMoments) -> PairMoments:
        return PairMoments(
            self.rows + other.rows,
            self.mean + other.mean,
            self.mean_noisy + other.mean_noisy,
            self.cross + other.cross,
            self.noisy + other.noisy,
            None if self.exact is None or other.exact is None else self.exact + other.exact,
        )

    def covariances(self) -> tuple[FloatArray, FloatArray]:
        """Cov(x, x') and Cov(x', x'), [groups, K, K]."""
        mean, noisy = self.mean / self.rows, self.mean_noisy / self.rows
        cross = self.cross / self.rows - mean[:, :, None] * noisy[:, None, :]
        return cross, self.noisy / self.rows - noisy[:, :, None] * noisy[:, None, :]

    def error(self, weight: Array, stored: Array) -> float:
        """E|W x - V x'|^2 summed over channels, means removed, for W and V [groups, channels, K]. Needs `exact`."""
        assert self.exact is not None
        matrix, other = np.asarray(weight, np.float64), np.asarray(stored, np.float64)
        mean = self.mean / self.rows
        cross, noisy = self.covariances()
        own = self.exact / self.rows - mean[:, :, None] * mean[:, None, :]
        parts = [(matrix @ own, matrix, 1.0), (matrix @ cross, other, -2.0), (other @ noisy, other, 1.0)]
        return float(sum(factor * np.einsum("gck,gck->", left, right) for left, right, factor in parts))


def pair_moments(
    node: Node,
    weight_shape: tuple[int, ...],
    exact: Iterable[Array],
    noisy: Iterable[Array],
    count: int,
    seed: int = 0,
    *,
    with_exact: bool = False,
) -> list[PairMoments]:
    """Moments of the rows that Conv or Gemm `node` reads, at the same drawn positions of `exact` and `noisy`, in two folds.

    Samples take turns, for calibration data are often in some order (by class, say).

    exact, noisy: the node's input in the float and in the quantised model for each of `count` samples. One sample: one fold.
    with_exact: as well the moments that `PairMoments.error` needs.
    """
    parts = min(_FOLDS, count)
    draws = [np.random.default_rng(seed) for _ in range(2)]
    wanted = rows_wanted(node, weight_shape, count)
    sums: list[_Sums] = [_Sums(with_exact) for _ in range(parts)]
    shifts: tuple[Array, Array] | None = None
    for index, (left, right) in enumerate(zip(exact, noisy, strict=True)):
        a, b = (rows_of(node, weight_shape, x, wanted, draw) for x, draw in zip((left, right), draws, strict=True))
        if shifts is None:
            shifts = a.mean(axis=1, keepdims=True), b.mean(axis=1, keepdims=True)
        sums[index % parts].take(a - shifts[0], b - shifts[1])
    return [s.total() for s in sums]


class _Sums:
    """Moments of one fold; rows are multiplied many at a time, which is several times as fast."""

    def __init__(self, with_exact: bool) -> None:
        self.with_exact = with_exact
        self.waiting: list[tuple[Array, Array]] = []
        self.known: PairMoments | None = None

    def take(self, exact: Array, noisy: Array) -> None:
        self.waiting.append((exact, noisy))
        if sum(a.shape[1] for a, _ in self.waiting) >= _ROWS_AT_ONCE:
            self.known = self.total()
            self.waiting = []

    def total(self) -> PairMoments:
        if not self.waiting:
            assert self.known is not None
            return self.known
        a, b = (np.concatenate(rows, axis=1) for rows in zip(*self.waiting, strict=True))
        back, across = np.swapaxes(a, 1, 2), np.swapaxes(b, 1, 2)
        # float32 products and float64 sums lose nothing that matters beside the damping.
        part = PairMoments(
            a.shape[1],
            a.sum(axis=1, dtype=np.float64),
            b.sum(axis=1, dtype=np.float64),
            np.matmul(back, b).astype(np.float64),
            np.matmul(across, b).astype(np.float64),
            np.matmul(back, a).astype(np.float64) if self.with_exact else None,
        )
        return part if self.known is None else self.known + part


def compensate(weight: Array, folds: list[PairMoments]) -> tuple[FloatArray, float]:
    """(W* [groups, channels, K], the chosen l) for `weight` of that shape; infinity, and `weight` itself, where nothing helps.

    Nothing can help with a single fold: there is no sample left to judge by.
    """
    matrix = np.asarray(weight, np.float64)
    moments = [f.covariances() for f in folds]
    if len(folds) < 2 or not any(is_live(noisy) for _, noisy in moments):
        return matrix, np.inf
    errors = np.zeros(len(STRENGTHS))
    for train, (cross, noisy) in zip(reversed(moments), moments, strict=True):
        for index, strength in enumerate(STRENGTHS):
            errors[index] += _change_of_error(matrix, _regress(matrix, *train, strength), cross, noisy)
    best = int(np.argmin(errors))
    signal = sum(float(np.einsum("gck,gck->", matrix @ noisy, matrix)) for _, noisy in moments)
    if not errors[best] < -_LEAST_GAIN * signal:
        return matrix, np.inf
    whole = folds[0]
    for fold in folds[1:]:
        whole = whole + fold
    return _regress(matrix, *whole.covariances(), STRENGTHS[best]), STRENGTHS[best]


def _regress(matrix: FloatArray, cross: FloatArray, noisy: FloatArray, strength: float) -> FloatArray:
    shift = np.linalg.solve(damped(noisy, strength), np.swapaxes(matrix @ (cross - noisy), 1, 2))
    return np.asarray(matrix + np.swapaxes(shift, 1, 2))


def _change_of_error(matrix: FloatArray, target: FloatArray, cross: FloatArray, noisy: FloatArray) -> float:
    """E|W* x' - W x|^2 - E|W x' - W x|^2, means removed, on the moments of one fold."""
    moved = target - matrix
    # |a|^2 - |b|^2 = (a - b)(a + b): the large common part never enters.
    gradient = (target + matrix) @ noisy - 2 * (matrix @ cross)
    return float(np.einsum("gck,gck->", moved, gradient))
