"""Coordinate descent on integers: what column-by-column rounding leaves on the table, one weight at a time.

    q_k <- round(q_k + (e H)_k / (H_kk s)),   e = W - s q

minimises  e H e^T  along one coordinate exactly, the others fixed (Gauss-Seidel on the lattice; the local search of CDQuant,
Nair and Suggala 2024). Started at the second-order solution it only ever falls. All channels move at once; blocks of columns are
updated together as in `qcompile.rounding`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.qparams import PAIR_LIMIT, WEIGHT_MAX, Array, FloatArray
from qcompile.quadratic import damped, is_live, quadratic_error

_BLOCK = 64


def descend(
    weight: Array,
    scale: Array,
    moment: Array,
    start: Array,
    *,
    pair_rule: bool,
    damping: float = 0.01,
    top: int = WEIGHT_MAX,
    sweeps: int = 4,
    keep: Array | None = None,
) -> npt.NDArray[np.int8]:
    """Integers q [groups, channels, K], no channel worse than `start` on `moment` [groups, K, K]; shapes as there.

    Ends early where a sweep moves nothing. The moment is damped by its mean diagonal as for second-order rounding, so that
    directions which the samples never showed are not free; limits are those of `start`: +-top and, if asked for, the pair rule.
    keep: where False an integer stays 0 (its `start` must be 0).
    """
    if not is_live(moment):
        return start.astype(np.int8)
    hessian = damped(moment, damping)
    matrix = np.ascontiguousarray(np.swapaxes(np.asarray(weight, np.float64), 1, 2))
    steps = np.asarray(scale, np.float64)[:, None, :]
    q = np.ascontiguousarray(np.swapaxes(start, 1, 2)).astype(np.float64)
    gradient = hessian @ (matrix - q * steps)
    free = None if keep is None else np.ascontiguousarray(np.swapaxes(keep, 1, 2))
    for _ in range(sweeps):
        if not _sweep(q, gradient, hessian, steps, top, pair_rule, free):
            break
    moved = np.swapaxes(q, 1, 2)
    better = quadratic_error(weight, scale, moved, moment) < quadratic_error(weight, scale, start, moment)
    return np.where(better[:, :, None], moved, start).astype(np.int8)


def _sweep(
    q: FloatArray, gradient: FloatArray, hessian: FloatArray, steps: FloatArray, top: int, pair_rule: bool, free: Array | None
) -> bool:
    """Every column once, in place; `gradient` is H e, [groups, K, channels]. Returns whether anything moved."""
    width = q.shape[1]
    paired = width // 2 * 2 if pair_rule and 2 * top > PAIR_LIMIT else 0
    any_moved = False
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        moves = np.zeros((q.shape[0], end - begin, q.shape[2]))
        local = gradient[:, begin:end]
        for column in range(begin, end):
            diagonal = hessian[:, column, column][:, None]
            best = q[:, column] + local[:, column - begin] / (diagonal * steps[:, 0])
            low, high = _room(q[:, column ^ 1], top) if column < paired else (-top, top)
            best = np.clip(np.rint(best), low, high)
            if free is not None:
                best = best * free[:, column]
            change = (best - q[:, column]) * steps[:, 0]
            if not change.any():
                continue
            any_moved = True
            q[:, column] = best
            moves[:, column - begin] = change
            local -= hessian[:, begin:end, column, None] * change[:, None, :]
        if moves.any():
            for rest in (slice(0, begin), slice(end, width)):
                gradient[:, rest] -= hessian[:, rest, begin:end] @ moves
    return any_moved


def _room(partner: FloatArray, top: int) -> tuple[FloatArray, FloatArray]:
    """Least and greatest value beside `partner` under the pair rule: |sum| within the limit where the signs agree."""
    low = np.where(partner < 0, np.maximum(-top, -PAIR_LIMIT - partner), -top)
    return low, np.where(partner > 0, np.minimum(top, PAIR_LIMIT - partner), top)
