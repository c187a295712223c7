"""Matching channels for the pair rule: costs against plain loops, the matching against all matchings of few channels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from passes_helpers import floats

from qcompile.graph import Array
from qcompile.pairing import match_pairs, matching_cost, pair_costs
from qcompile.qparams import PAIR_LIMIT, quantise_weight


def plain_costs(weight: Array) -> Array:
    """The definition, one pair at a time."""
    rows, taps, channels = weight.shape
    cost = np.zeros((channels, channels))
    for row, tap, i, j in product(range(rows), range(taps), range(channels), range(channels)):
        peak = np.abs(weight[row]).max()
        a, b = weight[row, tap, [i, j]].astype(np.float64) * 127 / peak if peak > 0 else (0.0, 0.0)
        if i != j and a * b > 0:
            cost[i, j] += max(0.0, abs(a + b) - PAIR_LIMIT) ** 2
    return cost


def all_matchings(channels: list[int]) -> Iterator[list[int]]:
    if not channels:
        yield []
        return
    first, rest = channels[0], channels[1:]
    for partner in rest:
        for others in all_matchings([c for c in rest if c != partner]):
            yield [first, partner, *others]


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 1, 8), (3, 9, 6), (20, 1, 12)], ids=str)
def test_costs_are_what_the_rule_takes_away(shape: tuple[int, ...]) -> None:
    for seed in range(3):
        weight = floats(*shape, seed=seed)
        np.testing.assert_allclose(pair_costs(weight), plain_costs(weight), rtol=1e-9, atol=1e-9)


def test_equal_weights_exceed_by_126_and_opposite_ones_by_nothing() -> None:
    assert pair_costs(np.array([[[1.0, 1.0, -1.0, 0.0]]])).tolist() == [
        [0, 126.0**2, 0, 0],
        [126.0**2, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_dead_rows_cost_nothing() -> None:
    assert not pair_costs(np.zeros((2, 3, 4))).any()


@given(seed=st.integers(0, 2**32 - 1), channels=st.sampled_from([2, 4, 6, 8]), zeros=st.booleans())
def test_the_matching_is_a_permutation_close_to_the_best_of_all(seed: int, channels: int, zeros: bool) -> None:
    rng = np.random.default_rng(seed)
    cost = np.square(rng.normal(size=(channels, channels)))
    if zeros:
        cost[rng.random(cost.shape) < 0.5] = 0
    cost = cost + cost.T
    np.fill_diagonal(cost, 0)
    order = match_pairs(cost)
    assert sorted(order) == list(range(channels))
    found, given_cost = matching_cost(cost, order), matching_cost(cost, np.arange(channels))
    best = min(matching_cost(cost, np.asarray(m)) for m in all_matchings(list(range(channels))))
    assert best - 1e-9 <= found <= given_cost + 1e-9
    # No exchange between two pairs is left: with two pairs that is the best of all.
    if channels <= 4:
        assert found == pytest.approx(best, abs=1e-7 * cost.sum())
    np.testing.assert_array_equal(match_pairs(cost), order)


def test_exchanges_find_nearly_the_best_of_random_matchings() -> None:
    ratios = []
    for seed in range(20):
        cost = pair_costs(floats(6, 1, 8, seed=seed))
        best = min(matching_cost(cost, np.asarray(m)) for m in all_matchings(list(range(8))))
        ratios.append(matching_cost(cost, match_pairs(cost)) - best)
    assert np.median(ratios) == pytest.approx(0, abs=1e-6)


def test_the_order_is_kept_where_nothing_is_gained() -> None:
    assert match_pairs(np.zeros((6, 6))).tolist() == [0, 1, 2, 3, 4, 5]


def test_rounding_under_the_rule_gains_on_gaussian_weights() -> None:
    """The very purpose: 64 channels read by 64 rows, nearest integers under the rule, before and after."""
    weight = floats(64, 64, seed=4)
    order = match_pairs(pair_costs(weight[:, None, :]))

    def error(matrix: Array, rule: bool) -> float:
        made = quantise_weight(matrix, np.float32(1), None, pair_rule=rule)
        return float(np.square(matrix - made.values * made.scale[:, None].astype(np.float64)).sum())

    free, before, after = error(weight, False), error(weight, True), error(weight[:, order], True)
    assert after - free < 0.5 * (before - free)
