"""Smoothing: exact in float, 1/s where it costs nothing, statistics kept true, every refusal with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from passes_helpers import UNMEASURED, floats, ops, parse

from qcompile.context import Context, Settings
from qcompile.errors import PassError
from qcompile.graph import Array, Graph
from qcompile.passes import smooth as smooth_module
from qcompile.passes._channels import Tracer, same_columns, source_of
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.quantise import Quantise, scale_sources
from qcompile.passes.smooth import Smooth, migration_scale
from qcompile.placement import place
from qcompile.ranges import Observer
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
K = 16
OUTLIERS = np.where(np.arange(K) % 8 == 3, 30.0, np.where(np.arange(K) % 8 == 5, -12.0, 0.4)).astype(np.float32)


def calibrated(model: ModelProto, feeds: list[dict[str, Array]], settings: Settings | None = None) -> tuple[Graph, Context]:
    graph = Graph.from_proto(model)
    context = Context(settings or Settings(), calibration=lambda: feeds)
    Calibrate().run(graph, context)
    return graph, context


def smoothed(
    model: ModelProto, feeds: list[dict[str, Array]], settings: Settings | None = None, **options: object
) -> tuple[Report, Graph, Context]:
    """Run the pass; asserts a valid model, equal outputs, exact statistics and an idle second run."""
    graph, context = calibrated(model, feeds, settings)
    pass_ = Smooth(**options)  # type: ignore[arg-type]
    report = pass_.run(graph, context)
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    for level in (Optimisation.OFF, Optimisation.ALL):
        before, after = Session(model, optimisation=level), Session(result, optimisation=level)
        for feed in feeds:
            for name, value in before.run(feed).items():
                scale = float(np.abs(value).max())
                np.testing.assert_allclose(after.run(feed)[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)
    assert pass_.run(graph, context).rewrites == 0, "a second run rewrote something"
    fresh = Context(context.settings, calibration=lambda: feeds)
    Calibrate().run(graph, fresh)
    assert list(context.observers) == list(fresh.observers) == scale_sources(graph, place(graph, context.settings))
    for name, observer in fresh.observers.items():
        kept = context.observers[name]
        np.testing.assert_allclose([kept.low, kept.high], [observer.low, observer.high], rtol=2e-5, err_msg=name)
        if kept.lows is not None:
            np.testing.assert_allclose(kept.lows, observer.lows, rtol=1e-4, atol=1e-5 * observer.high, err_msg=name)
            np.testing.assert_allclose(kept.highs, observer.highs, rtol=1e-4, atol=1e-5 * observer.high, err_msg=name)
    return report, graph, context


def rows(*shape: int, name: str = "x", count: int = 4) -> list[dict[str, Array]]:
    return [{name: floats(*shape, seed=i)} for i in range(count)]


def normalised(tail: str, outputs: str = "float[M,8] y", **constants: Array) -> ModelProto:
    """n = LayerNormalization(x) with outlier channels, then `tail`."""
    text = f"g (float[M,{K}] x) => ({outputs}) {{ n = LayerNormalization(x, gamma, beta) {tail} }}"
    values = {"gamma": OUTLIERS, "beta": floats(K, seed=7), "w": floats(K, 8, seed=8), "v": floats(8, K, seed=9), **constants}
    return parse(text, **{k: v for k, v in values.items() if k in text})


# ---- where 1/s goes ----
def test_two_gemms_are_fed_by_the_scaled_layer_norm() -> None:
    model = normalised("q = Gemm(n, w) k = Gemm<transB=1>(n, v) y = Add(q, k)")
    report, graph, context = smoothed(model, rows(20, K))
    assert report.rewrites == 1
    assert ops(graph) == {"LayerNormalization": 1, "Gemm": 2, "Add": 1}
    norm = next(n for n in graph.nodes if n.op == "LayerNormalization")
    scale = OUTLIERS / norm.constant(1).array()  # type: ignore[union-attr]
    assert scale[3] > 10 * scale[0] > 0, "the outlier channel was not narrowed"
    for gemm, before in zip(
        (n for n in graph.nodes if n.op == "Gemm"), (floats(K, 8, seed=8), floats(8, K, seed=9)), strict=True
    ):
        factor = scale[None, :] if gemm.attr("transB", 0) else scale[:, None]
        np.testing.assert_allclose(gemm.constant(1).array(), before * factor, rtol=1e-5)  # type: ignore[union-attr]
    assert context.observers["n"].settled


def test_a_shared_constant_is_not_changed_for_its_other_readers() -> None:
    tail = "q = Gemm(n, w) m = LayerNormalization(q2, gamma, beta) k = Gemm(n, w) s = Add(q, k) y = Concat<axis=1>(s, m)"
    model = normalised(tail.replace("q2", "x"), "float[M,24] y")
    report, graph, _ = smoothed(model, rows(20, K))
    assert report.rewrites == 1
    other = next(n for n in graph.nodes if n.outputs[0].name == "m")
    np.testing.assert_array_equal(other.constant(1).array(), OUTLIERS)  # type: ignore[union-attr]


def test_a_layer_norm_without_bias_through_a_reshape() -> None:
    text = f"""g (float[B,L,{K}] x) => (float[M,8] y) {{
        n = LayerNormalization(x, gamma) f = Reshape(n, shape) y = Gemm(f, w) }}"""
    model = parse(text, gamma=OUTLIERS, w=floats(K, 8), shape=np.array([-1, K]))
    report, graph, context = smoothed(model, [{"x": floats(2, 5, K, seed=i)} for i in range(3)])
    assert report.rewrites == 1
    assert "Mul" not in ops(graph)
    assert list(context.observers) == ["f"]


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param("d = Gemm(n, w) u = Gemm(d, v) y = Add(n, u)", id="residual"),
        pytest.param("e = Sigmoid(n) e2 = Mul(e, gamma) d = Gemm(e2, w) y = Gemm(d, v)", id="nonlinear producer"),
    ],
)
def test_a_mul_is_inserted(tail: str) -> None:
    model = normalised(tail, f"float[M,{K}] y", w=floats(K, 8, seed=8) / 10)
    report, graph, context = smoothed(model, rows(20, K))
    assert report.rewrites >= 1
    added = [n for n in graph.nodes if n.op == "Mul" and n.outputs[0].name.endswith("_smoothed")]
    assert len(added) == 1
    assert added[0].outputs[0].name in context.observers
    assert added[0].inputs[0].name not in context.observers
    report, graph, _ = smoothed(model, rows(20, K), insert=False)
    assert report.skipped["a Mul would have to be inserted"] == 1
    assert not [n for n in graph.nodes if n.outputs[0].name.endswith("_smoothed")]


HEADS = """g (float[B,L,16] x) => (float[M,16] y) {
    n = LayerNormalization(x, one) f = Reshape(n, flat)
    q = Gemm(f, wq) k = Gemm(f, wk) v = Gemm(f, wv, bv)
    shape = Shape<end=2>(x) heads = Concat<axis=0>(shape, split)
    q4 = Reshape(q, heads) k4 = Reshape(k, heads) v4 = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,3,1]>(k4) vt = Transpose<perm=[0,2,1,3]>(v4)
    s = MatMul(qt, kt) p = Softmax(s) c = MatMul(p, vt) ct = Transpose<perm=[0,2,1,3]>(c)
    cf = Reshape(ct, flat) y = Gemm(cf, wo)
}"""


def heads(**changes: Array) -> ModelProto:
    constants: dict[str, Array] = {
        "one": np.ones(16, np.float32),
        "flat": np.array([-1, 16]),
        "split": np.array([4, 4]),
        "wq": floats(16, 16, seed=1) / 4,
        "wk": floats(16, 16, seed=2) / 4,
        "wv": floats(16, 16, seed=3) * OUTLIERS,
        "bv": floats(16, seed=4),
        "wo": floats(16, 16, seed=5),
    }
    return parse(HEADS, **{**constants, **changes})


def test_attention_weights_pass_the_scale_on_to_the_value_projection() -> None:
    feeds = [{"x": floats(1, length, 16, seed=length)} for length in (9, 4, 4, 7)]
    report, graph, context = smoothed(heads(), feeds)
    assert "Mul" not in ops(graph)
    value = next(n for n in graph.nodes if n.outputs[0].name == "v")
    out = next(n for n in graph.nodes if n.outputs[0].name == "y")
    assert report.rewrites >= 1
    moved = (out.constant(1).array() / floats(16, 16, seed=5))[:, 0]  # type: ignore[union-attr]
    assert moved[3] > 5 * moved[0]
    np.testing.assert_allclose(value.constant(2).array() * moved, floats(16, seed=4), rtol=1e-5)  # type: ignore[union-attr]
    assert set(context.observers) == {"f", "cf"}


def test_one_projection_for_query_key_and_value_scales_its_value_part_only() -> None:
    text = """g (float[B,L,16] x) => (float[M,16] y) {
        n = LayerNormalization(x, one) f = Reshape(n, flat) a = Gemm(f, w, b)
        parts = Reshape(a, split) moved = Transpose<perm=[2,0,3,1,4]>(parts)
        q = Gather(moved, i0) k = Gather(moved, i1) v = Gather(moved, i2) kt = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(q, kt) p = Softmax(s) c = MatMul(p, v) ct = Transpose<perm=[0,2,1,3]>(c)
        cf = Reshape(ct, flat) y = Gemm(cf, wo) }"""
    w = floats(16, 48, seed=3) / 4
    w[:, 32:] *= OUTLIERS
    constants = {"one": np.ones(16, np.float32), "flat": np.array([-1, 16]), "split": np.array([2, -1, 3, 4, 4])}
    constants |= {"w": w, "b": floats(48, seed=4), "wo": floats(16, 16, seed=5)}
    constants |= {f"i{i}": np.array(i) for i in range(3)}
    report, graph, _ = smoothed(parse(text, **constants), [{"x": floats(2, 6, 16, seed=i)} for i in range(3)])
    assert report.rewrites >= 1
    assert "Mul" not in ops(graph)
    bias = next(n for n in graph.nodes if n.outputs[0].name == "a").constant(2).array()  # type: ignore[union-attr]
    np.testing.assert_array_equal(bias[:32], floats(48, seed=4)[:32])
    assert np.abs(bias[32:] / floats(48, seed=4)[32:] - 1).max() > 0.5


def test_relu_lets_the_scale_through_between_two_gemms() -> None:
    text = f"g (float[M,{K}] x) => (float[M,8] y) {{ h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v) }}"
    model = parse(text, w=floats(K, K) * OUTLIERS, b=floats(K, seed=1), v=floats(K, 8, seed=2))
    report, graph, context = smoothed(model, rows(20, K))
    assert report.rewrites == 1
    assert report.skipped["an input of the model"] == 1
    assert ops(graph) == {"Gemm": 2, "Relu": 1}
    assert list(context.observers) == ["x", "r"]


def test_percentiles_are_taken_of_the_scaled_values() -> None:
    model = normalised("y = Gemm(n, w)")
    _, graph, context = smoothed(model, rows(20, K), Settings(ranges="percentile"))
    fresh = Context(context.settings, calibration=lambda: rows(20, K))
    Calibrate().run(graph, fresh)
    np.testing.assert_allclose(context.observers["n"].sample(), fresh.observers["n"].sample(), rtol=1e-4, atol=1e-4)


# ---- what stays alone ----
def refused(model: ModelProto, feeds: list[dict[str, Array]], settings: Settings | None = None, **options: object) -> str:
    report, graph, _ = smoothed(model, feeds, settings, **options)
    assert report.rewrites == 0
    assert list(graph.to_proto().graph.node) == list(Graph.from_proto(model).to_proto().graph.node)
    assert len(report.skipped) == 1
    assert len(report.refusals) == sum(report.skipped.values())
    return next(iter(report.skipped))


def test_a_level_input_gains_nothing() -> None:
    model = normalised(
        "y = Gemm(n, w)", gamma=np.ones(K, np.float32), beta=np.zeros(K, np.float32), w=np.full((K, 8), 0.5, np.float32)
    )
    assert refused(model, rows(40, K)) == "no gain on the samples"


def test_an_input_of_the_model_is_not_scaled() -> None:
    model = parse(f"g (float[M,{K}] x) => (float[M,8] y) {{ y = Gemm(x, w) }}", w=floats(K, 8))
    assert refused(model, [{"x": f["x"] * OUTLIERS} for f in rows(20, K)]) == "an input of the model"


def test_a_flattened_input_of_the_model_is_not_scaled() -> None:
    model = parse("g (float[M,4,4] x) => (float[M,8] y) { f = Flatten(x) y = Gemm(f, w) }", w=floats(K, 8))
    assert refused(model, [{"x": floats(20, 4, 4) * OUTLIERS.reshape(4, 4)}]) == "an input of the model"


def test_a_sum_done_in_integers_is_not_torn_apart() -> None:
    text = f"g (float[M,{K}] x) => (float[M,8] y) {{ a = Gemm(x, w) b = Gemm(x, u) s = Add(a, b) y = Gemm(s, v) }}"
    model = parse(text, w=floats(K, K) * OUTLIERS, u=floats(K, K, seed=1) * OUTLIERS, v=floats(K, 8, seed=2))
    report, graph, _ = smoothed(model, rows(20, K))
    assert report.rewrites == 0
    assert report.skipped["the input is computed in integers"] == 1
    assert ops(graph) == {"Gemm": 3, "Add": 1}


@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        pytest.param("reader", 0, id="the Gemm"),
        pytest.param("norm", 1, id="the LayerNormalization"),
        pytest.param("second", 1, id="one of two"),
    ],
)
def test_excluded_nodes_are_untouched(pattern: str, changed: int) -> None:
    model = normalised("y = Gemm(n, w) z = Gemm(n, w)", "float[M,8] y, float[M,8] z")
    for node, name in zip(model.graph.node, ("norm", "reader", "second"), strict=True):
        node.name = name
    exclude = ("reader", "second") if pattern == "reader" else (pattern,)
    settings = Settings(exclude=exclude)
    _graph, context = calibrated(model, rows(20, K), settings)
    report = Smooth().run(_graph, context)
    assert report.rewrites == changed
    kept = {n.name: n for n in _graph.nodes}
    for name in exclude:
        before = floats(K, 8, seed=8) if name != "norm" else OUTLIERS
        np.testing.assert_array_equal(kept[name].constant(1).array(), before)  # type: ignore[union-attr]
    assert ("Mul" in ops(_graph)) == (changed == 1), "the excluded node needs the unscaled tensor"


@pytest.mark.parametrize("change", UNMEASURED)
def test_it_does_not_run(change: dict[str, object]) -> None:
    graph, context = calibrated(normalised("y = Gemm(n, w)"), rows(20, K))
    for name, value in change.items():
        setattr(context, name, value)
    assert Smooth().run(graph, context) == Report()


def test_a_quantised_graph_is_left_alone() -> None:
    graph, context = calibrated(normalised("y = Gemm(n, w)"), rows(20, K))
    Quantise().run(graph, context)
    assert Smooth().run(graph, context) == Report()


def test_a_tensor_without_channel_extremes_is_refused() -> None:
    graph, context = calibrated(normalised("y = Gemm(n, w)"), rows(20, K))
    context.observers["n"].lows = None
    report = Smooth().run(graph, context)
    assert dict(report.skipped) == {"no extremes of each channel were kept": 1}


def test_a_tensor_left_without_statistics_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, context = calibrated(normalised("y = Gemm(n, w)"), rows(20, K))
    monkeypatch.setattr(smooth_module, "scale_sources", lambda *_: ["n", "other"])
    with pytest.raises(PassError, match="left tensor 'other' without calibration"):
        Smooth().run(graph, context)


def test_equal_runs_give_equal_bytes() -> None:
    written = []
    for _ in range(2):
        graph, context = calibrated(heads(), [{"x": floats(1, n, 16, seed=n)} for n in (9, 4, 7)])
        Smooth().run(graph, context)
        written.append(graph.to_proto().SerializeToString(deterministic=True))
    assert written[0] == written[1]


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
