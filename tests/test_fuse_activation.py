from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto
from passes_helpers import check_pass, floats, ops, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.passes._activations import find_silu
from qcompile.passes.fuse_activation import FuseActivation
from qcompile.runtime import Session

INTEGER = Context(settings=Settings(format="integer"))
SLOWER = "onnxruntime is slower by the name of this activation"
NUMBERS: dict[str, Array] = {
    "zero": np.float32(0),
    "half": np.float32(0.5),
    "one": np.float32(1),
    "three": np.float32(3),
    "six": np.float32(6),
    "five": np.float32(5),
    "sixth": np.float32(1 / 6),
    "quick": np.float32(1.702),
}
X = np.linspace(-8, 8, 240, dtype=np.float32).reshape(40, 6)
FEED = {"x": X}
CLIPPED = "a = Add(x, three)  c = Clip(a, zero, six)  "


def model(body: str, opset: int = 21, kind: str = "float", outputs: str = "") -> ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    dtype = {"float": np.float32, "double": np.float64}[kind]
    used = {k: v.astype(dtype) for k, v in NUMBERS.items() if k in words}
    return parse(f"g ({kind}[n, 6] x) => ({kind}[n, 6] y{outputs}) {{ {body} }}", opset, **used)


def hard(x: Array) -> Array:
    result: Array = np.clip(x / 6 + 0.5, 0, 1)
    return result


