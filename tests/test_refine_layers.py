"""Learned rounding and bias correction on what really reaches each layer; scales and limits stay."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from core_models import core_context, float_outputs, floats, images, model, outputs, run_core, sqnr
from onnx import ModelProto, numpy_helper
from test_round_weights import stored

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Array, Graph
from qcompile.passes.integer_bias import IntegerBias
from qcompile.passes.refine_layers import RefineLayers
from qcompile.runtime import Optimisation

CONV = "Conv <pads = [1, 1, 1, 1]>"


def source() -> ModelProto:
    """Inputs with a mean and channels that go together, so that both steps have something to gain."""
    text = f"""g (float[1, 4, 8, 8] x) => (float[n, 5] y) {{
        a = {CONV} (x, w0, b0)  r = Relu(a)  d = Conv <group = 8, pads = [1, 1, 1, 1]> (r, w1)  e = Conv <group = 2> (d, w2)
        p = GlobalAveragePool(e)  f = Flatten(p)  y = Gemm(f, w3, b3) }}"""
    return model(
        text,
        w0=floats(8, 4, 3, 3, seed=1),
        b0=floats(8) + 1,
        w1=floats(8, 1, 3, 3, seed=2),
        w2=floats(6, 4, 1, 1, seed=3),
        w3=floats(6, 5, seed=4),
        b3=floats(5),
    )


def correlated(count: int = 16) -> list[dict[str, Array]]:
    feeds = images(count, channels=4)
    return [{"x": f["x"] * 0.3 + f["x"][:, :1] + 0.5} for f in feeds]


FEEDS = correlated()


def compiled(until: str = "refine_layers", **settings: object) -> tuple[Graph, Context]:
    graph, context, _ = run_core(source(), FEEDS, until=until, **settings)
    return graph, context


def test_scales_and_limits_stay_and_weights_move() -> None:
    graph, context = compiled("integer_bias")
    assert context.plan is not None
    before = [stored(s) for s in context.plan.linears]
    before = [(q.copy(), s.copy()) for q, s in before]
    report = RefineLayers().run(graph, context)
    assert 1 <= report.rewrites <= 4
    moved = 0
    for site, (old, scale) in zip(context.plan.linears, before, strict=True):
        q, now = stored(site)
        assert now.tobytes() == scale.tobytes()
        moved += int((q != old).sum())
        assert np.abs(q.astype(int)).max() <= 127
        if not site.depthwise:
            even = q.shape[1] // 2 * 2
            a, b = q[:, 0:even:2].astype(int), q[:, 1:even:2].astype(int)
            assert (np.abs(a + b)[a * b > 0] <= 128).all()
    assert moved > 0


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL])
def test_it_helps(level: Optimisation) -> None:
    before, context = compiled("integer_bias")
    floats_ = float_outputs(source(), FEEDS)
    plain = sqnr(floats_, outputs(before, FEEDS, level, fuse=True))
    RefineLayers().run(before, context)
    assert sqnr(floats_, outputs(before, FEEDS, level, fuse=True)) > plain + 0.5


def test_bias_correction_brings_the_mean_output_of_the_last_layer_to_that_of_the_float_model() -> None:
    graph, context = compiled()
    assert context.plan is not None
    site = context.plan.linears[-1]
    assert site.weight_scale is not None
    step = float(site.source.scale) * site.weight_scale.astype(np.float64)
    expected = np.concatenate(float_outputs(source(), context.samples)).mean(axis=0, dtype=np.float64)
    got = np.concatenate(outputs(graph, context.samples, fuse=True)).mean(axis=0, dtype=np.float64)
    # Half a step of the int32 bias and the rounding of the float bias before it.
    np.testing.assert_allclose(got, expected, atol=float(step.max()) * 1.01 + 1e-6)


def test_without_bias_correction_biases_stay() -> None:
    graph, context = compiled("integer_bias", bias_correction=False)
    assert context.plan is not None

    def biases() -> list[bytes]:
        assert context.plan is not None
        return [s.node.inputs[2].producer.constant(0).array().tobytes() for s in context.plan.linears]  # type: ignore[union-attr]

    before = biases()
    RefineLayers().run(graph, context)
    assert biases() == before


@pytest.mark.parametrize("why", ["fast", "synthetic"])
def test_rounding_is_learned_with_effort_and_real_data_only(why: str) -> None:
    graph, context = compiled("integer_bias", effort="fast" if why == "fast" else "default")
    context.synthetic = why == "synthetic"
    assert context.plan is not None
    before = [stored(s)[0].tobytes() for s in context.plan.linears]
    RefineLayers().run(graph, context)
    assert [stored(s)[0].tobytes() for s in context.plan.linears] == before


def test_a_second_run_changes_nothing() -> None:
    graph, context = compiled()
    before = graph.to_proto().SerializeToString(deterministic=True)
    assert RefineLayers().run(graph, context).rewrites == 0
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_the_same_twice() -> None:
    first, second = (compiled()[0].to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_single_sample_is_enough() -> None:
    """One row a Gemm: its covariance is zero, the weights stay as they were rounded."""
    text = "g (float[n, 6] x) => (float[n, 3] y) { a = Gemm(x, w0, b)  r = Relu(a)  y = Gemm(r, w1) }"
    proto = model(text, w0=floats(6, 8), b=floats(8) + 100, w1=floats(8, 3))
    feeds = [{"x": floats(1, 6) * 50}]
    graph, _, _ = run_core(proto, feeds)
    assert sqnr(float_outputs(proto, feeds), outputs(graph, feeds, fuse=True)) > 30


def test_progress_ticks_once_a_layer() -> None:
    graph, context = compiled("integer_bias")
    stages: list[str] = []
    context.progress = stages.append
    RefineLayers().run(graph, context)
    assert stages == ["refining layers"] * 4


def test_a_bias_that_leaves_int32_is_named() -> None:
    graph, context = compiled("integer_bias")
    assert context.plan is not None
    site = context.plan.linears[1]
    bias = site.node.inputs[2].producer.constant(0)  # type: ignore[union-attr]
    assert bias is not None
    bias.assign(np.full(8, 2**31 - 2**10, np.int32))
    with pytest.raises(PassError, match=r"node 'conv_2', channel \d: the int32 accumulator could overflow; .*--exclude 'conv_2'"):
        RefineLayers().run(graph, context)


def test_weights_that_are_not_integers_yet_are_named() -> None:
    graph, context = compiled("round_weights")
    assert context.plan is not None
    context.plan.linears[0].node.inputs[2] = graph.inputs[0]  # a bias that is no constant at all
    with pytest.raises(PassError, match="input 2 is not a dequantised constant"):
        RefineLayers().run(graph, context)


def test_nothing_planned_nothing_done() -> None:
    graph = Graph.from_proto(source())
    assert RefineLayers().run(graph, core_context(FEEDS)).rewrites == 0
    assert IntegerBias().run(graph, core_context(FEEDS)).rewrites == 0


@pytest.mark.parametrize("effort", ["default", "best"])
@pytest.mark.parametrize("case", ["one sample", "constant input", "dead channel", "dead layer", "fewer rows than weights"])
def test_poor_calibration_works_at_four_bits(case: str, effort: str) -> None:
    proto, feeds = source(), FEEDS
    if case == "one sample":
        feeds = FEEDS[:1]
    if case == "constant input":
        feeds = [{"x": np.full_like(f["x"], 0.7)} for f in FEEDS[:4]]
    if case == "fewer rows than weights":
        feeds = [{"x": f["x"][:, :, :1, :1].repeat(8, 2).repeat(8, 3)} for f in FEEDS[:2]]
    if case.startswith("dead"):
        for tensor in proto.graph.initializer:
            if tensor.name in ("w1", "w2")[: 1 if case == "dead channel" else 2]:
                values = numpy_helper.to_array(tensor).copy()
                values[0 if case == "dead channel" else slice(None)] = 0
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    graph, context, _ = run_core(proto, feeds, bits=4, effort=effort)
    assert context.plan is not None
    for result in outputs(graph, feeds, fuse=True):
        assert np.isfinite(result).all()
    for site in context.plan.linears:
        q, scale = stored(site)
        assert np.abs(q.astype(int)).max() <= 7
        assert (scale > 0).all()


def half_dead(seed: int, width: int = 16) -> ModelProto:
    """Gemms whose negative biases leave most outputs at 0 behind the Relu: errors there are free, which `best` alone knows."""
    draw = np.random.default_rng(seed)
    weights = {
        f"w{i}": (draw.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)
        for i, (rows, columns) in enumerate([(12, width), (width, width), (width, width), (width, 6)])
    }
    text = """g (float[1, 12] x) => (float[n, 6] y) {
        a = Gemm(x, w0)  r = Relu(a)  b = Gemm(r, w1, b1)  s = Relu(b)  c = Gemm(s, w2, b2)  t = Relu(c)  y = Gemm(t, w3) }"""
    return model(text, b1=np.full(width, -0.5, np.float32), b2=np.full(width, -0.25, np.float32), **weights)


def test_best_effort_gains_over_default_which_gains_over_fast() -> None:
    floats_, reached = float_outputs(source(), FEEDS), {}
    for effort in ("fast", "default"):
        graph, _, _ = run_core(source(), FEEDS, bits=4, effort=effort)
        reached[effort] = sqnr(floats_, outputs(graph, FEEDS, fuse=True))
    assert reached["default"] > reached["fast"] + 2
    gains = []
    for seed in range(4):
        draw = np.random.default_rng(100 + seed)
        feeds = [{"x": 1.5 * draw.normal(size=(1, 12)).astype(np.float32)} for _ in range(300)]
        known, fresh = feeds[:150], feeds[150:]
        made = half_dead(seed)
        floats_ = float_outputs(made, fresh)
        default, best = (
            sqnr(floats_, outputs(run_core(made, known, bits=4, effort=effort)[0], fresh, fuse=True))
            for effort in ("default", "best")
        )
        gains.append(best - default)
    assert np.mean(gains) > 0.6, gains  # dB on samples that were not seen; one seed alone may gain nothing


def test_scales_that_moved_stay_dyadic_and_carry_their_bias() -> None:
    """With 4 bits a scale may move together with its integers: weights, bias and multiplier follow."""
    _, context = compiled(bits=4, effort="best")
    assert context.plan is not None
    for site in context.plan.linears:
        _, scale = stored(site)
        reader = site.node.inputs[2].producer
        assert reader is not None
        steps = reader.constant(1)
        assert steps is not None
        np.testing.assert_array_equal(steps.array(), np.float32(site.source.scale) * scale)
        if site.result is None:
            continue
        for value in scale:
            ratio = Fraction(float(np.float32(np.float32(site.source.scale) * value) / np.float32(site.result.scale)))
            assert (ratio * 2**16).denominator == 1
