"""Equalisation: exact in float through every kind of stream, chosen by held-out error, statistics kept true, every refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from passes_helpers import UNMEASURED, check_pass, floats, ops, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Node
from qcompile.passes import _streams as streams_module
from qcompile.passes._stream_trial import Change, StreamTrial
from qcompile.passes._streams import ChannelStream, channel_streams, components
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.equalise import Equalise, stream_scale
from qcompile.passes.quantise import Quantise, scale_sources
from qcompile.passes.search_ranges import SearchRanges
from qcompile.placement import place
from qcompile.ranges import Observer
from qcompile.rewrite import Close, Promise, Report

C = 8
# Channels that differ a hundredfold, as outputs of a Conv; what reads them is level, so that moving the spread pays.
SPREAD = np.array([30, 0.3, 1, 0.5, 12, 0.3, 4, 0.4], np.float32)


@dataclass(frozen=True)
class Calibrated:
    """Equalise on what calibration saw: a pass for `check_pass`, which knows no data."""

    feeds: Sequence[dict[str, Array]]
    settings: Settings = field(default_factory=Settings)
    step: Equalise = field(default_factory=Equalise)
    contexts: list[Context] = field(default_factory=list)
    name: str = "equalise"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        if not self.contexts:
            self.contexts.append(Context(self.settings, calibration=lambda: self.feeds))
            Calibrate().run(graph, self.contexts[0])
        return self.step.run(graph, self.contexts[0])


def equalised(
    model: ModelProto, feeds: Sequence[dict[str, Array]], settings: Settings | None = None, **options: object
) -> tuple[Report, Graph, Context]:
    """Run the pass under `check_pass`; asserts that the statistics are those of a fresh calibration too."""
    pass_ = Calibrated(feeds, settings or Settings(), Equalise(**options))  # type: ignore[arg-type]
    report, graph = check_pass(pass_, model, feeds)
    context = pass_.contexts[0]
    fresh = Context(context.settings, calibration=lambda: feeds)
    Calibrate().run(graph, fresh)
    assert list(context.observers) == list(fresh.observers) == scale_sources(graph, place(graph, context.settings))
    for name, observer in fresh.observers.items():
        kept = context.observers[name]
        size = max(abs(observer.low), abs(observer.high))
        np.testing.assert_allclose(kept.lows, observer.lows, rtol=1e-4, atol=1e-5 * size, err_msg=name)
        np.testing.assert_allclose(kept.highs, observer.highs, rtol=1e-4, atol=1e-5 * size, err_msg=name)
        if not kept.fixed:
            np.testing.assert_allclose([kept.low, kept.high], [observer.low, observer.high], rtol=2e-5, err_msg=name)
        else:  # one part of both ends is kept
            assert kept.low == pytest.approx(observer.low * kept.high / observer.high, rel=1e-4, abs=1e-6 * size)
            assert 0.69 < kept.high / observer.high < 1.0001
    return report, graph, context


def images(count: int = 16, channels: int = 3, size: int = 8) -> list[dict[str, Array]]:
    return [{"x": floats(1, channels, size, size, seed=i)} for i in range(count)]


def uneven(*shape: int, seed: int = 0) -> Array:
    """Weights whose output channels differ as SPREAD does."""
    return floats(*shape, seed=seed) * np.resize(SPREAD, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def node_of(graph: Graph, output: str) -> Node:
    return next(n for n in graph.nodes if n.outputs[0].name == output)


def weights(graph: Graph, output: str, index: int = 1) -> Array:
    const = node_of(graph, output).constant(index)
    assert const is not None
    return const.array().astype(np.float64)


IMAGE = "g (float[1,3,8,8] x) => (float[n,m,h,w] y)"
HEAD = "u = Conv(y0, t) y = Sigmoid(u)"  # the last stream ends in what is not homogeneous
COMMON = {"a": uneven(C, 3, 3, 3, seed=1), "b": uneven(C, seed=2), "v": floats(6, C, 1, 1, seed=3)}


# ---- streams that are levelled ----
def test_conv_relu_conv() -> None:
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", **COMMON)
    report, graph, context = equalised(model, images())
    assert report.rewrites == 1
    assert ops(graph) == {"Conv": 2, "Relu": 1}
    scale = COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0]
    assert scale[0] > 10 * scale[1] > 0
    np.testing.assert_allclose(weights(graph, "p") * scale[:, None, None, None], COMMON["a"], rtol=1e-6)
    np.testing.assert_allclose(weights(graph, "p", 2) * scale, COMMON["b"], rtol=1e-6)
    np.testing.assert_allclose(weights(graph, "y") / scale[None, :, None, None], COMMON["v"], rtol=1e-6)
    assert context.observers["r"].levelled
    assert np.log(scale).mean() == pytest.approx(0, abs=1e-6)


def test_the_scale_is_that_of_the_formula() -> None:
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", **COMMON)
    for strength in (0.3, 0.5, 1.0):
        _, graph, context = equalised(model, images(), strengths=(strength,), least_gain_db=-100.0)
        windows = np.stack([np.lib.stride_tricks.sliding_window_view(f["x"][0], (3, 3), axis=(1, 2)) for f in images()])
        made = np.einsum("ncijhw,mchw->nmij", windows.astype(np.float64), COMMON["a"].astype(np.float64))
        spread = np.maximum(made + COMMON["b"][:, None, None], 0).max(axis=(0, 2, 3))
        read = np.abs(COMMON["v"]).max(axis=(0, 2, 3)).astype(np.float64)
        expected = spread**strength * read ** (strength - 1)
        expected /= np.exp(np.log(expected).mean())
        np.testing.assert_allclose(COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0], expected, rtol=1e-4)
        assert context.observers["r"].fixed


def test_a_depthwise_conv_is_the_end_of_one_stream_and_the_start_of_the_next() -> None:
    text = f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) d = Conv<group={C}, pads=[1,1,1,1]>(r, k, c) q = Relu(d) y = Conv(q, v) }}"
    constants = {**COMMON, "k": uneven(C, 1, 3, 3, seed=4)[::-1].copy(), "c": floats(C, seed=5)}
    report, graph, _ = equalised(parse(text, **constants), images())
    assert report.rewrites == 2
    first = COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0]
    second = weights(graph, "y")[0, :, 0, 0] / COMMON["v"][0, :, 0, 0]
    np.testing.assert_allclose(weights(graph, "d"), constants["k"] * (first / second)[:, None, None, None], rtol=1e-5)
    np.testing.assert_allclose(weights(graph, "d", 2), constants["c"] / second, rtol=1e-5)


def test_grouped_convs_with_a_multiplier() -> None:
    text = f"{IMAGE} {{ p = Conv(x, a) r = Relu(p) d = Conv<group=4>(r, k) y = Relu(d) }}"
    report, graph, _ = equalised(parse(text, a=COMMON["a"], k=floats(12, 2, 1, 1, seed=4)), images(), least_gain_db=0.3)
    assert report.rewrites == 1
    scale = COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0]
    for output in range(12):  # output m reads channels 2 (m // 3) and the next
        expected = floats(12, 2, 1, 1, seed=4)[output, :, 0, 0] * scale[2 * (output // 3) : 2 * (output // 3) + 2]
        np.testing.assert_allclose(weights(graph, "d")[output, :, 0, 0], expected, rtol=1e-5)


RESIDUAL = """{IMAGE} {{
    p0 = Conv(x, a, b) h1 = Conv(p0, e1) r1 = Clip(h1, zero, six) p1 = Conv(r1, f1, b) s1 = Add(p0, p1)
    h2 = Conv(s1, e2) r2 = Clip(h2, zero, six) p2 = Conv(r2, f2) s2 = Add(s1, p2) y = Conv(s2, v, g)
}}"""


def residual(**changes: Array) -> ModelProto:
    values: dict[str, Array] = {
        **COMMON,
        "b": uneven(C, seed=2) * 3,
        "e1": floats(12, C, 1, 1, seed=5) / 9,
        "e2": floats(12, C, 1, 1, seed=6) / 9,
        "f1": uneven(C, 12, 1, 1, seed=7) / 4,
        "f2": uneven(C, 12, 1, 1, seed=8) / 4,
        "g": floats(6, seed=9),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    return parse(RESIDUAL.format(IMAGE=IMAGE), **{**values, **changes})


STREAM = ("p0", "p1", "s1", "p2", "s2")


def off_centre(context: Context, name: str) -> float:
    """How far the middles of a tensor's channels lie from zero, relative to their ranges, on average."""
    lows, highs = context.observers[name].lows, context.observers[name].highs
    assert lows is not None
    assert highs is not None
    return float(np.mean(np.abs(lows + highs) / (highs - lows)))


