"""Which channels stand side by side: a matching that leaves the pair rule little to forbid.

Kernels that add products in pairs take neighbours of the reduction, and two weights of one sign must not exceed `PAIR_LIMIT`
together (`qcompile.qparams`). Which channels are neighbours is free. The cost of a pair (i, j) is what the rule takes away,
summed over the rows that read them: sum of max(0, |w_i + w_j| - limit)^2 where both have one sign, in steps of each row's own
full scale. A minimum weight perfect matching on it is approximated: the hardest channels choose first, then partners are
exchanged between pairs while that lowers the cost (2-opt). With many channels almost every sum can be avoided.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.qparams import PAIR_LIMIT, WEIGHT_MAX

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_LEAST = 1e-9  # gains below this part of the whole cost are rounding


def pair_costs(weight: npt.NDArray[np.floating]) -> FloatArray:
    """Cost of each pair of channels, [channels, channels], symmetric, its diagonal 0; weight: [rows, taps, channels].

    Rows of zeros cost nothing. Every tap of a row shares the row's scale, so that its largest weight is WEIGHT_MAX steps.
    """
    rows, taps, channels = weight.shape
    matrix = np.asarray(weight, np.float64).reshape(rows, -1)
    peak = np.abs(matrix).max(axis=1, keepdims=True, initial=0.0)
    steps = (matrix * (WEIGHT_MAX / np.where(peak > 0, peak, 1.0))).reshape(rows * taps, channels)
    cost: FloatArray = np.zeros((channels, channels))
    for row in steps:
        for values in (row, -row):
            large = np.flatnonzero(values > PAIR_LIMIT / 2)  # one of the two always is
            if large.size == 0:
                continue
            others = np.flatnonzero(values > PAIR_LIMIT - float(values[large].max()))
            excess = np.square(np.maximum(values[large, None] + values[None, others] - PAIR_LIMIT, 0.0))
            excess[:, values[others] > PAIR_LIMIT / 2] *= 0.5  # two large ones meet twice, once from each side
            cost[np.ix_(large, others)] += excess
    cost = cost + cost.T
    np.fill_diagonal(cost, 0.0)
    return cost


def matching_cost(cost: FloatArray, order: IntArray) -> float:
    """The cost of the pairs (order[0], order[1]), (order[2], order[3]), ..."""
    return float(cost[order[0::2], order[1::2]].sum())


def match_pairs(cost: FloatArray) -> IntArray:
    """An order of the channels whose neighbours (2i, 2i + 1) cost little together; deterministic. Their number is even.

    Never worse than the order as it stands. Pairs stay in the order of their first channels.
    """
    given = np.arange(cost.shape[0])
    found = [_exchanged(cost, start) for start in (given, _greedy(cost))]
    best = min(found, key=lambda order: matching_cost(cost, order))  # the first wins ties
    pairs = np.sort(best.reshape(-1, 2), axis=1)
    return np.asarray(pairs[np.argsort(pairs[:, 0])].reshape(-1), np.int64)


def _greedy(cost: FloatArray) -> IntArray:
    """The channel with the largest costs takes the partner that costs least, among equals the one hardest to place."""
    total = cost.sum(axis=1)
    rank = np.argsort(-total, kind="stable")
    free = np.ones(total.size, bool)
    order: list[int] = []
    for channel in rank:
        if not free[channel]:
            continue
        free[channel] = False
        others = rank[free[rank]]
        partner = int(others[int(np.argmin(cost[channel, others]))])
        free[partner] = False
        order += [int(channel), partner]
    return np.asarray(order, np.int64)


def _exchanged(cost: FloatArray, order: IntArray) -> IntArray:
    """`order` after exchanges of partners between pairs, the best first, until none lowers the cost."""
    left, right = order[0::2].copy(), order[1::2].copy()
    least = _LEAST * float(cost.sum())
    while True:
        now = cost[left, right]
        both = now[:, None] + now[None, :]
        # (a, b), (c, d) -> (a, d), (c, b)  or  (a, c), (b, d)
        crossed = cost[np.ix_(left, right)]
        swapped = both - crossed - crossed.T
        joined = both - cost[np.ix_(left, left)] - cost[np.ix_(right, right)]
        gain = np.maximum(swapped, joined)
        np.fill_diagonal(gain, 0.0)
        partner = gain.argmax(axis=1)
        gains = gain[np.arange(left.size), partner]
        if gains.size == 0 or float(gains.max()) <= least:
            return np.stack([left, right], axis=1).reshape(-1)
        touched = np.zeros(left.size, bool)
        for first in np.argsort(-gains, kind="stable"):
            second = int(partner[first])
            if gains[first] <= least:
                break
            if touched[first] or touched[second]:
                continue
            touched[[first, second]] = True
            if swapped[first, second] >= joined[first, second]:
                right[first], right[second] = right[second], right[first]
            else:
                right[first], left[second] = left[second], right[first]
