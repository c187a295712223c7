"""The quadratic form that rounding minimises, e H e^T with e = W - s q, and how its matrix is damped. All in float64."""

from __future__ import annotations

import numpy as np

from qcompile.qparams import Array, FloatArray


def quadratic_error(weight: Array, scale: Array, q: Array, moment: Array) -> FloatArray:
    """e H e^T of every channel, [groups, channels], for `weight` and `q` [groups, channels, K] and `moment` [groups, K, K].

    scale: one a channel, [groups, channels], or of the weight's own shape.
    """
    steps = np.asarray(scale, np.float64)
    error = np.asarray(weight, np.float64) - q.astype(np.float64) * (steps if steps.ndim == 3 else steps[:, :, None])
    return np.asarray(np.einsum("gck,gck->gc", error @ np.asarray(moment, np.float64), error))


def mean_level(moment: FloatArray) -> FloatArray:
    """The mean variance of each group, [groups]; of a dead one, whose moments are mere cancellation, a bit of the liveliest's."""
    level = np.einsum("gkk->gk", moment).mean(axis=1)
    return np.asarray(np.maximum(level, max(1e-6 * float(level.max(initial=0.0)), 1e-30)))


def damped(moment: Array, damping: float) -> FloatArray:
    """A copy of `moment` [groups, K, K] with `damping` times its mean level on the diagonal: no direction is free."""
    result = np.array(moment, np.float64)
    level = mean_level(result)
    np.einsum("gkk->gk", result)[...] += damping * level[:, None]
    return result


def is_live(moment: Array) -> bool:
    """Whether any input varies: a moment of zeros cannot tell one rounding from another."""
    return bool((np.einsum("gkk->gk", moment) > 0).any())
