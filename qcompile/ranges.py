"""Calibration: one streaming sweep over the data; exact extremes, and percentiles from a bounded sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError
from qcompile.runtime import Feeds, Session

Array = npt.NDArray[Any]

_CAPACITY = 1 << 17  # values kept of one tensor
_PER_FEED = 1 << 13  # values taken of one tensor from one feed
MASKED = -1e30  # what lies below is an attention mask (-3.4e38), not data


@dataclass
class Observer:
    """Running statistics of one tensor: exact extremes, and a bounded, evenly thinned sample of its values.

    keep: whether to sample at all; extremes are always kept. channels: keep those of each place of `axis` too, as `lows` and
    `highs` (None where its size changes). settled: smoothing has chosen the scales of its channels for
    good; levelled: equalisation has; fixed: its range too (`low` and `high` may then lie inside the extremes of its channels).
    """

    keep: bool = True
    low: float = np.inf
    high: float = -np.inf
    channels: bool = False
    axis: int = -1
    lows: Array | None = None
    highs: Array | None = None
    settled: bool = False
    levelled: bool = False
    fixed: bool = False
    _chunks: list[Array] = field(default_factory=list)
    _steps: list[int] = field(default_factory=list)  # distance in memory between the values of each chunk
    _inner: list[int] = field(default_factory=list)  # values of one channel that stand side by side in memory
    _kept: int = 0
    _stride: int = 1
    _feeds: int = 0

    def update(self, values: Array, name: str) -> None:
        """Add one feed's values. Raises DataError on NaN or +Inf."""
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (low > MASKED and high < -MASKED):  # NaN lands here too
            if np.isnan(low) or high >= -MASKED:
                what = "NaN" if np.isnan(low) else high
                raise DataError(f"tensor '{name}' became {what} on the calibration data; check the inputs' scaling")
            values = np.where(values > MASKED, values, 0)
            low = float(values.min())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.channels:
            self._update_channels(values)
        self._feeds += 1
        if not self.keep or self._feeds % self._stride:
            return
        flat = values.reshape(-1)
        # An odd step walks through all columns and channels of an image; an even one could visit a few only.
        step = 1 if flat.size <= _PER_FEED else -(-flat.size // _PER_FEED) | 1
        self._chunks.append(np.array(flat[::step], np.float32))
        self._steps.append(step)
        self._inner.append(self._behind(values))
        self._kept += self._chunks[-1].size
        if self._kept > _CAPACITY and len(self._chunks) > 1:
            self._chunks, self._steps, self._inner = self._chunks[1::2], self._steps[1::2], self._inner[1::2]
            self._kept = sum(c.size for c in self._chunks)
            self._stride *= 2

    def _behind(self, values: Array) -> int:
        """Values between one channel and the next: the size of the axes behind `axis`."""
        return 1 if self.axis == -1 else prod(values.shape[self.axis + 1 :])

    def _update_channels(self, values: Array) -> None:
        inner = self._behind(values)
        width = values.shape[self.axis] if values.ndim > max(self.axis, 0) else 1
        blocks = values.reshape(-1, width, inner)
        lows, highs = blocks.min(axis=(0, 2)), blocks.max(axis=(0, 2))
        if self.lows is None or self.highs is None:
            self.lows, self.highs = lows, highs
        elif self.lows.shape != lows.shape:
            self.channels, self.lows, self.highs = False, None, None
        else:
            self.lows, self.highs = np.minimum(self.lows, lows), np.maximum(self.highs, highs)

    def rescaled(self, factor: Array, shift: Array | float = 0.0) -> Observer:
        """What would have been observed of (x - shift[c]) * factor[c], factor > 0, in each channel. Needs `lows` and `highs`."""
        if self.lows is None or self.highs is None or factor.shape != self.lows.shape or not np.all(factor > 0):
            raise ValueError("rescaling needs the extremes of each channel, and one positive factor a channel")
        moved = np.broadcast_to(np.asarray(shift), factor.shape)
        lows, highs = (self.lows - moved) * factor, (self.highs - moved) * factor
        result = Observer(
            self.keep,
            float(lows.min()),
            float(highs.max()),
            True,
            self.axis,
            lows,
            highs,
            self.settled,
            self.levelled,
            self.fixed,
        )
        width = factor.shape[0]
        # Chunks start at the first value of a row-major tensor, so that the place in memory tells the channel.
        places = [
            np.arange(chunk.size) * step // inner % width
            for chunk, step, inner in zip(self._chunks, self._steps, self._inner, strict=True)
        ]
        result._chunks = [((c - moved[p]) * factor[p]).astype(np.float32) for c, p in zip(self._chunks, places, strict=True)]
        result._steps, result._inner = list(self._steps), list(self._inner)
        result._kept, result._stride, result._feeds = self._kept, self._stride, self._feeds
        return result

    @property
    def seen(self) -> bool:
        """Whether any value came by."""
        return self.low <= self.high

    def sample(self) -> Array:
        """The kept values, float32."""
        return np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.float32)


@dataclass
class Thinned:
    """An evenly spaced selection of a stream of feeds: at most `most` of them and `budget_bytes`, in order."""

    budget_bytes: int
    most: int = 64
    kept: list[dict[str, Array]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def passing(self, feeds: Iterable[Feeds]) -> Iterator[Feeds]:
        """Yield every feed unchanged, keeping some."""
        for feed in feeds:
            if self._seen % self._stride == 0:
                self.kept.append(dict(feed))
                size = sum(a.nbytes for a in feed.values()) * len(self.kept)
                if (len(self.kept) > self.most or size > self.budget_bytes) and len(self.kept) > 1:
                    self.kept = self.kept[::2]
                    self._stride *= 2
            self._seen += 1
            yield feed


def observe(
    session: Session, observers: dict[str, Observer], feeds: Iterable[Feeds], progress: Callable[[], None] | None = None
) -> int:
    """Run every feed once and let `observers` watch the tensors they are named after. O(1) feeds in memory.

    Returns the number of feeds. Raises DataError where there was none.
    """
    wanted = list(observers)
    computed = [n for n in wanted if n in session.output_names]  # none where inputs alone are watched
    count = 0
    for feed in feeds:
        values = {**feed, **(session.run(feed, computed) if computed else {})}
        for name in wanted:
            observers[name].update(np.asarray(values[name]), name)
        count += 1
        if progress is not None:
            progress()
    if count == 0:
        raise DataError("the calibration data are empty; give at least one sample with --data")
    return count


def choose_range(observers: list[Observer], method: str, percentile: float = 99.99) -> tuple[float, float]:
    """(low, high) that all `observers` share, always holding 0: `percentile` of their values, else their exact extremes."""
    live = [o for o in observers if o.seen]
    if not live:
        return 0.0, 0.0
    low, high = min(0.0, *(o.low for o in live)), max(0.0, *(o.high for o in live))
    if method != "percentile":
        return low, high
    values = np.concatenate([o.sample() for o in live])
    tail = (100 - percentile) / 2 if low < 0 < high else 100 - percentile
    return (
        min(0.0, float(np.percentile(values, tail))) if low < 0 else 0.0,
        max(0.0, float(np.percentile(values, 100 - tail))) if high > 0 else 0.0,
    )