def test_a_linear_residual_stream_is_scaled_by_one_vector_and_centred() -> None:
    report, graph, _ = equalised(residual(), images())
    assert report.rewrites == 1
    assert dict(report.skipped) == {streams_module.BOUNDED: 2, streams_module.OUTPUT: 1}
    scale = COMMON["a"][:, 0, 0, 0] / weights(graph, "p0")[:, 0, 0, 0]
    for producer, seed in (("p1", 7), ("p2", 8)):
        np.testing.assert_allclose(
            weights(graph, producer)[:, 0, 0, 0] * scale, uneven(C, 12, 1, 1, seed=seed)[:, 0, 0, 0] / 4, rtol=1e-5
        )
    for reader, before in (("h1", floats(12, C, 1, 1, seed=5) / 9), ("h2", floats(12, C, 1, 1, seed=6) / 9), ("y", COMMON["v"])):
        np.testing.assert_allclose(weights(graph, reader)[0, :, 0, 0] / scale, before[0, :, 0, 0], rtol=1e-5)


def test_centring_moves_biases_alone() -> None:
    report, graph, context = equalised(residual(), images(), strengths=(), least_gain_db=-100.0)
    assert report.rewrites == 1
    np.testing.assert_array_equal(weights(graph, "p1")[:, 0, 0, 0], (uneven(C, 12, 1, 1, seed=7) / 4)[:, 0, 0, 0])
    assert node_of(graph, "p2").input(2) is not None, "a source without a bias gets one"
    assert node_of(graph, "h1").input(2) is not None, "the shift comes back in a bias of the reader"
    plain = Context(calibration=images)
    Calibrate().run(Graph.from_proto(residual()), plain)
    assert sum(off_centre(context, n) for n in STREAM) < 0.7 * sum(off_centre(plain, n) for n in STREAM)


