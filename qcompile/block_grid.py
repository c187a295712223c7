"""Four-bit grids of blocks: every `block` neighbouring weights of a row share a scale and a zero point.

    w ~ (q - z) * s,   q and z in 0..15,   z = 8 for all blocks where the grid is symmetric

The scale is the one of least squared error among fractions of the block's range, then that of least squares for the integers that
it gives (alternating least squares, two rounds). Each weight's error may count with the power of the input that it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.graph import Array

TOP = 15
MIDDLE = 8
_VALUES = 1 << 20  # weights searched at a time: the working set stays in tens of megabytes
_ASYMMETRIC = np.linspace(1.0, 0.76, 9)
_SYMMETRIC = np.linspace(1.0, 0.70, 13)  # one end of a symmetric range is mostly unused: more is to be gained by clipping
_ROUNDS = 2
_LEAST_SCALE = 2.0**-100  # blocks of smaller numbers are zeros, so that no kernel meets a denormal scale


@dataclass(frozen=True)
class BlockGrid:
    """Scales (float32) and zero points (uint8, 0..15), both [rows, blocks]; the last block of a row may be a part of one."""

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8]
    block: int

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle, so that none needs to be stored."""
        return bool((self.zero_point == MIDDLE).all())

    def columns(self, width: int) -> tuple[Array, Array]:
        """Scale and zero point of every weight, [rows, width] each."""
        scale, zero = (np.repeat(a, self.block, axis=1)[:, :width] for a in (self.scale, self.zero_point))
        return scale, zero

    def dequantise(self, integers: Array) -> npt.NDArray[np.float32]:
        """(q - z) * s in float32, as DequantizeLinear and the kernels compute it; `integers` [rows, width] in 0..15."""
        scale, zero = self.columns(integers.shape[1])
        return np.asarray((integers.astype(np.int32) - zero).astype(np.float32) * scale, np.float32)


def round_blocks(
    matrix: Array, block: int, *, symmetric: bool, importance: Array | None = None
) -> tuple[BlockGrid, npt.NDArray[np.uint8]]:
    """The grid of `matrix` [rows, K], blocks along K, and the nearest integers (uint8 0..15, [rows, K]).

    importance: [K], not negative, what the squared error of a column counts; all the same where None or zero throughout.
    A few thousand rows are searched at a time; no row looks at another.
    """
    rows, width = matrix.shape
    blocks = -(-width // block)
    weight = np.ones(width) if importance is None or not (importance > 0).any() else np.asarray(importance, np.float64)
    # A column whose input was always zero still has a small say, for new data may move it.
    weight = _padded((weight / weight.mean() + 1e-3).astype(np.float32)[None], blocks * block)
    scale = np.empty((rows, blocks), np.float32)
    zero = np.empty((rows, blocks), np.uint8)
    integers = np.empty((rows, width), np.uint8)
    step = max(1, _VALUES // max(1, width))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        padded = _padded(np.asarray(matrix[part], np.float32), blocks * block)
        shape = (padded.shape[0], blocks, block)
        search = _Search(padded.reshape(shape), np.broadcast_to(weight, padded.shape).reshape(shape), symmetric)
        scale[part], zero[part] = search.best()
        q = _nearest(search.values, scale[part], zero[part])
        integers[part] = q.reshape(padded.shape)[:, :width].astype(np.uint8)
    return BlockGrid(scale, zero, block), integers


def _padded(values: Array, width: int) -> Array:
    """Zeros behind each row: they widen no range, since every grid holds zero, and have no error."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _nearest(values: Array, scale: Array, zero: Array) -> Array:
    """clip(round(w / s) + z, 0, 15) as float32, [rows, blocks, block]."""
    return np.asarray(np.clip(np.rint(values / scale[:, :, None]) + zero[:, :, None].astype(np.float32), 0, TOP))


class _Search:
    """The best scale so far of each block of `values` [rows, blocks, block], by error weighted with `weight`."""

    def __init__(self, values: Array, weight: Array, symmetric: bool) -> None:
        self.values, self.weight, self.symmetric = values, weight, symmetric
        shape = values.shape[:2]
        self.error = np.full(shape, np.inf)
        self.scale = np.ones(shape, np.float32)
        self.zero = np.full(shape, MIDDLE, np.uint8)

    def best(self) -> tuple[Array, Array]:
        """(scale, zero point), [rows, blocks] each."""
        low = np.minimum(self.values.min(axis=2), 0).astype(np.float64)
        high = np.maximum(self.values.max(axis=2), 0).astype(np.float64)
        if self.symmetric:
            full = np.maximum(high / (TOP - MIDDLE), -low / MIDDLE)
            zero = np.full(full.shape, MIDDLE, np.uint8)
        else:
            full = (high - low) / TOP
            zero = np.clip(np.rint(-low / np.where(full > 0, full, 1.0)), 0, TOP).astype(np.uint8)
        live = full > _LEAST_SCALE
        zero[~live] = MIDDLE
        for factor in _SYMMETRIC if self.symmetric else _ASYMMETRIC:
            self._offer(np.where(live, full * factor, 1.0), zero)
        for _ in range(_ROUNDS):
            steps = _nearest(self.values, self.scale, self.zero) - self.zero[:, :, None].astype(np.float32)
            along = (self.weight * steps * self.values).sum(axis=2, dtype=np.float64)
            square = (self.weight * np.square(steps)).sum(axis=2, dtype=np.float64)
            fitted = along / np.where(square > 0, square, 1.0)
            self._offer(np.where(fitted > _LEAST_SCALE, fitted, self.scale), self.zero)
        return self.scale, self.zero

    def _offer(self, scale: Array, zero: Array) -> None:
        scale = scale.astype(np.float32)
        reached = (_nearest(self.values, scale, zero) - zero[:, :, None].astype(np.float32)) * scale[:, :, None]
        error = (self.weight * np.square(self.values - reached)).sum(axis=2, dtype=np.float64)
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)
