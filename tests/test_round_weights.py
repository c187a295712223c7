"""Weights in the file: int8 on the dyadic grid, in the kernel's order, as near to the float weights as the grid allows."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import float_outputs, floats, images, model, outputs, run_core, sqnr
from onnx import ModelProto

from qcompile.dyadic import is_exact_dyadic, linear_multiplier
from qcompile.errors import PassError
from qcompile.graph import Array
from qcompile.passes.round_weights import RoundWeights, weight_matrix, weight_tensor
from qcompile.plan import LinearSite
from qcompile.runtime import Optimisation

SHAPES = [
    pytest.param("Conv", 0, (4, 3, 2, 5), id="conv"),
    pytest.param("Conv", 0, (6, 1, 3, 3), id="depthwise"),
    pytest.param("Conv", 0, (4, 3, 5), id="conv-1d"),
    pytest.param("Gemm", 1, (5, 4), id="gemm"),
    pytest.param("Gemm", 0, (4, 5), id="gemm-transposed"),
]


@pytest.mark.parametrize(("op", "axis", "shape"), SHAPES)
def test_the_matrix_is_the_tensor_in_the_kernels_order(op: str, axis: int, shape: tuple[int, ...]) -> None:
    weight = np.arange(np.prod(shape)).reshape(shape)
    matrix = weight_matrix(weight, op, axis)
    assert matrix.shape == (shape[axis], weight.size // shape[axis])
    np.testing.assert_array_equal(weight_tensor(matrix, shape, op, axis), weight)
    if op == "Conv":
        spatial = [(i,) for i in range(shape[2])] if len(shape) == 3 else list(np.ndindex(*shape[2:]))
        for m in range(shape[0]):
            by_hand = [weight[(m, c, *place)] for place in spatial for c in range(shape[1])]
            np.testing.assert_array_equal(matrix[m], by_hand)


def stored(site: LinearSite) -> tuple[Array, Array]:
    """(int8 weights as [channels, K], float32 scales) as the file holds them."""
    producer = site.node.inputs[1].producer
    assert producer is not None and producer.op == "DequantizeLinear"
    assert producer.attr("axis") == site.axis
    values, scale, zero = (producer.constant(i) for i in range(3))
    assert values is not None and scale is not None and zero is not None
    assert not zero.array().any()
    return weight_matrix(values.array(), site.node.op, site.axis), scale.array()


def source() -> ModelProto:
    text = """g (float[1, 4, 8, 8] x) => (float[n, 5] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)  d = Conv <group = 8, pads = [1, 1, 1, 1]> (a, w1)
        e = Conv <group = 2> (d, w2)  p = GlobalAveragePool(e)  f = Flatten(p)  y = Gemm(f, w3, b3) }"""
    return model(
        text,
        w0=floats(8, 4, 3, 3, seed=1),
        b0=floats(8),
        w1=floats(8, 1, 3, 3, seed=2),
        w2=floats(6, 4, 1, 1, seed=3),
        w3=floats(6, 5, seed=4),
        b3=floats(5),
    )


FEEDS = images(4, channels=4)


@pytest.mark.parametrize("target", ["any", "vnni", "arm", "tensorrt"])
def test_every_limit_holds_in_the_file(target: str) -> None:
    _, context, reports = run_core(source(), FEEDS, until="round_weights", target=target)
    assert context.plan is not None and context.float_graph is not None
    assert reports["round_weights"].rewrites == 4
    originals = {n.name: n for n in context.float_graph.nodes}
    for site in context.plan.linears:
        q, scale = stored(site)
        assert q.dtype == np.int8 and scale.dtype == np.float32
        assert q.min() >= -127
        np.testing.assert_array_equal(scale, site.weight_scale)
        if site.result is not None:
            assert is_exact_dyadic(linear_multiplier(site.source.scale, scale, site.result.scale)).all()
        if target == "any" and not site.depthwise:
            even = q.shape[1] // 2 * 2
            a, b = q[:, 0:even:2].astype(int), q[:, 1:even:2].astype(int)
            assert (np.abs(a + b)[a * b > 0] <= 128).all()
        weight = originals[site.node.name].constant(1)
        assert weight is not None
        matrix = weight_matrix(weight.array(), site.node.op, site.axis).astype(np.float64)
        error = np.square(matrix - q * scale[:, None].astype(np.float64)).sum()
        assert error < np.square(matrix).sum() * (2e-4 if target == "any" else 1e-4)


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL])
def test_the_model_still_computes_the_same(level: Optimisation) -> None:
    graph, _, _ = run_core(source(), FEEDS, until="round_weights")
    assert sqnr(float_outputs(source(), FEEDS), outputs(graph, FEEDS, level)) > 30


def test_a_second_run_rounds_nothing() -> None:
    graph, context, _ = run_core(source(), FEEDS, until="round_weights")
    assert RoundWeights().run(graph, context).rewrites == 0


def test_a_weight_that_is_not_finite_is_named() -> None:
    graph, context, _ = run_core(source(), FEEDS, until="dyadic_scales")
    assert context.plan is not None
    weight = context.plan.linears[2].node.constant(1)
    assert weight is not None
    broken = weight.array().copy()
    broken[3, 0, 0, 0] = np.nan
    weight.assign(broken)
    with pytest.raises(PassError, match=r"node 'conv_2': channel 3: .*--exclude 'conv_2'"):
        RoundWeights().run(graph, context)
