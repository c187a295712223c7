"""Equalisation: exact in float through every kind of stream, chosen by held-out error, statistics kept true, every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from equalise_models import COMMON, HEAD, IMAGE, C, equalised, images, residual, uneven
from passes_helpers import floats, ops, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Node
from qcompile.passes import _streams as streams_module
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.quantise import Quantise
from qcompile.passes.search_ranges import SearchRanges


def node_of(graph: Graph, output: str) -> Node:
    return next(n for n in graph.nodes if n.outputs[0].name == output)


def weights(graph: Graph, output: str, index: int = 1) -> Array:
    const = node_of(graph, output).constant(index)
    assert const is not None
    return const.array().astype(np.float64)


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
