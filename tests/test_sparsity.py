"""Rules, masks, criteria and second-order pruning, against plain loops and exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.criteria import CRITERIA
from qcompile.descent import descend
from qcompile.errors import InputError
from qcompile.graph import Array
from qcompile.lattice import Grid, round_on_lattice
from qcompile.obs import prune, refit, restrict
from qcompile.sparse_storage import Compressed, compress, decompress
from qcompile.sparsity import Pattern, Rule, Share, follows, keep_mask, parse_sparsity


@pytest.mark.parametrize(
    ("text", "rule"), [("2:4", Pattern(2, 4)), (" 1:8 ", Pattern(1, 8)), ("0.5", Share(0.5)), (".25", Share(0.25))]
)
def test_rules_are_read(text: str, rule: Rule) -> None:
    assert parse_sparsity(text) == rule
    assert parse_sparsity(str(rule)) == rule


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2:128", "0", "1", "1.5", "-.1", "nan", "two", "2:4:8", ""])
def test_rules_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError, match=r"--sparsity ") as caught:
        parse_sparsity(text)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 7), st.integers(2, 8), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_masks_keep_the_largest_of_each_block(kept: int, block: int, blocks: int, seed: int) -> None:
    kept = min(kept, block - 1)
    scores = np.random.default_rng(seed).integers(0, 4, size=(1, 3, block * blocks)).astype(float)
    mask = keep_mask(scores, Pattern(kept, block))
    for row, keep in zip(scores.reshape(-1, block), mask.reshape(-1, block), strict=True):
        assert keep.sum() == kept
        assert row[keep].min() >= row[~keep].max()
    assert follows(scores * mask, Pattern(kept, block))


def test_a_share_is_taken_from_the_layer_or_from_each_row() -> None:
    scores = np.arange(12.0).reshape(1, 3, 4)
    assert not keep_mask(scores, Share(0.5))[0, 0].any()
    assert keep_mask(scores, Share(0.5), by_row=True).sum(axis=2).tolist() == [[2, 2, 2]]
    assert keep_mask(np.zeros((1, 1, 4)), Share(0.5)).tolist() == [[[True, True, False, False]]]


def test_a_width_that_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match="do not divide into blocks of 4"):
        keep_mask(np.zeros((1, 1, 6)), Pattern(2, 4))
    assert not follows(np.zeros((1, 6)), Pattern(2, 4))


def test_criteria_are_what_their_papers_say() -> None:
    weight, power = np.array([[[3.0, -2.0], [1.0, 4.0]]]), np.array([[1.0, 4.0]])
    assert CRITERIA["magnitude"].scores(weight, None).tolist() == [[[9, 4], [1, 16]]]
    for name in ("wanda", "obd", "obs"):
        assert CRITERIA[name].scores(weight, power).tolist() == [[[4.5, 8], [0.5, 32]]]
        with pytest.raises(ValueError, match=f"criterion {name} needs"):
            CRITERIA[name].scores(weight, None)
    assert [c.name for c in CRITERIA.values() if not c.needs_data] == ["magnitude"]


def problem(groups: int = 1, channels: int = 4, width: int = 8, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, 200, width)) @ random.normal(size=(groups, width, width))
    return random.normal(size=(groups, channels, width)), np.swapaxes(x, 1, 2) @ x / 200


def damped(moment: Array, damping: float = 0.01) -> Array:
    level = np.einsum("gkk->gk", moment).mean(axis=1)
    return moment + damping * level[:, None, None] * np.eye(moment.shape[1])


def error(weight: Array, other: Array, moment: Array) -> Array:
    return np.einsum("gck,gkl,gcl->gc", weight - other, moment, weight - other)


def solved(weight: Array, moment: Array, mask: Array) -> Array:
    """Least squares on the support, row by row, by a dense solver."""
    result = np.zeros(weight.shape)
    for g, c in np.ndindex(weight.shape[:2]):
        on = np.flatnonzero(mask[g, c])
        result[g, c, on] = np.linalg.solve(moment[g][np.ix_(on, on)], (moment[g] @ weight[g, c])[on])
    return result


@pytest.mark.parametrize("seed", range(4))
def test_the_refit_is_least_squares_on_the_support(seed: int) -> None:
    weight, moment = problem(groups=2, width=12, seed=seed)
    moment = damped(moment)
    mask = keep_mask(np.square(weight), Pattern(2, 4))
    np.testing.assert_allclose(refit(weight, moment, mask), solved(weight, moment, mask), rtol=0, atol=1e-5)


def test_a_row_without_support_and_a_dead_input() -> None:
    weight, moment = problem()
    mask = np.zeros(weight.shape, bool)
    mask[:, 1:] = True
    fitted = refit(weight, damped(moment), mask)
    assert not fitted[:, 0].any()
    np.testing.assert_allclose(fitted[:, 1:], weight[:, 1:], atol=1e-9)
    dead = np.zeros_like(moment)
    assert (restrict(weight, dead, mask) == weight * mask).all()
    pruned, kept = prune(weight, dead, Pattern(2, 4))
    assert np.isfinite(pruned).all()
    assert (kept.reshape(-1, 4).sum(axis=1) == 2).all()


@pytest.mark.parametrize("rule", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(8, 16), Share(0.5)], ids=str)
def test_second_order_pruning_follows_the_rule_and_beats_the_others(rule: Rule) -> None:
    weight, moment = problem(groups=2, channels=6, width=32, seed=3)
    pruned, mask = prune(weight, moment, rule)
    assert ((pruned != 0) <= mask).all()
    assert follows(pruned, rule)
    h = damped(moment)
    power = np.einsum("gkk->gk", moment)
    for name in ("magnitude", "wanda", "obd"):
        plain = weight * keep_mask(CRITERIA[name].scores(weight, power), rule)
        assert error(weight, pruned, h).sum() < error(weight, plain, h).sum()


def test_two_of_four_comes_near_the_best_of_all_masks() -> None:
    weight, moment = problem(channels=8, width=8, seed=5)
    h = damped(moment)
    pruned, _ = prune(weight, moment, Pattern(2, 4))
    best = np.full(weight.shape[:2], np.inf)
    for first in combinations(range(4), 2):
        for second in combinations(range(4, 8), 2):
            mask = np.zeros(weight.shape, bool)
            mask[:, :, [*first, *second]] = True
            best = np.minimum(best, error(weight, solved(weight, h, mask), h))
    reached = error(weight, pruned, h)
    assert (reached >= best * (1 - 1e-6)).all()
    assert reached.sum() <= 1.3 * best.sum()


def test_a_moment_that_is_not_finite() -> None:
    weight, moment = problem()
    moment[0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        prune(weight, moment, Pattern(2, 4))


@pytest.mark.parametrize("pair_rule", [True, False])
@pytest.mark.parametrize("top", [127, 7])
def test_rounding_holds_zeros(pair_rule: bool, top: int) -> None:
    weight, moment = problem(groups=2, channels=6, width=16, seed=7)
    keep = keep_mask(np.square(weight), Pattern(2, 4))
    target = restrict(weight, moment, keep)
    scale = (np.abs(target).max(axis=2) / top * (2 if pair_rule else 1)).astype(np.float32)
    grid = Grid(np.float32(1.0), None, pair_rule, top, candidates=8)
    q, chosen = round_on_lattice(target, scale, moment, np.zeros(scale.shape), grid, keep)
    assert not q[~keep].any()
    assert q[keep].any()
    nearest = np.clip(np.rint(target / scale[:, :, None]), -top, top)
    h = damped(moment)
    if not pair_rule:
        assert error(target, q * chosen[:, :, None], h).sum() <= error(target, nearest * scale[:, :, None], h).sum()
    else:
        a, b = q[..., 0::2].astype(int), q[..., 1::2].astype(int)
        assert (np.abs(a + b)[a * b > 0] <= 128).all()


def test_descent_holds_zeros() -> None:
    weight, moment = problem(seed=9)
    keep = keep_mask(np.square(weight), Pattern(2, 4))
    scale = np.full(weight.shape[:2], 0.3)
    start = np.rint(weight * keep / 0.3).astype(np.int8)
    free = descend(weight, scale, moment, start, pair_rule=False)
    held = descend(weight, scale, moment, start, pair_rule=False, keep=keep)
    assert free[~keep].any()
    assert not held[~keep].any()
    h = damped(moment)
    assert error(weight, held * 0.3, h).sum() <= error(weight, start * 0.3, h).sum()


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_storage_gives_every_weight_back(rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    dense = random.integers(-127, 128, size=(rows, 3, 8)).astype(np.int8)
    dense *= keep_mask(random.normal(size=dense.shape), Pattern(2, 4))
    dense[random.random(dense.shape) < 0.1] = 0
    stored = compress(dense)
    assert stored is not None
    assert stored.values.nbytes + stored.indices.nbytes == dense.nbytes * 5 // 8
    assert (decompress(stored, dense.shape) == dense).all()


def test_the_documented_example() -> None:
    stored = compress(np.array([[1, 0, 2, 0, 0, 0, 3, 4]], np.int8))
    assert isinstance(stored, Compressed)
    assert stored.values.tolist() == [[1, 2], [3, 4]]
    assert stored.indices.tolist() == [8 + 16 * 14]


@pytest.mark.parametrize(
    "weight", [np.ones((2, 4)), np.zeros((1, 4)), np.zeros((2, 6)), np.zeros((0, 4))], ids=["dense", "odd", "width", "empty"]
)
def test_what_is_not_stored_compressed(weight: Array) -> None:
    assert compress(weight) is None
