"""The best integers and the best scale together: each channel's scale is judged by what second-order rounding makes of it.

Of a few weights, rounded together, some scale's grid happens to lie well; by the error after rounding rather than by that of
rounding to nearest, 9 weights of 4 bits (a depthwise kernel) gain 2.4 dB, 27 gain 1.5, 144 gain 0.6. Candidates lie on the dyadic
grid, so whichever is chosen is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.descent import descend
from qcompile.qparams import Array, grid_scales
from qcompile.quadratic import damped, is_live, quadratic_error
from qcompile.rounding import SecondOrder, nearest

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

    scale: the scales to start from, float32; least: those that an accumulator needs at least, [groups, channels]. Candidates are
    judged on the damped moment, on which no channel is worse than round to nearest at the scale it started from. keep: where
    False the weight is 0 and its integer stays 0.
    """
    best_scale = np.array(scale, np.float32)
    best_q = nearest(weight, scale, grid.pair_rule, grid.top)
    if not is_live(moment):
        return best_q, best_scale
    judge = damped(moment, grid.damping)
    rounding = SecondOrder(moment, pair_rule=grid.pair_rule, damping=grid.damping)
    limits = None if keep is None else (np.where(keep, -grid.top, 0), np.where(keep, grid.top, 0))
    best = quadratic_error(weight, best_scale, best_q, judge)
    peak = np.abs(np.asarray(weight, np.float64)).max(axis=2) / grid.top
    for factor in (None, *grid.factors(weight.shape[2])):
        trial = np.asarray(scale, np.float32)
        if factor is not None:
            wanted = np.maximum(peak * factor, least)
            trial = grid_scales(wanted.reshape(-1), grid.input_scale, grid.output_scale).reshape(wanted.shape)
        start, q = nearest(weight, trial, grid.pair_rule, grid.top), rounding.round(weight, trial, top=grid.top, limits=limits)
        gained = quadratic_error(weight, trial, q, moment) < quadratic_error(weight, trial, start, moment)
        q = np.where(gained[:, :, None], q, start)
        q = descend(
            weight, trial, moment, q, pair_rule=grid.pair_rule, damping=grid.damping, top=grid.top, sweeps=_SWEEPS, keep=keep
        )
        error = quadratic_error(weight, trial, q, judge)
        better = error < best
        best_q[better], best_scale[better], best[better] = q[better], trial[better], error[better]
    return best_q, best_scale
