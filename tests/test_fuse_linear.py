from __future__ import annotations

import numpy as np
import onnx
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.graph import Array, Graph
from qcompile.passes.fuse_linear import FuseLinear

C = floats(4, seed=1) + 3


def conv(body: str, **constants: Array) -> onnx.ModelProto:
    text = f"g (float[n, 3, 6, 6] x) => (float[n, 4, 4, 4] y) {{ c = Conv(x, w)  {body} }}"
    return parse(text, w=floats(4, 3, 3, 3), **constants)


@pytest.mark.parametrize(
    "body",
    ["y = Add(c, k)", "y = Add(k, c)", "y = Sub(c, k)", "y = Sub(k, c)", "y = Mul(c, k)", "y = Mul(k, c)", "y = Div(c, k)"],
)
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (), (1,)], ids=str)
def test_conv(body: str, shape: tuple[int, ...]) -> None:
    constant = C.reshape(shape) if 4 in shape else np.full(shape, 2.5, np.float32)
    report, graph = check_pass(FuseLinear(), conv(body, k=constant), {"x": floats(2, 3, 6, 6)})
    assert ops(graph) == {"Conv": 1}
    assert report.rewrites == 1


@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose(group: int) -> None:
    model = parse(
        f"g (float[n, 6, 3, 3] x) => (float[n, 4, 5, 5] y) {{ c = ConvTranspose <group = {group}> (x, w, b)  d = Mul(c, k)"
        "  y = Add(d, k) }",
        w=floats(6, 4 // group, 3, 3),
        b=floats(4),
        k=C.reshape(4, 1, 1),
    )
    report, graph = check_pass(FuseLinear(), model, {"x": floats(2, 6, 3, 3)})
    assert ops(graph) == {"ConvTranspose": 1}
    assert report.rewrites == 2


@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0>"])
@pytest.mark.parametrize("bias_shape", [(4,), (1, 4), (1,), None], ids=str)
def test_gemm(attributes: str, bias_shape: tuple[int, ...] | None) -> None:
    inputs = "x, w" if bias_shape is None else "x, w, b"
    constants = {} if bias_shape is None else {"b": floats(*bias_shape)}
    model = parse(
        f"g (float[n, 6] x) => (float[n, 4] y) {{ c = Gemm {attributes} ({inputs})  d = Mul(c, k)  y = Add(d, k) }}",
        w=floats(4, 6) if "transB" in attributes else floats(6, 4),
        k=C,
        **constants,
    )
    _, graph = check_pass(FuseLinear(), model, {"x": floats(5, 6)})
    assert ops(graph) == {"Gemm": 1}


def test_chain_behind_a_matmul_keeps_one_add() -> None:
    model = parse(
        "g (float[n, 6] x) => (float[n, 4] y) { c = MatMul(x, w)  d = Add(b, c)  e = Mul(d, k)  f = Add(e, k)  y = Relu(f) }",
        w=floats(6, 4),
        b=floats(4),
        k=C,
    )
    report, graph = check_pass(FuseLinear(), model, {"x": floats(5, 6)})
    assert ops(graph) == {"MatMul": 1, "Add": 1, "Relu": 1}
    assert report.rewrites == 2


def test_matmul_of_rank_three_and_a_subtraction() -> None:
    model = parse("g (float[n, l, 6] x) => (float[n, l, 4] y) { c = MatMul(x, w)  y = Sub(c, k) }", w=floats(6, 4), k=C)
    _, graph = check_pass(FuseLinear(), model, {"x": floats(2, 5, 6)})
    assert ops(graph) == {"MatMul": 1, "Add": 1}


def test_shared_weights_are_copied() -> None:
    model = parse(
        "g (float[n, 6] x) => (float[n, 4] y, float[n, 4] z) { c = MatMul(x, w)  y = Mul(c, k)  z = MatMul(x, w) }",
        w=floats(6, 4),
        k=C,
    )
    _, graph = check_pass(FuseLinear(), model, {"x": floats(5, 6)})
    assert ops(graph) == {"MatMul": 2}
    assert len(graph.constants) == 2


@pytest.mark.parametrize(
    ("body", "constant", "reason"),
    [
        pytest.param(
            "a = Add(c, k)  r = Relu(c)  y = Add(a, r)",
            C.reshape(4, 1, 1),
            "the linear output is read elsewhere, or is an output of the graph",
            id="read-twice",
        ),
        pytest.param("y = Add(c, k)", floats(4, 4), "the constant is not one number a channel", id="spatial"),
        pytest.param("y = Div(k, c)", C.reshape(4, 1, 1), "a constant divided by the product is not linear", id="reciprocal"),
    ],
)
def test_refusals(body: str, constant: Array, reason: str) -> None:
    report, graph = check_pass(FuseLinear(), conv(body, k=constant), {"x": np.abs(floats(2, 3, 6, 6)) + 1})
    assert report.skipped == {reason: 1}
    assert report.rewrites == 0
    assert ops(graph)["Conv"] == 1


@pytest.mark.parametrize(
    ("body", "constant", "reason"),
    [
        pytest.param("y = Div(c, k)", 0.0, "division by zero", id="zero"),
        pytest.param("y = Mul(c, k)", np.inf, "scale or shift is not finite", id="infinite"),
        pytest.param("y = Add(c, k)", np.nan, "scale or shift is not finite", id="nan"),
    ],
)
def test_numbers_that_are_refused(body: str, constant: float, reason: str) -> None:
    from qcompile.context import Context

    graph = Graph.from_proto(conv(body, k=np.float32(constant)))
    report = FuseLinear().run(graph, Context())
    assert report.skipped == {reason: 1}
    assert len(graph.nodes) == 2


def test_graph_output_between_is_refused() -> None:
    model = parse(
        "g (float[n, 6] x) => (float[n, 4] c, float[n, 4] y) { c = Gemm(x, w)  y = Mul(c, k) }", w=floats(6, 4), k=np.float32(2)
    )
    report, _ = check_pass(FuseLinear(), model, {"x": floats(5, 6)})
    assert len(report.refusals) == 1


def test_gemm_with_a_whole_matrix_is_refused() -> None:
    model = parse(
        "g (float[5, 6] x) => (float[5, 4] y) { c = Gemm(x, w, m)  y = Mul(c, k) }", w=floats(6, 4), m=floats(5, 4), k=C
    )
    report, _ = check_pass(FuseLinear(), model, {"x": floats(5, 6)})
    assert report.skipped == {"Gemm adds a whole matrix": 1}


def test_a_constant_that_adds_an_axis_is_refused() -> None:
    model = parse(
        "g (float[5, 6] x) => (float[1, 5, 4] y) { c = MatMul(x, w)  y = Mul(c, k) }", w=floats(6, 4), k=C.reshape(1, 1, 4)
    )
    report, _ = check_pass(FuseLinear(), model, {"x": floats(5, 6)})
    assert report.skipped == {"the constant is not one number a channel": 1}