def test_without_centring_only_scales_move() -> None:
    report, graph, _ = equalised(residual(), images(), centre=False)
    assert report.rewrites == 1
    assert node_of(graph, "h1").input(2) is None
    scale = COMMON["a"][:, 0, 0, 0] / weights(graph, "p0")[:, 0, 0, 0]
    np.testing.assert_allclose(weights(graph, "p0", 2) * scale, uneven(C, seed=2) * 3, rtol=1e-5)


def test_a_reader_that_pads_is_not_shifted() -> None:
    text = f"{IMAGE} {{ p = Conv(x, a, b) y = Conv<pads=[1,1,1,1]>(p, k) }}"
    _, graph, _ = equalised(parse(text, **COMMON, k=floats(6, C, 3, 3)), images())
    scale = COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0]
    np.testing.assert_allclose(weights(graph, "p", 2) * scale, COMMON["b"], rtol=1e-5)


TAILS = {
    "concat": (
        "q = Conv(x, a2) c = Concat<axis=1>(p, q) y0 = Relu(c)",
        {"a2": uneven(C, 3, 3, 3, seed=11), "t": floats(6, 2 * C, 1, 1) / 300},
    ),
    "pools": ("r = Relu(p) y0 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)", {}),
    "average": ("r = LeakyRelu(p) y0 = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(r)", {}),
    "constant": (
        "q = Add(p, one) n = Mul(q, two) d = Div(n, two) z = Sub(one, d) y0 = Relu(z)",
        {"one": floats(1, C, 1, 1), "two": np.float32(-2)},
    ),
    "linear constant": ("q = Sub(one, p) y0 = Identity(q)", {"one": floats(C, 1, 1)}),
    "difference": ("q = Conv(x, a2) y0 = Sub(q, p)", {"a2": uneven(C, 3, 3, 3, seed=11)}),
    "twice": ("y0 = Add(p, p)", {}),
    "spatial slice": (
        "q = Slice(p, start, end, axes, steps) y0 = Relu(q)",
        {"start": np.array([0, 0]), "end": np.array([9, 9]), "axes": np.array([2, 3]), "steps": np.array([2, 2])},
    ),
    "channel slice": (
        "q = Slice(p, start, end, axes) y0 = Relu(q)",
        {"start": np.array([2]), "end": np.array([6]), "axes": np.array([1]), "t": floats(6, 4, 1, 1) / 300},
    ),
    "spatial pad": ("q = Pad(p, pads) y0 = Relu(q)", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
}


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in TAILS])
def test_what_the_scale_goes_through(name: str) -> None:
    tail, constants = TAILS[name]
    values = {**COMMON, "t": floats(6, C, 1, 1, seed=12) / 300, **constants}
    del values["v"]
    report, _, _ = equalised(parse(f"{IMAGE} {{ p = Conv(x, a, b) {tail} {HEAD} }}", **values), images(), least_gain_db=-100.0)
    assert report.rewrites == 1
    assert dict(report.skipped) == {streams_module.READ: 1}  # u


