"""Calibration: one streaming sweep over the data, exact min/max, MSE-optimal or percentile ranges from a bounded sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError
from qcompile.qparams import ActivationType, activation_params
from qcompile.runtime import Feeds, Session

Array = npt.NDArray[Any]

_CAPACITY = 1 << 17  # values kept of one tensor
_PER_FEED = 1 << 13  # values taken of one tensor from one feed
_BINS = 4096
MASKED = -1e30  # what lies below is an attention mask (-3.4e38), not data


@dataclass
class Observer:
    """Running statistics of one tensor: exact extremes, and a bounded, evenly thinned sample of its values."""

    low: float = np.inf
    high: float = -np.inf
    _chunks: list[Array] = field(default_factory=list)
    _kept: int = 0
    _stride: int = 1
    _feeds: int = 0

    def update(self, values: Array, name: str) -> None:
        """Add one feed's values. Raises DataError on NaN or +Inf."""
        flat = values.reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (low > MASKED and high < -MASKED):  # NaN lands here too
            if np.isnan(low) or high >= -MASKED:
                raise DataError(
                    f"tensor '{name}' became {'NaN' if np.isnan(low) else high} on the calibration data; check the inputs' scaling"
                )
            flat = flat[flat > MASKED]
            if flat.size == 0:
                return
            low = float(flat.min())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._feeds += 1
        if self._feeds % self._stride:
            return
        step = max(1, -(-flat.size // _PER_FEED))
        # An odd step walks through all channels and rows; an even one could visit a few columns only.
        self._chunks.append(flat[:: step | 1].copy())
        self._kept += self._chunks[-1].size
        if self._kept > _CAPACITY and len(self._chunks) > 1:
            self._chunks = self._chunks[1::2]
            self._kept = sum(c.size for c in self._chunks)
            self._stride *= 2

    @property
    def seen(self) -> bool:
        """Whether any value came by."""
        return self.low <= self.high

    def sample(self) -> Array:
        """The kept values, float32."""
        return np.concatenate(self._chunks).astype(np.float32) if self._chunks else np.zeros(0, np.float32)


def observe(
    session: Session, names: Iterable[str], feeds: Iterable[Feeds], progress: Callable[[], None] | None = None
) -> tuple[dict[str, Observer], int]:
    """Run every feed once and watch the tensors `names` (outputs of `session`). O(1) feeds in memory.

    Returns the observers and the number of feeds. Raises DataError where there was none.
    """
    wanted = list(names)
    observers = {name: Observer() for name in wanted}
    count = 0
    for feed in feeds:
        values = {**feed, **session.run(feed, [n for n in wanted if n in session.output_names])}
        for name in wanted:
            observers[name].update(np.asarray(values[name]), name)
        count += 1
        if progress is not None:
            progress()
    if count == 0:
        raise DataError("the calibration data are empty; give at least one sample with --data")
    return observers, count


def choose_range(observers: list[Observer], method: str, kind: ActivationType, percentile: float = 99.99) -> tuple[float, float]:
    """(low, high) for a scale that all `observers` share: `minmax`, `percentile` of |values|, or `mse` (least squared error)."""
    live = [o for o in observers if o.seen]
    if not live:
        return 0.0, 0.0
    low, high = min(0.0, *(o.low for o in live)), max(0.0, *(o.high for o in live))
    if method == "minmax" or high == low:
        return low, high
    values = np.concatenate([o.sample() for o in live]).astype(np.float64)
    if method == "percentile":
        tail = (100 - percentile) / 2 if low < 0 < high else 100 - percentile
        return (
            min(0.0, float(np.percentile(values, tail))) if low < 0 else 0.0,
            max(0.0, float(np.percentile(values, 100 - tail))) if high > 0 else 0.0,
        )
    return _least_squares(values, low, high, kind)


def _least_squares(values: Array, low: float, high: float, kind: ActivationType) -> tuple[float, float]:
    """Shrink both ends in turn until the mean squared quantisation error of the histogram stops falling."""
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    centres = (edges[1:] + edges[:-1]) / 2
    live = counts > 0
    centres, weights = centres[live], counts[live].astype(np.float64)

    def error(lo: float, hi: float) -> float:
        scale, zero = activation_params(lo, hi, kind)
        step = float(scale)
        q = np.clip(np.rint(centres / step) + zero, kind.low, kind.high)
        inside = np.abs((q - zero) * step - centres)
        # Inside the range the error of a value is uniform; at a bin's centre it would be an accident of the grid.
        clipped = inside > step / 2
        import os; P=float(os.environ.get('P','2')); return float((weights * np.where(clipped, inside**P, (step/2)**P/(P+1))).sum())

    best = error(low, high)
    factors = np.concatenate([np.linspace(1.0, 0.5, 51)[1:], np.linspace(0.5, 0.1, 21)[1:]])
    for _ in range(2):
        start = best
        for end in ("high", "low"):
            base = high if end == "high" else low
            if base == 0.0:
                continue
            trials = [(error(low, base * f) if end == "high" else error(base * f, high), base * f) for f in factors]
            found, value = min(trials)
            if found < best:
                best = found
                low, high = (low, value) if end == "high" else (value, high)
        if best >= start:
            break
    return low, high
