"""int32 biases on the accumulator's own scale, and the proof that no accumulator wraps."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from core_models import float_outputs, floats, images, model, outputs, run_core, sqnr

from qcompile.errors import PassError
from qcompile.passes.integer_bias import IntegerBias
from qcompile.runtime import Optimisation

CONV = "Conv <pads = [1, 1, 1, 1]>"
SOURCE = model(
    f"g (float[1, 3, 8, 8] x) => (float[n, 2] y) {{ a = {CONV} (x, w, b)  d = {CONV} (a, w)  p = GlobalAveragePool(d)"
    "  f = Flatten(p)  y = Gemm(f, k, c) }",
    w=floats(3, 3, 3, 3),
    b=floats(3) * 10,
    k=floats(3, 2),
    c=floats(2),
)


def test_biases_are_the_nearest_multiples_of_the_accumulators_step() -> None:
    graph, context, _ = run_core(SOURCE, images(), until="round_weights")
    assert context.plan is not None
    wanted = {}
    for site in context.plan.linears:
        bias = site.node.constant(2)
        assert bias is not None
        wanted[site.node.name] = bias.array()
    assert IntegerBias().run(graph, context).rewrites == 3
    for site in context.plan.linears:
        producer = site.node.inputs[2].producer
        assert producer is not None and producer.op == "DequantizeLinear"
        stored, scale = producer.constant(0), producer.constant(1)
        assert stored is not None and scale is not None and producer.input(2) is None
        assert stored.array().dtype == np.int32
        assert site.weight_scale is not None
        np.testing.assert_array_equal(scale.array(), np.float32(site.source.scale) * site.weight_scale)
        for value, step, integer in zip(wanted[site.node.name], scale.array(), stored.array(), strict=True):
            assert abs(Fraction(float(value)) / Fraction(float(step)) - int(integer)) <= Fraction(1, 2) + Fraction(1, 10**6)


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.EXTENDED, Optimisation.ALL])
def test_the_finished_model_runs_fused(level: Optimisation) -> None:
    graph, _, _ = run_core(SOURCE, images(), until="integer_bias")
    assert sqnr(float_outputs(SOURCE, images()), outputs(graph, images(), level, fuse=True)) > 30


def test_no_accumulator_can_wrap() -> None:
    _, context, _ = run_core(SOURCE, images(), until="integer_bias")
    assert context.plan is not None
    for site in context.plan.linears:
        readers = [site.node.inputs[i].producer for i in (1, 2)]
        weights, bias = (r.constant(0).array().astype(np.int64) for r in readers)  # type: ignore[union-attr]
        sums = np.abs(weights).sum(axis=tuple(a for a in range(weights.ndim) if a != site.axis))
        assert (255 * sums + np.abs(bias) < 2**31).all()


def test_an_overflow_is_named() -> None:
    graph, context, _ = run_core(SOURCE, images(), until="round_weights")
    assert context.plan is not None
    bias = context.plan.linears[1].node.constant(2)
    assert bias is not None
    bias.assign(np.array([0, 1e12, 0], np.float32))
    with pytest.raises(PassError, match=r"node 'conv_1', channel 1: the int32 accumulator could overflow; .*--exclude 'conv_1'"):
        IntegerBias().run(graph, context)


def test_huge_biases_of_the_model_itself_are_no_overflow() -> None:
    """The scale of a channel widens until its bias fits."""
    source = model(
        "g (float[n, 3] x) => (float[n, 2] y) { y = Gemm(x, w, b) }",
        w=np.array([[1e-9, 1], [1e-9, 1], [-1e-9, 1]], np.float32),
        b=np.array([1e6, 1e6], np.float32),
    )
    feeds = [{"x": floats(4, 3, seed=s)} for s in range(3)]
    graph, _, _ = run_core(source, feeds)
    for expected, got in zip(float_outputs(source, feeds), outputs(graph, feeds, fuse=True), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_second_run_rounds_nothing() -> None:
    graph, context, _ = run_core(SOURCE, images(), until="integer_bias")
    before = graph.to_proto().SerializeToString(deterministic=True)
    assert IntegerBias().run(graph, context).rewrites == 0
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_tensorrt_keeps_float_biases() -> None:
    graph, context, reports = run_core(SOURCE, images(), until="integer_bias", target="tensorrt")
    assert reports["integer_bias"].rewrites == 0
    assert context.plan is not None
    assert all(s.node.constant(2) is not None for s in context.plan.linears)
    assert sqnr(float_outputs(SOURCE, images()), outputs(graph, images())) > 30
