"""Equalisation: what stops it, and the pieces that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from equalise_models import COMMON, HEAD, IMAGE, C, equalised, images, residual
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from passes_helpers import UNMEASURED, floats, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.passes import _streams as streams_module
from qcompile.passes._stream_trial import Change, StreamTrial
from qcompile.passes._streams import ChannelStream, channel_streams, components
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.equalise import Equalise, stream_scale
from qcompile.passes.quantise import Quantise
from qcompile.ranges import Observer
from qcompile.rewrite import Report

# ---- what stays alone ----


def refusal(model: ModelProto, settings: Settings | None = None, feeds: Sequence[dict[str, Array]] = ()) -> set[str]:
    """Why nothing was rewritten; asserts that the model is the same."""
    report, graph, _ = equalised(model, feeds or images(), settings)
    assert report.rewrites == 0
    assert list(graph.to_proto().graph.node) == list(Graph.from_proto(model).to_proto().graph.node)
    assert len(report.refusals) == sum(report.skipped.values())
    return set(report.skipped)


ONE = {"one": np.float32(1)}
INNER = {"two": np.array([2, 2]), "eight": np.array([8, 8]), "image": np.array([2, 3])}
AROUND = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
MAP = {"vector": floats(1, C, 6, 6)}
READ, JOINED = streams_module.READ, streams_module.JOINED
REFUSED: dict[str, tuple[str, str, dict[str, Array]]] = {
    "relu6": ("r = Clip(p, zero, one) y0 = Identity(r)", streams_module.BOUNDED, {**ONE, "zero": np.float32(0)}),
    "sigmoid": ("r = Sigmoid(p) q = Relu(p) y0 = Add(q, r)", READ, {}),
    "product": ("r = Relu(p) y0 = Mul(p, r)", READ, {}),
    "product with an image": ("y0 = Mul(p, vector)", READ, MAP),
    "sum with an image": ("y0 = Add(p, vector)", READ, MAP),
    "reciprocal": ("q = Add(p, large) y0 = Div(one, q)", READ, {**ONE, "large": np.full((C, 1, 1), 1e4, np.float32)}),
    "joined": ("o = Conv(i, a3) z = Sigmoid(o) y0 = Add(p, z)", JOINED, {**INNER, "a3": floats(C, 3, 1, 1)}),
    "another axis": ("c = Concat<axis=2>(p, p) y0 = Relu(c)", READ, {}),
    "concatenated": ("c = Concat<axis=1>(p, i) y0 = Relu(c)", JOINED, {**INNER, "t": floats(6, C + 3, 1, 1) / 300}),
    "padded with ones": ("q = Pad(p, pads, one) y0 = Relu(q)", READ, AROUND | ONE),
    "reflected": ('q = Pad<mode="reflect">(p, pads) y0 = Relu(q)', READ, AROUND),
    "transposed": ("q = Transpose<perm=[0,2,1,3]>(p) z = Transpose<perm=[0,2,1,3]>(q) y0 = Relu(z)", READ, {}),
    "no channels": (
        "q = Slice(p, end, end, axes) z = Concat<axis=1>(p, q) y0 = Relu(z)",
        READ,
        {"end": np.array([8]), "axes": np.array([1])},
    ),
    "indices": ("q, i = MaxPool<kernel_shape=[2,2]>(p) j = Cast<to=1>(i) k = Sigmoid(j) y0 = Add(q, k)", READ, {}),
}


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in REFUSED])
def test_what_stops_the_scale(name: str) -> None:
    body, reason, constants = REFUSED[name]
    if constants.keys() >= INNER.keys():
        body = "i = Slice(x, two, eight, image) " + body
    values = {"a": COMMON["a"], "b": COMMON["b"], "t": floats(6, C, 1, 1, seed=12) / 300, **constants}
    assert reason in refusal(parse(f"{IMAGE} {{ p = Conv(x, a, b) {body} {HEAD} }}", **values))


def test_channels_that_are_an_output() -> None:
    model = parse(
        "g (float[1,3,8,8] x) => (float[n,m,h,w] r, float[n,m,h,w] y) { p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }", **COMMON
    )
    assert refusal(model) == {streams_module.OUTPUT}


def test_the_last_conv_alone() -> None:
    assert refusal(parse(f"{IMAGE} {{ y = Conv(x, a, b) }}", a=COMMON["a"], b=COMMON["b"])) == {streams_module.OUTPUT}


def test_weights_computed_at_run_time() -> None:
    text = """g (float[1,3,8,8] x, float[6,8,1,1] k) => (float[n,m,h,w] y) {
        p = Conv(x, a, b) r = Relu(p) u = Conv(r, v) w = Conv(r, k) y = Add(u, w) }"""
    feeds = [{**f, "k": floats(6, C, 1, 1, seed=i)} for i, f in enumerate(images())]
    assert streams_module.RUN_TIME in refusal(parse(text, **COMMON), feeds=feeds)


def test_a_gemm_that_adds_a_matrix() -> None:
    text = """g (float[2,3,8,8] x) => (float[2,5] y) {
        p = Conv(x, a) r = Relu(p) g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, k, m) }"""
    assert streams_module.READ in refusal(
        parse(text, a=COMMON["a"], k=floats(C, 5), m=floats(2, 5)), feeds=[{"x": floats(2, 3, 8, 8, seed=i)} for i in range(4)]
    )


@pytest.mark.parametrize("name", ["source", "inner", "sink"])
def test_excluded_nodes(name: str) -> None:
    model = parse(
        f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) u = Conv(r, v) s = Sigmoid(u) o = Conv(s, w) y = Sigmoid(o) }}",
        w=floats(3, 6, 1, 1),
        **COMMON,
    )
    for node, label in zip(model.graph.node, ("source", "inner", "sink"), strict=False):
        node.name = label
    assert streams_module.EXCLUDED in refusal(model, Settings(exclude=(name,)))


def test_nothing_quantised_reads_it() -> None:
    text = """g (float[1,3,8,8,8] x) => (float[n,m,d,h,w] y) {
        p = Conv(x, a) r = Relu(p) u = Conv(r, v) f = Flatten(x) z = Gemm(f, k) s = ReduceSum<keepdims=0>(z) y = Add(u, s) }"""
    model = parse(text, a=floats(C, 3, 1, 1, 1), v=floats(6, C, 1, 1, 1), k=floats(3 * 512, 4))
    report, _, _ = equalised(model, [{"x": floats(1, 3, 8, 8, 8, seed=i)} for i in range(4)])
    assert report.skipped["nothing quantised reads its channels"] == 1


def test_a_level_stream_gains_nothing() -> None:
    level = floats(C, 3, 3, 3, seed=1)[:1].repeat(C, axis=0)
    model = parse(f"{IMAGE} {{ p = Conv(x, a) r = Relu(p) y = Conv(r, v) }}", a=level, v=np.ones((6, C, 1, 1), np.float32))
    assert "no gain on the samples" in refusal(model)


def test_extremes_that_no_single_tensor_rules() -> None:
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", **COMMON)
    graph = Graph.from_proto(model)
    context = Context(calibration=images)
    Calibrate().run(graph, context)
    context.observers["r"].lows = None
    assert dict(Equalise().run(graph, context).skipped) == {"no extremes of each channel were kept": 1, streams_module.OUTPUT: 1}


@pytest.mark.parametrize("change", UNMEASURED)
def test_it_does_not_run(change: dict[str, object]) -> None:
    graph = Graph.from_proto(parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", **COMMON))
    context = Context(calibration=images)
    Calibrate().run(graph, context)
    for name, value in change.items():
        setattr(context, name, value)
    assert Equalise().run(graph, context) == Report()


def test_a_quantised_graph_is_left_alone() -> None:
    graph = Graph.from_proto(parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", **COMMON))
    context = Context(calibration=images)
    Calibrate().run(graph, context)
    Quantise().run(graph, context)
    assert Equalise().run(graph, context) == Report()


# ---- the pieces ----


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=15))
def test_components_equal_a_search(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    expected = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    edges = [(np.array([a]), np.array([b])) for a, b in pairs]
    assert components(count, edges).tolist() == expected


def trial_of(model: ModelProto, settings: Settings) -> tuple[StreamTrial, ChannelStream]:
    graph, feeds = Graph.from_proto(model), images(8)
    context = Context(settings, calibration=lambda: feeds)
    Calibrate().run(graph, context)
    graph.infer_shapes()
    stream = next(s for s in channel_streams(graph, frozenset()) if not s.refusal)
    windows = [np.lib.stride_tricks.sliding_window_view(f["x"][0], (3, 3), axis=(1, 2)) for f in feeds]
    made = [(np.einsum("cijhw,mchw->mij", w, COMMON["a"]) + COMMON["b"][:, None, None])[None].astype(np.float32) for w in windows]
    return StreamTrial(stream, graph, context, [made], judged=4), stream


@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_that_of_numpy(bits: int) -> None:
    """Ranges of samples 0, 2, 4, 6; the error of samples 1, 3, 5, 7; float64 throughout."""
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) y0 = Relu(p) {HEAD} }}", a=COMMON["a"], b=COMMON["b"], t=COMMON["v"])
    trial, stream = trial_of(model, Settings(bits=bits, ranges="minmax"))
    change = Change(stream_scale(trial, trial.extremes, trial.unchanged.shift, 0.8), trial.unchanged.shift)
    assert stream.size == C
    values = [np.maximum(v, 0).astype(np.float64)[0] for v in trial._samples[0]]
    moved = [v / change.scale[:, None, None] for v in values]
    step = np.float64(np.float32(max(v.max() for v in moved[::2]) / 255))
    read = COMMON["v"][:, :, 0, 0].astype(np.float64)
    top = 2 ** (bits - 1) - 1
    rounded = read * change.scale
    best = np.full(read.shape[0], np.inf)
    for factor in (1.0, 0.9, 0.8, 0.7, 0.6) if bits == 4 else (1.0,):
        grid = np.abs(read * change.scale).max(axis=1, keepdims=True) * factor / top
        candidate = np.clip(np.rint(read * change.scale / grid), -top, top) * grid
        error = np.square(candidate - read * change.scale).sum(axis=1)
        rounded[error < best] = candidate[error < best]
        best = np.minimum(best, error)
    wanted = np.stack([np.einsum("mc,cij->mij", read, v) for v in values[1::2]])
    got = np.stack([np.einsum("mc,cij->mij", rounded, np.minimum(np.rint(v / step), 255) * step) for v in moved[1::2]])
    expected = (got - wanted).var(axis=(0, 2, 3)).sum() / wanted.var(axis=(0, 2, 3)).sum()
    assert trial.error(change)[0] == pytest.approx(expected, rel=2e-3)


def test_a_range_is_clipped_only_where_the_error_falls() -> None:
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) y0 = Relu(p) {HEAD} }}", a=COMMON["a"], b=COMMON["b"], t=COMMON["v"])
    searched, _ = trial_of(model, Settings())
    whole, _ = trial_of(model, Settings(ranges="minmax"))
    assert searched.error(searched.unchanged)[0] <= whole.error(whole.unchanged)[0]
    assert whole.error(whole.unchanged)[1] == 1.0


def test_extremes_of_axis_one_and_their_move() -> None:
    values = [floats(2, 5, 3, 4, seed=i) for i in range(6)]
    observer, moved = Observer(channels=True, axis=1), Observer(channels=True, axis=1)
    factor, shift = np.abs(floats(5, seed=9)) + 0.1, floats(5, seed=10)
    for value in values:
        observer.update(value, "x")
        moved.update((value - shift[:, None, None]) * factor[:, None, None], "x")
    whole = np.concatenate(values)
    np.testing.assert_array_equal(observer.lows, whole.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(observer.highs, whole.max(axis=(0, 2, 3)))
    got = observer.rescaled(factor, shift)
    np.testing.assert_allclose(got.lows, moved.lows, rtol=1e-6)
    np.testing.assert_allclose(got.sample(), moved.sample(), rtol=1e-5, atol=1e-6)
    assert got.low == pytest.approx(moved.low)
    assert replace(got).axis == 1


def test_the_result_is_valid_for_the_checker() -> None:
    _, graph, _ = equalised(residual(), images())
    onnx.checker.check_model(graph.to_proto(), full_check=True)
