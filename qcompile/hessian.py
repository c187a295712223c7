"""The trace of the loss's Hessian for each layer's weights, by forward passes alone (Hutchinson 1990; HAWQ-V2, Dong et al. 2020).

For v with independent entries +-1, E[v'Hv] = tr H. v'Hv is a finite difference along v:

    (L(w + e v) + L(w - e v) - 2 L(w)) / e^2     with labels
    2 KL(f || f(w + e v)) / e^2                  without: KL has value 0 and gradient 0 at w; and the same of noise / signal

The second is the Gauss-Newton (Fisher) curvature, never negative; the term in e^3 that it leaves is odd in v and averages out.
Probes are added, for all layers whose interval is still too wide, in rounds of the same sizes, until it is narrow enough, so that
the result does not depend on who computes what; `--max-seconds` is the one thing that makes it depend on the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.executors import Workers, result_of
from qcompile.probing import choose_step, probes

_FIRST = 8
_CHUNK = 8  # probes a task
_Z = 1.959963984540054  # of the normal distribution, 95 %


@dataclass(frozen=True)
class Trace:
    """What was found of one layer: the trace with its 95 % interval, from `probes` probes of `step`.

    disagreement: of the curvature at that step and at half of it, relative. tight: the interval is as narrow as was asked for.
    """

    trace: float
    low: float
    high: float
    probes: int
    step: float
    disagreement: float
    tight: bool


def estimate(values: Sequence[float], step: float = 0.0, disagreement: float = 0.0, tolerance: float = 0.0) -> Trace:
    """The mean of v'Hv over probes with Student's 95 % interval; one probe has an interval without end."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Trace(mean, -math.inf, math.inf, count, step, disagreement, False)
    half = student(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Trace(mean, mean - half, mean + half, count, step, disagreement, half <= tolerance * abs(mean))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Cornish-Fisher's expansion (Abramowitz and Stegun 26.7.5), within 1 % from 3 degrees
    of freedom on; exact for 1 and 2."""
    if freedom < 3:
        return (12.706204736432095, 4.302652729696142)[freedom - 1]
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / float(freedom) ** power for power, term in enumerate(terms)))


def traces(
    pool: Workers,
    layers: int,
    *,
    tolerance: float = 0.1,
    most: int = 256,
    max_seconds: float | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Trace | None]:
    """The trace of each of the pool's study's `layers`, until half the interval is `tolerance` of it or after `most` probes.

    max_seconds: no new probes after that; a layer whose first probes did not come in time is None.
    """
    started = clock()

    def late() -> bool:
        return max_seconds is not None and clock() - started > max_seconds

    steps: list[tuple[float, float] | None] = [None] * layers
    waiting = [(index, pool.submit(choose_step, index)) for index in range(layers)] if pool.count > 1 else []
    for index in range(layers):
        if waiting:
            steps[index] = None if late() and not waiting[index][1].done() else result_of(waiting[index][1])
        elif not late():
            steps[index] = result_of(pool.submit(choose_step, index))
        if progress is not None:
            progress(index + 1, layers)
    for _, future in waiting:
        future.cancel()
    values: list[list[float]] = [[] for _ in range(layers)]
    target = _FIRST
    while target <= most:
        wide = [i for i, s in enumerate(steps) if s is not None and not estimate(values[i] or [0.0], tolerance=tolerance).tight]
        wide = [i for i in wide if len(values[i]) < target]
        if not wide or late():
            break
        _round(pool, wide, target, steps, values, late)
        target *= 2
    return [
        estimate(values[i], *found, tolerance=tolerance) if found is not None and values[i] else None
        for i, found in enumerate(steps)
    ]


def _round(
    pool: Workers,
    wide: Sequence[int],
    target: int,
    steps: Sequence[tuple[float, float] | None],
    values: list[list[float]],
    late: Callable[[], bool],
) -> None:
    """Bring the layers `wide` to `target` probes; what is not done in time is dropped, from each layer's first gap on."""
    calls = []
    for index in wide:
        found = steps[index]
        assert found is not None
        have = len(values[index])
        for start in range(have, target, _CHUNK):
            calls.append((index, tuple(range(start, min(start + _CHUNK, target))), found[0]))
    if pool.count == 1:
        for call in calls:
            if late():
                return
            values[call[0]] += result_of(pool.submit(probes, *call))
        return
    futures = [pool.submit(probes, *call) for call in calls]
    gaps: set[int] = set()
    for call, future in zip(calls, futures, strict=True):
        if call[0] in gaps or (late() and not future.done()):
            future.cancel()
            gaps.add(call[0])
        else:
            more: list[float] = result_of(future)
            values[call[0]] += more
