"""The default criterion of channel pruning, against samples that it has not seen and against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from core_models import core_context, floats, model
from onnx import ModelProto

from qcompile.context import ChannelPruning
from qcompile.graph import Array, Graph
from qcompile.passes import _prune_second_order
from qcompile.passes._held_out import Fitted, Plain, fitted_pair
from qcompile.passes._prune_rules import trace
from qcompile.passes._prune_second_order import SecondOrder
from qcompile.passes.prune_channels import PruneChannels


def branches(copies: float = 0.1) -> ModelProto:
    """64 units that nothing can stand for, one row a sample; beside them 64 of which 48 are all but copies, 32 rows a sample."""
    text = """g (float[1, 64] x, float[1, 32, 64] z) => (float[1, 8] p, float[1, 32, 8] q) {
        a = Gemm(x, w0, b0)  r = Relu(a)  p = Gemm(r, w1, b1)
        b = MatMul(z, v0)  c = Add(b, c0)  s = Relu(c)  d = MatMul(s, v1)  q = Add(d, c1) }"""
    similar = np.tile(floats(64, 16, seed=6), (1, 4)) + np.float32(copies) * floats(64, 64, seed=7)
    weights = {"w0": floats(64, 64), "b0": floats(64, seed=1), "w1": floats(64, 8, seed=2), "b1": floats(8, seed=3)}
    return model(text, **weights, v0=similar, c0=floats(64, seed=4), v1=floats(64, 8, seed=5) / 5, c1=floats(8, seed=9))


def rows(count: int, seed: int = 0) -> list[dict[str, Array]]:
    return [{"x": floats(1, 64, seed=seed + 2 * i), "z": floats(1, 32, 64, seed=seed + 2 * i + 1)} for i in range(count)]


def test_a_layer_whose_few_rows_anything_fits_is_not_the_cheapest() -> None:
    """32 samples leave nothing of what 64 columns lose, for who tests on what he fitted; then independent units go first."""
    graph = Graph.from_proto(branches())
    PruneChannels().run(graph, core_context(rows(32), pruning=ChannelPruning(0.3, budget="params", multiple=16)))
    assert {n.outputs[0].name: n.inputs[1].dims[1] for n in graph.nodes if n.outputs[0].name in "ab"} == {"a": 64, "b": 16}


def random_pair(seed: int, rows: int = 40) -> tuple[Array, Array]:
    """Covariances of 9 correlated inputs on two parts of some samples."""
    random = np.random.default_rng(seed)
    mix = np.eye(9) + 0.3 * random.normal(size=(9, 9))
    first, second = (np.cov(random.normal(size=(rows, 9)) @ mix, rowvar=False) for _ in range(2))
    return first, second


def judged(matrix: Array, kept: list[int], fit: Array, judge: Array) -> float:
    """|W - W'|^2 under `judge`, W' the regression of W x on inputs `kept` under `fit`, spelt out."""
    best = np.zeros_like(matrix)
    best[:, kept] = np.linalg.lstsq(fit[np.ix_(kept, kept)], fit[kept] @ matrix.T, rcond=None)[0].T
    return float(np.trace((matrix - best) @ judge @ (matrix - best).T))


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_a_regression_judged_on_the_other_part(seed: int) -> None:
    matrix = np.random.default_rng(seed + 10).normal(size=(5, 9))
    roots = np.array([7, 3, 3, 5, 9, 7, 4, 5, 2])
    fit, judge = random_pair(seed)
    state, kept, before = Fitted(matrix, roots, np.linalg.inv(fit), judge), list(range(9)), 0.0
    for unit in (3, 9, 7, 2):
        kept = [k for k in kept if roots[k] != unit]
        after = judged(matrix, kept, fit, judge)
        assert state.losses()[unit] == pytest.approx(after - before, rel=1e-8, abs=1e-9)
        assert state.remove({unit}) == pytest.approx(after - before, rel=1e-8, abs=1e-9)
        before = after
    assert state.remove({3}) == 0.0
    assert set(state.losses()) == {4, 5} and state.matrix.shape == (5, 3)


def test_several_units_at_once_lose_what_they_lose_in_turn() -> None:
    fit, judge = random_pair(1)
    states = [Fitted(floats(4, 9).astype(np.float64), np.arange(9), np.linalg.inv(fit), judge) for _ in range(2)]
    assert states[0].remove({1, 4, 8}) == pytest.approx(sum(states[1].remove({u}) for u in (8, 1, 4)))
    np.testing.assert_allclose(states[0].matrix, states[1].matrix)


@pytest.mark.parametrize(("rows", "least", "most"), [(400, 0.0, 0.01), (11, 0.1, 100.0)], ids=["many rows", "few rows"])
def test_the_damping_is_what_the_other_part_likes(rows: int, least: float, most: float) -> None:
    matrix, covariances = floats(3, 9).astype(np.float64), random_pair(3, rows)
    level = float(np.mean([np.trace(c) / 9 for c in covariances]))
    pair = fitted_pair(matrix, np.arange(9), covariances, (0.001, 0.01, 0.1, 1.0, 10.0, 100.0))
    for half, fit in zip(pair, covariances, strict=True):
        strengths = np.diag(np.linalg.inv(half.inverse) - fit) / level
        np.testing.assert_allclose(strengths, strengths[0], rtol=1e-6)
        assert least - 1e-9 <= strengths[0] <= most + 1e-9


def test_wide_layers_lose_the_energy_of_their_columns() -> None:
    matrix, roots, power = floats(3, 4).astype(np.float64), np.array([5, 2, 2, 8]), np.array([1.0, 2.0, 3.0, 4.0])
    energy = np.square(matrix).sum(axis=0) * power
    state = Plain(matrix, roots, power)
    assert state.losses() == pytest.approx({5: energy[0], 2: energy[1] + energy[2], 8: energy[3]})
    assert state.remove({2, 8}) == pytest.approx(energy[1:].sum())
    assert state.losses() == pytest.approx({5: energy[0]})


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("wide", [False, True], ids=["fitted", "wide"])
def test_what_the_last_layer_loses_the_outputs_lose(monkeypatch: pytest.MonkeyPatch, biased: bool, wide: bool) -> None:
    """Its inputs' means are ten times their deviations; a bias takes them."""
    if wide:
        monkeypatch.setattr(_prune_second_order, "WIDEST", 4)
    ends = "d = MatMul(s, v1)  y = Add(d, c1)" if biased else "y = MatMul(s, v1)"
    text = f"g (float[1, 64, 6] x) => (float[1, 64, 3] y) {{ b = MatMul(x, v0)  s = Add(b, c0)  {ends} }}"
    weights: dict[str, Any] = {"v0": floats(6, 12) / 3, "c0": np.full(12, 10, np.float32), "v1": floats(12, 3, seed=1)}
    graph = Graph.from_proto(model(text, **weights, **({"c1": floats(3)} if biased else {})))
    graph.infer_shapes()
    judge = SecondOrder(trace(graph, lambda node: False), graph, [{"x": floats(1, 64, 6, seed=i)} for i in range(16)], 0)
    (reader,) = judge.readers
    # Without a fit (wide) cross terms of columns are left out of the loss, but not of what comes out.
    assert reader.gain == pytest.approx(64, rel=0.7 if wide else 0.15)


def test_scores_need_no_second_sample() -> None:
    graph = Graph.from_proto(branches())
    graph.infer_shapes()
    found = trace(graph, lambda node: False)
    scores = SecondOrder(found, graph, rows(1), 0).scores()
    assert len(scores) == 128 and all(np.isfinite(v) and v >= 0 for v in scores.values())


def test_dead_units_are_free_and_tell_nothing_of_the_others() -> None:
    """A probe of them alone would make the whole layer free."""
    source = branches()
    dead = Graph.from_proto(source)
    for name, axis in (("w0", 1), ("b0", 0)):
        values = dead.constants[name].array().copy()
        values[(slice(None),) * axis + (slice(0, 40),)] = 0
        dead.constants[name].assign(values)
    dead.infer_shapes()
    found = trace(dead, lambda node: False)
    scores = SecondOrder(found, dead, rows(32), 0).scores()
    slot = next(s for s in found.of_role("out") if s.node.outputs[0].name == "a")
    worth = [scores[int(r)] for r in found.roots(slot.ids)]
    assert max(worth[:40]) == 0 and min(worth[40:]) > 0.01 * max(worth)
