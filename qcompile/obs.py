"""Optimal Brain Surgeon for whole layers: which weights go, and what the remaining ones become.

    minimise  sum_c (v_c - w_c) H (v_c - w_c)^T     over masks that follow the rule and rows v_c that are zero outside them

H [groups, K, K] is the second moment of the layer's input, damped. No row can be solved exactly over masks; several proposals
are made, each refitted by least squares on its support, and the best kept (row by row where the rule allows):

- diagonal: w^2 H_kk (Wanda, Sun et al. 2023), and w^2 / [H^-1]_kk (OBS, Hassibi 1993);
- sweep (N:M only): block after block, the weights that cost least *together* given all that was dropped before, their error
  spread over the later columns (SparseGPT, Frantar and Alistarh 2023), by the factor that GPTQ uses;
- ADMM: weights pulled towards their projection on the rule, in turn with least squares (Boza 2024).

The refit makes prune and quantise one problem: v = argmin on the support implies |w - s q|_H^2 = |w - v|_H^2 + |v - s q|_H^2 for
every q with the same support, so that rounding v afterwards, zeros held, is as good as rounding w with the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import numpy.typing as npt

from qcompile.rounding import damped_factor
from qcompile.sparsity import Array, Mask, Pattern, Rule, choices, keep_mask

FloatArray = npt.NDArray[np.float64]

_BLOCK = 64  # columns whose errors reach the later ones in one product
_MOST_CHOICES = 70  # 4:8; beyond, the weights of a block are judged one by one
_TRIAL_STEPS = 12
_FINAL_STEPS = 80
_ROUNDS = 24  # of ADMM
_SETTLED = 1e-6  # of a row's first residual


def prune(weight: Array, moment: Array, rule: Rule, damping: float = 0.01) -> tuple[FloatArray, Mask]:
    """(V [groups, channels, K], mask) for `weight` of that shape and `moment` [groups, K, K]; V is zero outside the mask.

    Raises ValueError where the rule's M does not divide K, FloatingPointError where the moment is not finite.
    """
    target = np.asarray(weight, np.float64)
    hessian, inverse = _prepared(moment, damping)
    rough, wanted = hessian.astype(np.float32), target.astype(np.float32)
    best: tuple[FloatArray, Mask] | None = None
    least: FloatArray = np.zeros(0)
    for mask in _proposals(target, hessian, inverse, rule):
        fitted = refit(wanted, rough, mask, steps=_TRIAL_STEPS).astype(np.float64)
        error = _errors(fitted - target, hessian)
        if best is None:
            best, least = (fitted, mask), error
            continue
        # Rows are free of each other under N:M; a share of the layer is one budget for all of them.
        better = error < least if isinstance(rule, Pattern) else np.full(error.shape, error.sum() < least.sum())
        best = np.where(better[:, :, None], fitted, best[0]), np.where(better[:, :, None], mask, best[1])
        least = np.where(better, error, least)
    assert best is not None
    return refit(target, hessian, best[1], start=best[0]), best[1]


def restrict(weight: Array, moment: Array, mask: Mask, damping: float = 0.01) -> FloatArray:
    """The weights, zero outside `mask`, nearest to `weight` [groups, channels, K] on the (damped) `moment` [groups, K, K]."""
    if not np.einsum("gkk->gk", np.asarray(moment)).any():
        return np.asarray(weight, np.float64) * mask
    return refit(weight, _prepared(moment, damping)[0], mask)


def refit(weight: Array, hessian: Array, mask: Mask, *, start: Array | None = None, steps: int = _FINAL_STEPS) -> FloatArray:
    """Least squares on the support: rows v, zero outside `mask`, least in (v - w) H (v - w)^T. No step makes it worse.

    Conjugate gradients with H's diagonal as preconditioner, all rows at once; `hessian` must be positive definite. Computed in
    the type of `hessian`: float32 will do for trials.
    """
    h = hessian
    matrix: FloatArray = np.asarray(weight, h.dtype)
    keep = mask.astype(h.dtype)
    v = (matrix if start is None else np.asarray(start, h.dtype)) * keep
    scale = keep / np.einsum("gkk->gk", h)[:, None, :]
    residual = ((matrix - v) @ h) * keep
    z = residual * scale
    direction, rho = z, np.einsum("gck,gck->gc", residual, z)
    enough = np.square(_SETTLED) * np.maximum(rho, np.finfo(h.dtype).tiny)
    for _ in range(steps):
        active = rho > enough
        if not active.any():
            break
        moved = (direction @ h) * keep
        curvature = np.einsum("gck,gck->gc", direction, moved)
        length = np.where(active & (curvature > 0), rho / np.where(curvature > 0, curvature, 1.0), 0.0)[:, :, None]
        v = v + length * direction
        residual = residual - length * moved
        z = residual * scale
        fresh = np.einsum("gck,gck->gc", residual, z)
        direction = z + np.where(active, fresh / np.where(rho > 0, rho, 1.0), 0.0)[:, :, None] * direction
        rho = fresh
    return np.asarray(v)


def _prepared(moment: Array, damping: float) -> tuple[FloatArray, FloatArray]:
    """(H, inverse) with H damped by its mean diagonal; directions that the samples never showed then cost something."""
    h = np.array(moment, np.float64)
    if not np.isfinite(h).all():
        raise FloatingPointError("the second moment of a layer's input is not finite")
    level = np.abs(np.einsum("gkk->gk", h)).mean(axis=1)
    floor = max(1e-6 * float(level.max(initial=0.0)), 1e-30)  # a dead group's moment is mere cancellation
    factor, used = damped_factor(h, damping * np.maximum(level, floor))
    np.einsum("gkk->gk", h)[...] += used[:, None]
    return h, np.swapaxes(factor, 1, 2) @ factor


def _proposals(target: FloatArray, hessian: FloatArray, inverse: FloatArray, rule: Rule) -> list[Mask]:
    diagonal = np.einsum("gkk->gk", hessian)[:, None, :]
    found = [
        keep_mask(np.square(target) * diagonal, rule),
        keep_mask(np.square(target) / np.einsum("gkk->gk", inverse)[:, None, :], rule),
        _admm(target, hessian, rule),
    ]
    if isinstance(rule, Pattern):
        # The factor of H^-1 = U^T U, upper: row k holds how column k's error spreads over the later ones.
        found.append(_sweep(target, np.swapaxes(np.linalg.cholesky(inverse), 1, 2), rule))
    return found


def _errors(difference: FloatArray, hessian: FloatArray) -> FloatArray:
    """d H d^T of every row, [groups, channels]."""
    return np.asarray(np.einsum("gck,gck->gc", difference @ hessian, difference))


def _admm(target: FloatArray, hessian: FloatArray, rule: Rule) -> Mask:
    """Alternating directions on weights in units in which H has a diagonal of ones."""
    root = np.sqrt(np.einsum("gkk->gk", hessian))
    unit = hessian / (root[:, :, None] * root[:, None, :])
    matrix = target * root[:, None, :]
    wanted = matrix @ unit
    solve = np.linalg.inv(unit + np.eye(unit.shape[1]))
    mask = keep_mask(np.square(matrix), rule)
    projected, dual = matrix * mask, np.zeros_like(matrix)
    for _ in range(_ROUNDS):
        free = (wanted + projected - dual) @ solve
        mask = keep_mask(np.square(free + dual), rule)
        projected = (free + dual) * mask
        dual = dual + free - projected
    return mask


def _sweep(target: FloatArray, factor: FloatArray, rule: Pattern) -> Mask:
    """Blocks of M from the first to the last, [groups, channels, K]."""
    work = np.ascontiguousarray(np.swapaxes(target, 1, 2))
    kept = np.ones(work.shape, np.bool_)
    width, span = work.shape[1], max(1, _BLOCK // rule.block) * rule.block
    choose = _together(rule) if comb(rule.block, rule.kept) <= _MOST_CHOICES else _one_by_one(rule)
    for begin in range(0, width, span):
        end = min(begin + span, width)
        errors = np.zeros((work.shape[0], end - begin, work.shape[2]))
        for first in range(begin, end, rule.block):
            last = first + rule.block
            kept[:, first:last] = choose(work[:, first:last], factor[:, first:last, first:last])
            for column in range(first, last):
                error = np.where(kept[:, column], 0.0, work[:, column]) / factor[:, column, column][:, None]
                errors[:, column - begin] = error
                work[:, column + 1 : end] -= factor[:, column, column + 1 : end, None] * error[:, None, :]
        if end < width:
            work[:, end:] -= np.swapaxes(factor[:, begin:end, end:], 1, 2) @ errors
    return np.swapaxes(kept, 1, 2)


_Chooser = Callable[[FloatArray, FloatArray], Mask]


def _together(rule: Pattern) -> _Chooser:
    """The weights P of a block that cost least together: w_P ([H^-1]_PP)^-1 w_P^T."""
    ways = choices(rule)
    stays = np.ones((len(ways), rule.block), np.bool_)
    np.put_along_axis(stays, ways, False, axis=1)

    def choose(work: FloatArray, factor: FloatArray) -> Mask:
        inverse = np.swapaxes(factor, 1, 2) @ factor  # of the columns from this block on, H^-1 at the block
        losses = np.linalg.inv(inverse[:, ways[:, :, None], ways[:, None, :]])  # [groups, ways, p, p]
        dropped = work[:, ways]  # [groups, ways, p, channels]
        costs = np.einsum("gwpc,gwpq,gwqc->gwc", dropped, losses, dropped, optimize=True)
        return np.swapaxes(stays[np.argmin(costs, axis=1)], 1, 2)

    return choose


def _one_by_one(rule: Pattern) -> _Chooser:
    """By each weight's own cost, where there are too many ways to drop several."""

    def choose(work: FloatArray, factor: FloatArray) -> Mask:
        scores = np.square(work) / np.square(np.einsum("gkk->gk", factor))[:, :, None]
        return np.swapaxes(keep_mask(np.ascontiguousarray(np.swapaxes(scores, 1, 2)), rule), 1, 2)

    return choose
