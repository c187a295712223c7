from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.passes.linear_form import LinearForm


@pytest.mark.parametrize("body", ["y = Add(m, b)", "y = Add(b, m)"])
def test_rank_two(body: str) -> None:
    model = parse(f"g (float[n, 6] x) => (float[n, 4] y) {{ m = MatMul(x, w)  {body} }}", w=floats(6, 4), b=floats(1, 4))
    _, graph = check_pass(LinearForm(), model, [{"x": floats(1, 6)}, {"x": floats(5, 6)}])
    assert ops(graph) == {"Gemm": 1}
    assert graph.nodes[0].inputs[2].dims == (4,)


def test_without_bias() -> None:
    model = parse("g (float[n, 6] x) => (float[n, 4] y) { y = MatMul(x, w) }", w=floats(6, 4))
    _, graph = check_pass(LinearForm(), model, {"x": floats(5, 6)})
    assert ops(graph) == {"Gemm": 1}


@pytest.mark.parametrize(
    ("shape", "size", "left"),
    [
        pytest.param("2, 5, 6", (2, 5, 6), {"Reshape": 2, "Gemm": 1}, id="static"),
        pytest.param("n, 5, 6", (2, 5, 6), {"Reshape": 2, "Gemm": 1}, id="dynamic-batch"),
        pytest.param("n, l, 6", (2, 5, 6), {"Reshape": 2, "Gemm": 1, "Shape": 1, "Concat": 1}, id="two-dynamic"),
        pytest.param("n, 3, l, 6", (2, 3, 5, 6), {"Reshape": 2, "Gemm": 1, "Shape": 1, "Concat": 1}, id="rank-4"),
    ],
)
def test_higher_ranks(shape: str, size: tuple[int, ...], left: dict[str, int]) -> None:
    model = parse(
        f"g (float[{shape}] x) => (float[{shape[:-1]}4] y) {{ m = MatMul(x, w)  y = Add(m, b) }}", w=floats(6, 4), b=floats(4)
    )
    _, graph = check_pass(LinearForm(), model, {"x": floats(*size)})
    assert ops(graph) == left


@pytest.mark.parametrize("opset", [13, 14, 15, 21])
def test_equal_shapes_share_one_target_and_one_flattening(opset: int) -> None:
    model = parse(
        """g (float[n, l, 6] x) => (float[n, l, 6] y) {
            a = MatMul(x, w)  b = MatMul(x, v)  c = Add(a, b)  d = MatMul(c, w)  y = Relu(d) }""",
        opset,
        w=floats(6, 6),
        v=floats(6, 6, seed=1),
    )
    _, graph = check_pass(LinearForm(), model, [{"x": floats(2, 5, 6)}, {"x": floats(1, 1, 6)}])
    expected = {"Reshape": 5, "Gemm": 3, "Shape": 1, "Concat": 1, "Add": 1, "Relu": 1} | ({"Slice": 1} if opset < 15 else {})
    assert ops(graph) == expected


@pytest.mark.parametrize(
    ("attributes", "bias"),
    [
        pytest.param("<alpha = 0.5>", (4,), id="alpha"),
        pytest.param("<beta = 3.0>", (4,), id="beta"),
        pytest.param("<alpha = 2.0, beta = 0.5, transB = 1>", (1, 4), id="both-transB"),
        pytest.param("", (1,), id="scalar-bias"),
    ],
)
def test_gemm_is_normalised(attributes: str, bias: tuple[int, ...]) -> None:
    model = parse(
        f"g (float[n, 6] x) => (float[n, 4] y) {{ y = Gemm {attributes} (x, w, b) }}",
        w=floats(4, 6) if "transB" in attributes else floats(6, 4),
        b=floats(*bias),
    )
    report, graph = check_pass(LinearForm(), model, {"x": floats(5, 6)})
    assert report.rewrites == 1
    assert not {"alpha", "beta"} & set(graph.nodes[0].attrs)
    assert graph.nodes[0].inputs[2].dims == (4,)


def test_normal_gemm_is_left_alone() -> None:
    model = parse("g (float[n, 6] x) => (float[n, 4] y) { y = Gemm(x, w, b) }", w=floats(6, 4), b=floats(4))
    report, _ = check_pass(LinearForm(), model, {"x": floats(5, 6)})
    assert report.rewrites == 0


@pytest.mark.parametrize(
    "body",
    [
        "y = AveragePool <kernel_shape = [4, 5], strides = [4, 5]> (x)",
        "y = AveragePool <kernel_shape = [4, 5], ceil_mode = 1, count_include_pad = 1> (x)",
        "y = ReduceMean (x, axes)",
    ],
    ids=["average-pool", "average-pool-options", "reduce-mean"],
)
def test_global_average_pool(body: str) -> None:
    constants = {"axes": np.array([3, -2])} if "axes" in body else {}
    model = parse(f"g (float[n, 3, 4, 5] x) => (float[n, 3, 1, 1] y) {{ {body} }}", **constants)
    _, graph = check_pass(LinearForm(), model, {"x": floats(2, 3, 4, 5)})
    assert ops(graph) == {"GlobalAveragePool": 1}


