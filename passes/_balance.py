"""How far a channel's scale moves between an activation and the weights that read it."""

from __future__ import annotations

import numpy as np

from qcompile.graph import Array

_LIMIT = 1e3  # scales stay in [1 / _LIMIT, _LIMIT], whatever the channels' extremes


def balance(spread: Array, weight: Array, strength: float) -> Array:
    """s[c] = spread[c]^a / weight[c]^(1 - a), a the `strength` (SmoothQuant, Xiao et al. 2023, equation 4), geometric mean 1.

    spread, weight: the largest magnitudes of each channel's activations and weights, float64. Channels where either is 0 keep 1.
    """
    scale = np.ones(spread.shape)
    live = (spread > 0) & (weight > 0)
    if live.any():
        logs = strength * np.log(spread[live]) - (1 - strength) * np.log(weight[live])
        scale[live] = np.exp(np.clip(logs - logs.mean(), -np.log(_LIMIT), np.log(_LIMIT)))
    return scale
