from __future__ import annotations

from collections.abc import Callable
from math import erf, pi, sqrt, tanh

import numpy as np
import pytest
from onnx import ModelProto
from passes_helpers import check_pass, floats, ops, parse

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes.fuse_gelu import FuseGelu

NUMBERS = {
    "root": 1.4142135,
    "inverse": 0.70710677,
    "one": 1.0,
    "half": 0.5,
    "two": 2.0,
    "three": 3.0,
    "rho": 0.7978845608,
    "cubic": 0.044715,
    "other": 0.6,
    "coarse": 1.4140625,  # the root in half precision
}
FORMS = [
    pytest.param("d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)", id="torch"),
    pytest.param("d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(a, half)  y = Mul(x, m)", id="half-inside"),
    pytest.param("d = Mul(x, inverse)  e = Erf(d)  a = Add(one, e)  m = Mul(half, x)  y = Mul(a, m)", id="tensorflow"),
    pytest.param("d = Mul(inverse, x)  e = Erf(d)  h = Mul(e, half)  a = Add(h, half)  y = Mul(x, a)", id="half-plus-half"),
    pytest.param("d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Div(m, two)", id="divided-by-two"),
    pytest.param("d = Div(x, root)  e = Erf(d)  h = Mul(x, half)  p = Mul(h, e)  y = Add(p, h)", id="distributed"),
    pytest.param("d = Div(x, coarse)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)", id="half-precision"),
]
TANH_FORMS = [
    pytest.param(
        "c = Pow(x, three)  k = Mul(c, cubic)  i = Add(x, k)  v = Mul(i, rho)  e = Tanh(v)  a = Add(e, one)  m = Mul(x, half)  "
        "y = Mul(m, a)",
        id="pow",
    ),
    pytest.param(
        "s = Mul(x, x)  c = Mul(s, x)  k = Mul(cubic, c)  i = Add(x, k)  v = Mul(rho, i)  e = Tanh(v)  a = Add(one, e)  "
        "m = Mul(x, a)  y = Mul(half, m)",
        id="products",
    ),
    pytest.param(
        "s = Pow(x, two)  k = Mul(s, cubic)  i = Add(k, one)  r = Mul(x, rho)  v = Mul(r, i)  e = Tanh(v)  a = Add(one, e)  "
        "m = Mul(x, half)  y = Mul(m, a)",
        id="factored",
    ),
]


def model(body: str, opset: int = 21, kind: str = "float", outputs: str = "") -> ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    dtype = {"float": np.float32, "double": np.float64}[kind]
    constants = {k: np.array(v, dtype) for k, v in NUMBERS.items() if k in words}
    return parse(f"g ({kind}[n, 6] x) => ({kind}[n, 6] y{outputs}) {{ {body} }}", opset, **constants)


FEED = {"x": np.linspace(-6, 6, 240, dtype=np.float32).reshape(40, 6)}


@pytest.mark.parametrize("body", FORMS)
def test_erf_forms(body: str) -> None:
    if "coarse" in body:  # the constant itself moves the result by more than float rounding
        graph = Graph.from_proto(model(body))
        assert FuseGelu().run(graph, Context()).rewrites == 1
        assert ops(graph) == {"Gelu": 1}
        return
    report, graph = check_pass(FuseGelu(), model(body), FEED)
    assert report.rewrites == 1
    assert ops(graph) == {"Gelu": 1}
    assert graph.nodes[0].attr("approximate") == "none"


@pytest.mark.parametrize("body", TANH_FORMS)
def test_tanh_forms(body: str) -> None:
    report, graph = check_pass(FuseGelu(), model(body), FEED)
    assert report.rewrites == 1
    assert ops(graph) == {"Gelu": 1}
    assert graph.nodes[0].attr("approximate") == "tanh"


@pytest.mark.parametrize(
    ("approximate", "formula"),
    [
        pytest.param("none", lambda x: 0.5 * x * (1 + erf(x / sqrt(2))), id="erf"),
        pytest.param("tanh", lambda x: 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), id="tanh"),
    ],
)
def test_the_operator_is_that_formula(approximate: str, formula: Callable[[float], float]) -> None:
    from qcompile.runtime import Session

    found = Session(parse(f'g (float[n, 6] x) => (float[n, 6] y) {{ y = Gelu <approximate = "{approximate}"> (x) }}')).run(FEED)
    expected = np.vectorize(formula)(FEED["x"].astype(np.float64))
    np.testing.assert_allclose(found["y"], expected, rtol=0, atol=1e-6)


def test_argument_that_is_itself_a_product() -> None:
    body = "t = Mul(x, other)  d = Div(t, root)  e = Erf(d)  a = Add(e, one)  m = Mul(t, a)  y = Mul(m, half)"
    _, graph = check_pass(FuseGelu(), model(body), FEED)
    assert ops(graph) == {"Mul": 1, "Gelu": 1}


def test_argument_read_elsewhere_too() -> None:
    body = "t = Neg(x)  d = Div(t, root)  e = Erf(d)  a = Add(e, one)  m = Mul(t, a)  g = Mul(m, half)  y = Add(g, t)"
    _, graph = check_pass(FuseGelu(), model(body), FEED)
    assert ops(graph) == {"Neg": 1, "Gelu": 1, "Add": 1}


def test_behind_a_bias() -> None:
    text = "b = Add(x, bias)  d = Div(b, root)  e = Erf(d)  a = Add(e, one)  m = Mul(b, a)  y = Mul(m, half)"
    constants = {k: np.float32(v) for k, v in NUMBERS.items() if k in ("root", "one", "half")}
    made = parse(f"g (float[n, 6] x) => (float[n, 6] y) {{ {text} }}", bias=floats(6), **constants)
    _, graph = check_pass(FuseGelu(), made, FEED)
    assert ops(graph) == {"Add": 1, "Gelu": 1}


SHARED = "a step of it is read elsewhere, or its constants are not those of GELU"
TORCH = "d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        pytest.param(TORCH, ", float[n, 6] a", SHARED, id="step-is-an-output"),
        pytest.param(TORCH + "  z = Neg(m)", ", float[n, 6] z", SHARED, id="step-read-elsewhere"),
        pytest.param(TORCH.replace("half", "other"), "", SHARED, id="not-a-half"),
        pytest.param(TORCH.replace("root", "two"), "", "", id="not-the-root"),
        pytest.param("d = Div(x, root)  y = Erf(d)", "", SHARED, id="erf-alone"),
        pytest.param("y = Tanh(x)", "", "", id="tanh-alone"),
        pytest.param(TORCH.replace("Add(e, one)", "Sub(one, e)"), "", SHARED, id="other-sign"),
        pytest.param("z = Neg(x)  " + TORCH.replace("Mul(x, a)", "Mul(z, a)"), "", SHARED, id="other-factor"),
    ],
)  # fmt: skip
def test_left_alone(body: str, outputs: str, reason: str) -> None:
    report, _ = check_pass(FuseGelu(), model(body, outputs=outputs), FEED)
    assert report.rewrites == 0
    assert dict(report.skipped) == ({reason: 1} if reason else {})


def test_older_opset() -> None:
    report, _ = check_pass(FuseGelu(), model(TORCH, opset=17), FEED)
    assert dict(report.skipped) == {"opset below 20 has no Gelu": 1}


def test_double() -> None:
    graph = Graph.from_proto(model(TORCH, kind="double"))
    report = FuseGelu().run(graph, Context())
    assert dict(report.skipped) == {"not float32": 1}
