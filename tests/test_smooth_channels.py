"""Smoothing: where channels come from, scales, statistics, and real transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from passes_helpers import floats, parse
from smooth_models import smoothed

from qcompile.context import Context
from qcompile.graph import Array, Graph
from qcompile.passes._channels import Tracer, same_columns, source_of
from qcompile.passes.smooth import migration_scale
from qcompile.ranges import Observer

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


# ---- channel numbers ----


def columns_of(text: str, feeds: list[dict[str, Array]], name: str, **constants: Array) -> Array | None:
    graph = Graph.from_proto(parse(text, **constants))
    tensor = next(v for v in graph.values() if v.name == name)
    source = source_of(tensor)
    assert source is not None
    return same_columns(Tracer(graph, [source], feeds).reach(source), tensor)


CHAIN = "g (float[M,6] x) => (float[A,B] y) {{ h = Gemm(x, w) {} }}"


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        pytest.param("y = Relu(h)", [0, 1, 2, 3, 4, 5], id="relu"),
        pytest.param("y = Div(h, two)", [0, 1, 2, 3, 4, 5], id="scalar"),
        pytest.param("r = Reshape(h, s) t = Transpose<perm=[0,2,1]>(r) y = Flatten(t)", [0, 2, 4, 1, 3, 5], id="permuted"),
        pytest.param("a, b = Split<axis=1, num_outputs=2>(h) y = Identity(b)", [3, 4, 5], id="split"),
        pytest.param("y = Reshape(h, long)", [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], id="two rows side by side"),
        pytest.param("y = Reshape(h, short)", None, id="rows and channels mixed"),
        pytest.param("y = Transpose(h)", None, id="channels in rows"),
    ],
)
def test_columns(tail: str, expected: list[int] | None) -> None:
    constants = {
        "w": floats(6, 6),
        "two": np.float32(2),
        "s": np.array([-1, 3, 2]),
        "long": np.array([-1, 12]),
        "short": np.array([-1, 4]),
    }
    text = CHAIN.format(tail)
    found = columns_of(text, [{"x": floats(4, 6)}, {"x": floats(8, 6)}], "y", **{k: v for k, v in constants.items() if k in text})
    assert (None if found is None else found.tolist()) == expected


def test_columns_that_depend_on_the_shape_are_none() -> None:
    text = (
        "g (float[M,6] x) => (float[A,B] y) { h = Gemm(x, w) r = Reshape(h, s) t = Transpose<perm=[1,0]>(r) y = Reshape(t, e) }"
    )
    constants = {"w": floats(6, 6), "s": np.array([6, -1]), "e": np.array([-1, 6])}
    assert columns_of(text, [{"x": floats(1, 6)}], "y", **constants) is not None
    assert columns_of(text, [{"x": floats(1, 6)}, {"x": floats(2, 6)}], "y", **constants) is None


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param("y = Sigmoid(h)", id="sigmoid"),
        pytest.param("y = Div(two, h)", id="reciprocal"),
        pytest.param("y = Add(h, two)", id="offset"),
        pytest.param("y = Mul(h, zero)", id="times zero"),
        pytest.param("y = MatMul(h, w)", id="product that mixes"),
    ],
)
def test_nothing_else_is_homogeneous(tail: str) -> None:
    text = CHAIN.format(tail)
    constants = {"w": floats(6, 6), "two": np.float32(2), "zero": np.float32(0)}
    graph = Graph.from_proto(parse(text, **{k: v for k, v in constants.items() if k in text}))
    assert source_of(next(v for v in graph.values() if v.name == "y")) is None


# ---- scales and statistics ----


def test_scale_follows_the_formula_and_keeps_dead_channels() -> None:
    observer = Observer(lows=np.array([-4.0, 0.0, -1.0, 0.0]), highs=np.array([2.0, 9.0, 1.0, 0.0]))
    weight = np.array([[1.0, -2.0], [0.5, 0.25], [0.0, 0.0], [3.0, 3.0]])
    raw = np.array([4.0**0.7 / 2.0**0.3, 9.0**0.7 / 0.5**0.3])
    wanted = raw / np.sqrt(raw.prod())
    np.testing.assert_allclose(migration_scale(observer, [weight], 0.7), [*wanted, 1.0, 1.0], rtol=1e-6)
    observer.highs = np.array([1e12, 1e-12, 1.0, 0.0])
    observer.lows = np.zeros(4)
    np.testing.assert_allclose(migration_scale(observer, [weight], 0.8), [1e3, 1e-3, 1.0, 1.0], rtol=1e-6)


def test_observer_keeps_the_extremes_of_each_channel() -> None:
    values = [floats(3, 5, 4, seed=i) for i in range(3)]
    observer = Observer(channels=True)
    for value in values:
        observer.update(value, "x")
    everything = np.concatenate(values).reshape(-1, 4)
    np.testing.assert_array_equal(observer.lows, everything.min(axis=0))
    np.testing.assert_array_equal(observer.highs, everything.max(axis=0))
    factor = np.array([2.0, 0.5, 1.0, 4.0])
    again = observer.rescaled(factor)
    assert (again.low, again.high) == ((everything * factor).min(), (everything * factor).max())
    np.testing.assert_allclose(
        again.sample(), (np.concatenate([v.reshape(-1, 4) for v in values]) * factor).reshape(-1), rtol=1e-6
    )
    observer.update(floats(2, 3), "x")
    assert observer.lows is None and not observer.channels
    with pytest.raises(ValueError, match="extremes of each channel"):
        observer.rescaled(factor)


def test_samples_of_large_tensors_are_rescaled_by_their_channel() -> None:
    value = floats(3000, 7)
    factor = np.linspace(0.5, 3, 7)
    before, after = Observer(channels=True), Observer(channels=True)
    before.update(value, "x")
    after.update((value * factor).astype(np.float32), "x")
    assert before.sample().size < value.size
    np.testing.assert_allclose(before.rescaled(factor).sample(), after.sample(), rtol=1e-6)


@pytest.mark.zoo
def test_a_vision_transformer_needs_no_insertion_but_behind_gelu() -> None:
    if not (ZOO / "vit_mnist").is_dir():
        pytest.skip("../shared/zoo is absent")
    pytest.importorskip("PIL")
    import importlib.util
    from itertools import islice

    from qcompile.load import load_model
    from qcompile.passes import PASSES

    spec = importlib.util.spec_from_file_location("tasks", ZOO / "tasks.py")
    assert spec is not None and spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    feeds = list(islice(tasks.vit_mnist_calib(), 24))
    graph = load_model(ZOO / "vit_mnist" / "model.onnx").graph
    for step in PASSES[: next(i for i, p in enumerate(PASSES) if p.name == "calibrate")]:
        step.run(graph, Context())
    report, smooth_graph, _ = smoothed(graph.to_proto(), feeds)
    assert report.rewrites == 17
    assert sum(n.outputs[0].name.endswith("_smoothed") for n in smooth_graph.nodes) <= 5
