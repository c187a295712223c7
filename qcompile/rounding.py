"""Second-order rounding: OBQ/GPTQ (Frantar et al. 2022) on a fixed scale grid, under the pair rule where it applies.

Minimises  sum_c e_c H e_c^T,  e = W - s*q,  column by column: each column's rounding error is spread over the columns not yet
rounded so that the layer's output changes least. H is the covariance of the layer's (quantised) input: the mean of the error is
left to bias correction. Everything is float64 but the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.qparams import PAIR_LIMIT, WEIGHT_MAX, Array, FloatArray, round_pairs
from qcompile.quadratic import is_live, mean_level, quadratic_error

#: The widest K: the moment, its inverse and factor take 3 * 8 * K^2 bytes, 0.9 GB here.
WIDEST = 6144
_BLOCK = 64


def second_order_round(
    weight: Array,
    scale: Array,
    moment: Array,
    start: Array,
    *,
    pair_rule: bool,
    damping: float = 0.01,
    top: int = WEIGHT_MAX,
    limits: tuple[Array, Array] | None = None,
) -> npt.NDArray[np.int8]:
    """Integers q [groups, channels, K] for `weight` of that shape, `scale` [groups, channels] and `moment` [groups, K, K].

    A scale of the weight's own shape gives each column its step (a scale a block, say); the pair rule then has no meaning.
    `limits`: least and greatest q, broadcast to the weight; -top and top where None. `start` holds integers that obey the same
    limits (round to nearest); a channel keeps them where they do not do worse, so the error on `moment` never exceeds theirs.
    Singular moments are damped, those with negative eigenvalues (noise) more; a moment of zeros returns `start`. Raises
    FloatingPointError where the moment is not finite, ValueError for the pair rule with a scale a column.
    """
    if not is_live(moment):
        return start.astype(np.int8)
    result = SecondOrder(moment, pair_rule=pair_rule, damping=damping).round(weight, scale, top=top, limits=limits)
    reached, before = (quadratic_error(weight, scale, q, moment) for q in (result, start))
    return np.where((reached < before)[:, :, None], result, start).astype(np.int8)


class SecondOrder:
    """Second-order rounding on one live moment [groups, K, K]: the order of the columns and the factor serve all scales.

    Raises FloatingPointError where the moment is not finite.
    """

    def __init__(self, moment: Array, *, pair_rule: bool, damping: float = 0.01) -> None:
        hessian = np.asarray(moment, np.float64)
        self.pair_rule = pair_rule
        self.order = _order(np.einsum("gkk->gk", hessian), pair_rule)
        level = mean_level(hessian)
        hessian = np.take_along_axis(np.take_along_axis(hessian, self.order[:, :, None], 1), self.order[:, None, :], 2)
        self.factor, _ = damped_factor(hessian, damping * level)

    def round(
        self, weight: Array, scale: Array, *, top: int = WEIGHT_MAX, limits: tuple[Array, Array] | None = None
    ) -> npt.NDArray[np.int8]:
        """Integers of `weight` on `scale` within `top` or `limits`, as `second_order_round`, whether they do better or not.

        Raises ValueError for the pair rule with a scale a column.
        """
        width, order = weight.shape[2], self.order
        matrix, steps = np.asarray(weight, np.float64), np.asarray(scale, np.float64)
        by_column = steps.ndim == 3
        if by_column and self.pair_rule:
            raise ValueError("the pair rule needs one scale a channel")
        unit = np.ones(steps.shape[:2]) if by_column else steps
        work = _by_column(matrix / unit[:, :, None], order)
        low, high = (np.full((1, width, 1), end) for end in (-top, top))
        if limits is not None:
            low, high = (_by_column(np.broadcast_to(limit, matrix.shape), order) for limit in limits)
        grid = _Grid(_by_column(steps, order) if by_column else np.ones((1, width, 1)), low, high)
        pairs = width // 2 * 2 if self.pair_rule else 0
        rounded = np.swapaxes(_sweep(work, self.factor, pairs, grid), 1, 2)
        result = np.empty(rounded.shape, np.int8)
        np.put_along_axis(result, np.broadcast_to(order[:, None, :], rounded.shape), rounded.astype(np.int8), 2)
        return result


def nearest(weight: Array, scale: Array, pair_rule: bool, top: int) -> npt.NDArray[np.int8]:
    """Round to nearest, [groups, channels, K], within +-top and the pair rule; `scale` is [groups, channels]."""
    target = np.asarray(weight, np.float64) / np.asarray(scale, np.float64)[:, :, None]
    q = round_pairs(target, top=top) if pair_rule else np.clip(np.rint(target), -top, top)
    return q.astype(np.int8)


@dataclass(frozen=True)
class _Grid:
    """Step and least and greatest integer of every column, [groups or 1, K, channels or 1], in the order of the sweep."""

    step: FloatArray
    low: Array
    high: Array


def _by_column(values: Array, order: npt.NDArray[np.int64]) -> Array:
    """[groups, channels, K] in the order of the sweep, as contiguous [groups, K, channels]."""
    return np.ascontiguousarray(np.swapaxes(np.take_along_axis(values, order[:, None, :], 2), 1, 2))


def _order(diagonal: FloatArray, pair_rule: bool) -> npt.NDArray[np.int64]:
    """Columns by falling moment (act-order); partners of a pair stay neighbours. Ties keep their order."""
    groups, width = diagonal.shape
    if not pair_rule:
        return np.argsort(-diagonal, axis=1, kind="stable")
    even = width // 2 * 2
    heads = np.argsort(-(diagonal[:, 0:even:2] + diagonal[:, 1:even:2]), axis=1, kind="stable") * 2
    order = np.stack([heads, heads + 1], axis=2).reshape(groups, even)
    return np.concatenate([order, np.full((groups, width - even), even)], axis=1) if width > even else order


def damped_factor(hessian: FloatArray, damping: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(U, damping) with inverse(H + damping * I) = U^T U, U upper triangular; `damping` [groups] grows where it must.

    Rounding may leave a moment that is not positive definite. Raises FloatingPointError where it is not finite.
    """
    if not np.isfinite(hessian).all():
        raise FloatingPointError("the second moment of a layer's input is not finite")
    identity = np.eye(hessian.shape[1])
    while True:  # ends: beyond the largest entry times K the sum is positive definite
        try:
            return _upper_factor(hessian + damping[:, None, None] * identity), damping
        except np.linalg.LinAlgError:
            damping = damping * 10


