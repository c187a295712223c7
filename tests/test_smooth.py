"""Smoothing: exact in float, 1/s where it costs nothing, statistics kept true, every refusal with its reason."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto
from passes_helpers import UNMEASURED, floats, ops, parse
from smooth_models import calibrated, smoothed

from qcompile.context import Context, Settings
from qcompile.errors import PassError
from qcompile.graph import Array, Graph
from qcompile.passes import smooth as smooth_module
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.quantise import Quantise
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import Report

K = 16
OUTLIERS = np.where(np.arange(K) % 8 == 3, 30.0, np.where(np.arange(K) % 8 == 5, -12.0, 0.4)).astype(np.float32)


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


WIDTHS_OF_NODES = {
    "weights": ({"bits": 2}, {"node_bits": (("*", 2),)}),
    "mixed": ({"bits": 2}, {"assigned": (("mm", 2),)}),
    "activations": ({"activation_bits": 4}, {"node_activations": (("*", 4),)}),
}


@pytest.mark.parametrize(("everywhere", "alone"), WIDTHS_OF_NODES.values(), ids=WIDTHS_OF_NODES)
def test_the_widths_of_single_nodes_decide(everywhere: dict[str, object], alone: dict[str, object]) -> None:
    model = normalised("y = Gemm(n, w)")
    next(n for n in model.graph.node if n.op_type == "Gemm").name = "mm"
    scales = []
    for settings in ({}, everywhere, alone):
        _, graph, _ = smoothed(model, rows(20, K), settings=Settings(**settings))  # type: ignore[arg-type]
        norm = next(n for n in graph.nodes if n.op == "LayerNormalization")
        scales.append(norm.constant(1).array())  # type: ignore[union-attr]
    assert not np.array_equal(scales[0], scales[1])
    np.testing.assert_array_equal(scales[1], scales[2])
