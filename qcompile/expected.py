"""Ranges and means of tensors without data: BatchNormalization statistics carried through Relu, Clip and Add.

With y normal, mean and deviation behind a Relu or Clip are known in closed form (Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", ICCV 2019, section 4.2.1 and appendix C), and a range is what lies within six
deviations of a channel's mean (same paper, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.bn_statistics import BatchNormRecord, ChannelStatistics, resolve
from qcompile.graph import Array, Graph
from qcompile.placement import clip_bounds

DEVIATIONS = 6.0  # as in the paper: 1e-9 of a normal distribution lies outside, some more of a real one


@dataclass(frozen=True)
class Expected:
    """What is known of a tensor over the training data: statistics by channel, and the range that its values keep to."""

    statistics: ChannelStatistics
    low: float
    high: float


def expected_values(graph: Graph, records: Sequence[BatchNormRecord]) -> dict[str, Expected]:
    """What `records` say about the tensors of the float `graph`, by name."""
    return propagate(graph, resolve(graph, records))


def propagate(graph: Graph, known: Mapping[str, ChannelStatistics]) -> dict[str, Expected]:
    """`known` carried on through Relu, Clip and Add, by tensor name.

    A normal tensor keeps to DEVIATIONS deviations around each channel's mean. Operands of an Add count as uncorrelated and
    their sum as normal. Other operators carry nothing.
    """
    found: dict[str, Expected] = {}
    for value in graph.values():
        node = value.producer
        if value.name in known:
            found[value.name] = _normal(known[value.name])
            continue
        if node is None or node.domain not in ("", "ai.onnx"):
            continue
        bounds = clip_bounds(node)
        if bounds is not None:
            source = found.get(node.inputs[0].name)
            if source is not None:
                found[value.name] = _clipped(source, *bounds)
        elif node.op == "Add":
            pair = [found.get(t.name) for t in node.inputs]
            if pair[0] is not None and pair[1] is not None:
                total = _sum(pair[0], pair[1])
                if total is not None:
                    found[value.name] = total
    return found


def clipped_moments(statistics: ChannelStatistics, low: float, high: float) -> ChannelStatistics:
    """Mean and deviation of min(max(y, low), high) for y normal with `statistics`; low <= high, either may be infinite."""
    mean, deviation = statistics.mean, np.maximum(statistics.deviation, 1e-12 * (1 + np.abs(statistics.mean)))
    a, b = (low - mean) / deviation, (high - mean) / deviation
    below, above = _cumulative(a), _cumulative(-b)
    inside = 1.0 - below - above
    pa, pb = _density(a), _density(b)
    # Moments of z = (y - mean) / deviation, clipped to [a, b]; an infinite end has probability 0.
    fa, fb = np.where(np.isfinite(a), a, 0.0), np.where(np.isfinite(b), b, 0.0)
    first = pa - pb + fa * below + fb * above
    second = inside + fa * pa - fb * pb + fa**2 * below + fb**2 * above
    return ChannelStatistics(mean + deviation * first, deviation * np.sqrt(np.maximum(second - first**2, 0.0)))


def _normal(statistics: ChannelStatistics) -> Expected:
    reach = DEVIATIONS * statistics.deviation
    return Expected(statistics, float((statistics.mean - reach).min()), float((statistics.mean + reach).max()))


def _clipped(source: Expected, low: float, high: float) -> Expected:
    ends = (min(max(end, low), high) for end in (source.low, source.high))
    return Expected(clipped_moments(source.statistics, low, high), *ends)


def _sum(left: Expected, right: Expected) -> Expected | None:
    a, b = left.statistics, right.statistics
    if a.mean.shape != b.mean.shape:
        return None
    total = _normal(ChannelStatistics(a.mean + b.mean, np.hypot(a.deviation, b.deviation)))
    return Expected(total.statistics, max(total.low, left.low + right.low), min(total.high, left.high + right.high))


def _density(z: Array) -> Array:
    return np.asarray(np.exp(-0.5 * np.square(np.clip(z, -40, 40))) / np.sqrt(2 * np.pi))


def _cumulative(z: Array) -> Array:
    """The normal distribution function."""
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