FORMS = [
    pytest.param("h = HardSigmoid <alpha = 0.1666667, beta = 0.5> (x)  y = Mul(x, h)", "HardSwish", id="hard-sigmoid"),
    pytest.param(CLIPPED + "d = Div(c, six)  y = Mul(x, d)", "HardSwish", id="divided-first"),
    pytest.param(CLIPPED + "m = Mul(x, c)  y = Div(m, six)", "HardSwish", id="divided-last"),
    pytest.param(CLIPPED + "m = Mul(c, x)  y = Mul(sixth, m)", "HardSwish", id="sixth-last"),
    pytest.param(CLIPPED + "d = Mul(x, sixth)  y = Mul(d, c)", "HardSwish", id="sixth-of-x"),
    pytest.param(
        "a = Add(three, x)  r = Relu(a)  c = Min(r, six)  d = Mul(c, sixth)  y = Mul(d, x)", "HardSwish", id="relu-and-min"
    ),
    pytest.param(
        "a = Add(x, three)  r = Max(zero, a)  c = Min(six, r)  d = Div(c, six)  y = Mul(x, d)", "HardSwish", id="min-and-max"
    ),
    pytest.param("d = Div(x, six)  a = Add(d, half)  c = Clip(a, zero, one)  y = Mul(x, c)", "HardSwish", id="clip-to-one"),
    pytest.param(CLIPPED + "y = Div(c, six)", "HardSigmoid", id="sigmoid-divided"),
    pytest.param(CLIPPED + "y = Mul(c, sixth)", "HardSigmoid", id="sigmoid-sixth"),
    pytest.param("d = Mul(sixth, x)  a = Add(half, d)  y = Clip(a, zero, one)", "HardSigmoid", id="sigmoid-to-one"),
    pytest.param("s = Softplus(x)  t = Tanh(s)  y = Mul(x, t)", "Mish", id="mish"),
]
ORACLES: dict[str, Callable[[Array], Array]] = {
    "HardSwish": lambda x: x * hard(x),
    "HardSigmoid": hard,
    "Mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "Swish": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize(("body", "operator"), FORMS)
def test_named(body: str, operator: str) -> None:
    report, graph = check_pass(FuseActivation(), model(body), FEED)
    assert report.rewrites == 1
    assert ops(graph) == {operator: 1}
    assert not report.skipped
    found = Session(graph.to_proto()).run(FEED)["y"]
    np.testing.assert_allclose(found, ORACLES[operator](X.astype(np.float64)), rtol=0, atol=2e-6)


SILU = [
    pytest.param("s = Sigmoid(x)  y = Mul(x, s)", 1.0, id="sigmoid"),
    pytest.param("s = Sigmoid(x)  y = Mul(s, x)", 1.0, id="sigmoid-first"),
    pytest.param("m = Mul(x, quick)  s = Sigmoid(m)  y = Mul(x, s)", 1.702, id="quick-gelu"),
    pytest.param("m = Neg(x)  e = Exp(m)  p = Add(e, one)  y = Div(x, p)", 1.0, id="written-out"),
]


@pytest.mark.parametrize(("body", "alpha"), SILU)
def test_silu_is_found_and_stays(body: str, alpha: float) -> None:
    report, graph = check_pass(FuseActivation(), model(body), FEED)
    assert dict(report.skipped) == {"opset below 24 has no Swish": 1}
    (found,) = find_silu(graph)
    assert (found.x.name, found.output.name) == ("x", "y")
    assert found.alpha == pytest.approx(alpha)
    assert found.steps[0].outputs[0] is found.output
    wide = X.astype(np.float64)
    np.testing.assert_allclose(Session(graph.to_proto()).run(FEED)["y"], wide / (1 + np.exp(-alpha * wide)), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("body", "alpha"), SILU)
def test_silu_is_named_from_opset_24(body: str, alpha: float) -> None:
    graph = Graph.from_proto(model(body, opset=24))
    assert dict(FuseActivation().run(graph, Context()).skipped) == {SLOWER: 1}
    assert FuseActivation().run(graph, INTEGER).rewrites == 1
    assert ops(graph) == {"Swish": 1}
    assert graph.nodes[0].attr("alpha") == pytest.approx(alpha)
    assert not list(find_silu(graph))


def test_mish_by_log_is_named_for_integer_formats() -> None:
    made = model("e = Exp(x)  p = Add(one, e)  s = Log(p)  t = Tanh(s)  y = Mul(t, x)")
    report, graph = check_pass(FuseActivation(), made, FEED)
    assert dict(report.skipped) == {SLOWER: 1}
    assert FuseActivation().run(graph, INTEGER).rewrites == 1
    found = Session(graph.to_proto()).run(FEED)["y"]
    np.testing.assert_allclose(found, ORACLES["Mish"](X.astype(np.float64)), rtol=0, atol=2e-6)


def test_behind_a_layer_that_has_other_readers() -> None:
    """HardSwish reads the layer twice, so its Add folds into nothing."""
    body = "l = MatMul(x, w)  " + CLIPPED.replace("(x", "(l") + "d = Div(c, six)  y = Mul(l, d)"
    made = model(body)
    made.graph.initializer.append(_weights())
    _, graph = check_pass(FuseActivation(), made, FEED)
    assert ops(graph) == {"MatMul": 1, "HardSwish": 1}


def test_add_that_folds_into_the_layer() -> None:
    made = model("l = MatMul(x, w)  " + CLIPPED.replace("(x", "(l") + "y = Div(c, six)")
    made.graph.initializer.append(_weights())
    report, _ = check_pass(FuseActivation(), made, FEED)
    assert dict(report.skipped) == {"its Add goes into the bias of the layer before it": 1}


def _weights() -> object:
    from onnx import numpy_helper

    return numpy_helper.from_array(floats(6, 6), "w")


CONSTANTS = "HardSigmoid with other constants than 1/6 and 1/2"
SHARED = "a step of it is read elsewhere, or is an output of the graph"
SWISH = CLIPPED + "m = Mul(x, c)  y = Div(m, six)"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        pytest.param(SWISH + "  z = Neg(m)", ", float[n, 6] z", SHARED, id="product-read"),
        pytest.param(SWISH, ", float[n, 6] c", SHARED, id="step-is-an-output"),
        pytest.param(SWISH.replace("three", "half"), "", "", id="other-offset"),
        pytest.param(SWISH.replace("Clip(a, zero, six)", "Clip(a, zero, five)"), "", "", id="other-limit"),
        pytest.param(SWISH.replace("Div(m, six)", "Div(m, five)"), "", "", id="other-divisor"),
        pytest.param("n = Neg(x)  " + SWISH.replace("Mul(x, c)", "Mul(n, c)"), "", "", id="other-factor"),
        pytest.param(
            "h = HardSigmoid(x)  y = Mul(x, h)", "", CONSTANTS, id="default-hard-sigmoid"
        ),
        pytest.param("s = Softplus(x)  y = Tanh(s)", "", "", id="no-product"),
    ],
)  # fmt: skip
def test_left_alone(body: str, outputs: str, reason: str) -> None:
    report, _ = check_pass(FuseActivation(), model(body, outputs=outputs), {"x": X + 0.01})
    assert report.rewrites == 0
    assert dict(report.skipped) == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("body", "opset", "reason"),
    [
        pytest.param(SWISH, 13, "opset below 14 has no HardSwish", id="hard-swish"),
        pytest.param("s = Softplus(x)  t = Tanh(s)  y = Mul(x, t)", 17, "opset below 18 has no Mish", id="mish"),
    ],
)
def test_older_opset(body: str, opset: int, reason: str) -> None:
    report, _ = check_pass(FuseActivation(), model(body, opset), FEED)
    assert dict(report.skipped) == {reason: 1}


def test_double() -> None:
    report = FuseActivation().run(Graph.from_proto(model(SWISH, kind="double")), Context())
    assert dict(report.skipped) == {"not float32": 1}
    assert not list(find_silu(Graph.from_proto(model("s = Sigmoid(x)  y = Mul(x, s)", kind="double"))))