def _upper_factor(hessian: FloatArray) -> FloatArray:
    """U with inverse(H) = U^T U, U upper triangular: row i holds how column i's error spreads over the later ones."""
    inverse = np.linalg.inv(hessian)
    inverse = (inverse + np.swapaxes(inverse, 1, 2)) / 2
    return np.swapaxes(np.linalg.cholesky(inverse), 1, 2)


def _sweep(work: FloatArray, factor: FloatArray, pairs: int, grid: _Grid) -> FloatArray:
    """Round column after column; updates inside a block at once, behind it in one product per block.

    `work` is [groups, K, channels]: a column of the weight matrix is contiguous. It is used up.
    """
    width = work.shape[1]
    rounded = np.empty_like(work)
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        errors = np.empty((work.shape[0], end - begin, work.shape[2]))
        for column in range(begin, end):
            target = work[:, column]
            step = grid.step[:, column]
            q = np.clip(np.rint(_shared(work, column, pairs) / step), grid.low[:, column], grid.high[:, column])
            if column < pairs and column % 2:
                q = _limited(q, rounded[:, column - 1])
            rounded[:, column] = q
            error = (target - q * step) / factor[:, column, column][:, None]
            errors[:, column - begin] = error
            work[:, column + 1 : end] -= factor[:, column, column + 1 : end, None] * error[:, None, :]
        if end < width:
            work[:, end:] -= np.swapaxes(factor[:, begin:end, end:], 1, 2) @ errors
    return rounded


def _shared(work: FloatArray, column: int, pairs: int) -> FloatArray:
    """The target of `column`; the first of a pair leaves its partner half of what both together exceed the limit by."""
    target = work[:, column]
    if column >= pairs or column % 2:
        return target
    partner = work[:, column + 1]
    excess = np.abs(target + partner) - PAIR_LIMIT
    over = (excess > 0) & (target * partner > 0)
    return np.where(over, target - np.sign(target) * excess / 2, target) if over.any() else target


def _limited(q: FloatArray, first: FloatArray) -> FloatArray:
    """Clip the second of a pair so that |first + second| <= the limit where both have one sign."""
    room = PAIR_LIMIT - np.abs(first)
    return np.where((q * first > 0) & (np.abs(q) > room), np.sign(q) * room, q)