def test_a_shortcut_padded_with_zero_channels() -> None:
    """ResNet's option A: every second position, and new channels that are zero."""
    text = f"""{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) s = Slice(r, start, end, axes, steps) w = Pad(s, pads)
        c = Conv<strides=[2,2], pads=[1,1,1,1]>(r, k) d = Add(c, w) y0 = Relu(d) {HEAD} }}"""
    constants = {"start": np.array([0, 0]), "end": np.array([9, 9]), "axes": np.array([2, 3]), "steps": np.array([2, 2])}
    constants |= {"pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]), "k": floats(C + 4, C, 3, 3), "t": floats(6, C + 4, 1, 1) / 300}
    report, graph, _ = equalised(parse(text, a=COMMON["a"], b=COMMON["b"], **constants), images(), least_gain_db=-100.0)
    assert report.rewrites == 1
    first = COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0]
    last = weights(graph, "u")[0, :, 0, 0] / (floats(6, C + 4, 1, 1)[0, :, 0, 0] / 300)
    np.testing.assert_allclose(last[2:-2], first, rtol=1e-5)


@pytest.mark.parametrize("trans", [pytest.param(0, id="transB=0"), pytest.param(1, id="transB=1")])
@pytest.mark.parametrize("pooled", [pytest.param(True, id="pooled"), pytest.param(False, id="positions")])
def test_a_gemm_behind_flatten(trans: int, pooled: bool) -> None:
    width = C if pooled else C * 36
    body = "g = GlobalAveragePool(r) f = Flatten(g)" if pooled else "f = Flatten(r)"
    text = f"g (float[1,3,8,8] x) => (float[1,5] y) {{ p = Conv(x, a, b) r = Relu(p) {body} y = Gemm<transB={trans}>(f, v) }}"
    matrix = floats(width, 5, seed=3)
    model = parse(text, a=COMMON["a"], b=COMMON["b"], v=matrix.T.copy() if trans else matrix)
    report, graph, _ = equalised(model, images())
    assert report.rewrites == 1
    scale = COMMON["a"][:, 0, 0, 0] / weights(graph, "p")[:, 0, 0, 0]
    got = weights(graph, "y").T if trans else weights(graph, "y")
    np.testing.assert_allclose(got, matrix * np.repeat(scale, width // C)[:, None], rtol=1e-5)


def test_dead_channels_keep_one() -> None:
    weight, bias = COMMON["a"].copy(), COMMON["b"].copy()
    weight[2], bias[2] = 0, 0
    read = COMMON["v"].copy()
    read[:, 5] = 0
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", a=weight, b=bias, v=read)
    report, graph, _ = equalised(model, images())
    assert report.rewrites == 1
    np.testing.assert_array_equal(weights(graph, "p")[[2, 5]], weight[[2, 5]])
    np.testing.assert_array_equal(weights(graph, "y")[:, [2, 5]], read[:, [2, 5]])


def test_a_shared_constant_is_not_changed_for_its_other_reader() -> None:
    model = parse(
        f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) u = Conv(r, v)"
        " z = Conv(x, a, b) s = Sigmoid(z) w = Conv(s, v) y = Add(u, w) }",
        **COMMON,
    )
    report, graph, _ = equalised(model, images())
    assert report.rewrites == 1
    np.testing.assert_array_equal(weights(graph, "z"), COMMON["a"])
    np.testing.assert_array_equal(weights(graph, "w"), COMMON["v"])


def test_the_search_of_ranges_leaves_a_chosen_range_alone() -> None:
    model = parse(f"{IMAGE} {{ p = Conv(x, a, b) r = Relu(p) y = Conv(r, v) }}", **COMMON)
    _, graph, context = equalised(model, images())
    Quantise().run(graph, context)
    assert context.plan is not None
    levelled = next(c for c in context.plan.classes if "r" in c.tensors)
    before = (levelled.low, levelled.high)
    SearchRanges().run(graph, context)
    assert (levelled.low, levelled.high) == before


def test_percentiles_are_taken_of_the_scaled_values() -> None:
    settings = Settings(ranges="percentile")
    _, graph, context = equalised(residual(), images(), settings)
    fresh = Context(settings, calibration=images)
    Calibrate().run(graph, fresh)
    for name in ("p0", "s1", "s2"):
        np.testing.assert_allclose(context.observers[name].sample(), fresh.observers[name].sample(), rtol=1e-3, atol=1e-4)


def test_equal_runs_give_equal_bytes() -> None:
    written = [equalised(residual(), images())[1].to_proto().SerializeToString(deterministic=True) for _ in range(2)]
    assert written[0] == written[1]


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
