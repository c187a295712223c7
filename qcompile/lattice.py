"""The best integers and the best scale together: each channel's scale is judged by what second-order rounding makes of it.

Of a few weights, rounded together, some scale's grid happens to lie well; by the error after rounding rather than by that of
rounding to nearest, 9 weights of 4 bits (a depthwise kernel) gain 2.4 dB, 27 gain 1.5, 144 gain 0.6. Candidates lie on the dyadic
grid, so whichever is chosen is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.descent import descend
from qcompile.qparams import grid_scales
from qcompile.rounding import nearest, second_order_round

Array = npt.NDArray[Any]

_NARROWEST, _WIDEST = 0.45, 1.2  # of max|W| / top
_SWEEPS = 4


@dataclass(frozen=True)
class Grid:
    """Which scales and integers a layer may use: its rescale's ends (output None: any scale), limits, and how hard to search."""

    input_scale: np.float32
    output_scale: np.float32 | None
    pair_rule: bool
    top: int
    damping: float = 0.01
    candidates: int = 0

    def factors(self, width: int) -> Sequence[float]:
        """Scales to try for a reduction over `width` weights, relative to max|W| / top; the fewer weights, the more pay."""
        count = self.candidates if width <= 64 else self.candidates // 2 if width <= 512 else self.candidates // 4
        return [float(f) for f in np.linspace(_NARROWEST, _WIDEST, count)] if count else []


def round_on_lattice(
    weight: Array, scale: Array, moment: Array, least: Array, grid: Grid, keep: Array | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Integers [groups, channels, K] and scales [groups, channels] for `weight` of that shape and `moment` [groups, K, K].

    scale: the scales to start from, float32; least: those that an accumulator needs at least, [groups, channels]. No channel is
    worse on the (damped) moment than round to nearest at the scale it started from. keep: where False the weight is 0 and its
    integer stays 0.
    """
    damped = np.array(moment, np.float64)
    level = np.abs(np.einsum("gkk->gk", damped)).mean(axis=1)
    np.einsum("gkk->gk", damped)[...] += grid.damping * level[:, None]
    best_q = _round(weight, scale, moment, grid, keep)
    best_scale = np.array(scale, np.float32)
    if not (level > 0).any():
        return best_q, best_scale
    best = _error(weight, best_scale, damped, best_q)
    peak = np.abs(np.asarray(weight, np.float64)).max(axis=2) / grid.top
    for factor in grid.factors(weight.shape[2]):
        wanted = np.maximum(peak * factor, least)
        trial = grid_scales(wanted.reshape(-1), grid.input_scale, grid.output_scale).reshape(wanted.shape)
        q = _round(weight, trial, moment, grid, keep)
        error = _error(weight, trial, damped, q)
        better = error < best
        best_q[better], best_scale[better], best[better] = q[better], trial[better], error[better]
    return best_q, best_scale


def _round(weight: Array, scale: Array, moment: Array, grid: Grid, keep: Array | None) -> npt.NDArray[np.int8]:
    pair_rule, damping, top = grid.pair_rule, grid.damping, grid.top
    start = nearest(weight, scale, pair_rule, top)
    limits = None if keep is None else (np.where(keep, -top, 0), np.where(keep, top, 0))
    q = second_order_round(weight, scale, moment, start, pair_rule=pair_rule, damping=damping, top=top, limits=limits)
    return descend(weight, scale, moment, q, pair_rule=pair_rule, damping=damping, top=top, sweeps=_SWEEPS, keep=keep)


def _error(weight: Array, scale: Array, moment: Array, q: Array) -> npt.NDArray[np.float64]:
    error = np.asarray(weight, np.float64) - q.astype(np.float64) * np.asarray(scale, np.float64)[:, :, None]
    return np.asarray(np.einsum("gck,gck->gc", error @ moment, error))
