"""Ranges of what functions read: where a function is flat, 8 bits need not tell its arguments apart.

GELU over [-16, 8]: below -2.9 it is within 1/2048 of its span of what it is at the end. [-2.9, 8] has half the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcompile.graph import Node
from qcompile.passes._functions_of import function_of

_POINTS = 1 << 13
_FLAT = 2.0**-11  # of the span of the function over the range


def bent_range(readers: Sequence[Node], low: float, high: float) -> tuple[float, float]:
    """The part of [low, high] outside of which every function that reads the tensor stays within 1/2048 of its span."""
    if not low < high:
        return low, high
    x = np.linspace(low, high, _POINTS)
    first, last = _POINTS - 1, 0
    for node in readers:
        f = function_of(node)
        if f is None:
            return low, high
        with np.errstate(all="ignore"):
            y = np.asarray(f(x), np.float64)
        if not np.isfinite(y).all():
            return low, high
        tolerance = (y.max() - y.min()) * _FLAT
        first = min(first, _flat_until(y, tolerance))
        last = max(last, _POINTS - 1 - _flat_until(y[::-1], tolerance))
    return (float(x[first]), float(x[last])) if first < last else (low, high)


def _flat_until(y: npt.NDArray[np.float64], tolerance: float) -> int:
    """The last point up to which all values, that point's own too, lie within `tolerance` of it."""
    # the running extremes from the end inwards: flat up to i where both are within the tolerance of y[i]
    high, low = np.maximum.accumulate(y), np.minimum.accumulate(y)
    flat = np.flatnonzero((high - y <= tolerance) & (y - low <= tolerance))
    return int(flat.max()) if flat.size and flat[0] == 0 else 0