def test_mean_without_kept_axes() -> None:
    model = parse("g (float[n, 3, 4, 5] x) => (float[n, 3] y) { y = ReduceMean <keepdims = 0> (x, axes) }", axes=np.array([2, 3]))
    _, graph = check_pass(LinearForm(), model, {"x": floats(2, 3, 4, 5)})
    assert ops(graph) == {"GlobalAveragePool": 1, "Flatten": 1}


@pytest.mark.parametrize(
    "body",
    [
        "y = AveragePool <kernel_shape = [4, 4]> (x)",
        "y = AveragePool <kernel_shape = [4, 5], pads = [0, 1, 0, 1]> (x)",
        "y = ReduceMean (x, axes)",
    ],
    ids=["smaller", "padded", "other-axes"],
)
def test_other_pools_stay(body: str) -> None:
    constants = {"axes": np.array([1, 2])} if "axes" in body else {}
    model = parse(f"g (float[n, 3, 4, 5] x) => (float[n, p, q, r] y) {{ {body} }}", **constants)
    report, _ = check_pass(LinearForm(), model, {"x": floats(2, 3, 4, 5)})
    assert report.rewrites == 0


@pytest.mark.parametrize(
    ("tail", "result", "left"),
    [
        pytest.param("y = Flatten(c)", "n, 4", {"Flatten": 1, "Gemm": 1}, id="flatten"),
        pytest.param("f = Flatten(c)  y = Softmax(f)", "n, 4", {"Flatten": 1, "Gemm": 1, "Softmax": 1}, id="flatten-softmax"),
        pytest.param("y = Reshape(c, s)", "n, 4", {"Flatten": 1, "Gemm": 1}, id="reshape"),
        pytest.param("y = Squeeze(c, a)", "n, 4", {"Flatten": 1, "Gemm": 1}, id="squeeze"),
        pytest.param("y = Identity(c)", "n, 4, 1, 1", {"Flatten": 1, "Gemm": 1, "Reshape": 1, "Identity": 1}, id="output"),
        pytest.param(
            "y = Softmax <axis = 1> (c)", "n, 4, 1, 1", {"Flatten": 1, "Gemm": 1, "Reshape": 1, "Softmax": 1}, id="softmax"
        ),
    ],
)
def test_last_conv_becomes_a_gemm(tail: str, result: str, left: dict[str, int]) -> None:
    model = parse(
        f"g (float[n, 3, 6, 6] x) => (float[{result}] y) {{ p = GlobalAveragePool(x)  c = Conv(p, w, b)  {tail} }}",
        w=floats(4, 3, 1, 1),
        b=floats(4),
        s=np.array([-1, 4]),
        a=np.array([2, 3]),
    )
    _, graph = check_pass(LinearForm(), model, {"x": floats(2, 3, 6, 6)})
    assert ops(graph) == {"GlobalAveragePool": 1, **left}


def test_squeeze_and_excitation_stays() -> None:
    model = parse(
        """g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] y) {
            p = GlobalAveragePool(x)  c = Conv(p, w)  s = Sigmoid(c)  y = Mul(x, s) }""",
        w=floats(3, 3, 1, 1),
    )
    report, _ = check_pass(LinearForm(), model, {"x": floats(2, 3, 6, 6)})
    assert report.rewrites == 0


@pytest.mark.parametrize(
    ("text", "constants", "feeds", "reason"),
    [
        pytest.param(
            "g (float[6] x) => (float[4] y) { y = MatMul(x, w) }",
            {"w": floats(6, 4)},
            {"x": floats(6)},
            "rank of the input is unknown or 1",
            id="rank-1",
        ),
        pytest.param(
            "g (float[n, 6] x, float[6, 4] w) => (float[n, 4] y) { y = Gemm(x, w) }",
            {},
            {"x": floats(2, 6), "w": floats(6, 4)},
            "weights are not constant",
            id="gemm-of-two",
        ),
        pytest.param(
            "g (float[5, 6] x) => (float[5, 4] y) { y = Gemm(x, w, m) }",
            {"w": floats(6, 4), "m": floats(5, 4)},
            {"x": floats(5, 6)},
            "Gemm adds a whole matrix",
            id="matrix-bias",
        ),
        pytest.param(
            "g (float[n, 4, 1, 1] x) => (float[n, 4, 1, 1] y) { y = Conv <group = 4> (x, w) }",
            {"w": floats(4, 1, 1, 1)},
            {"x": floats(2, 4, 1, 1)},
            "the last Conv is grouped, padded or larger than 1x1",
            id="depthwise-end",
        ),
    ],
)
def test_refusals(text: str, constants, feeds, reason: str) -> None:  # type: ignore[no-untyped-def]
    report, _ = check_pass(LinearForm(), parse(text, **constants), feeds)
    assert report.skipped == {reason: 1}
