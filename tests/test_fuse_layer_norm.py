from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from passes_helpers import check_pass, floats, ops, parse
from runtime_marks import needs_epsilon_first

from qcompile.context import Context
from qcompile.graph import Array, Graph
from qcompile.passes._norms import find_rms_norms
from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from qcompile.runtime import Session

N = 8
X = 2 * floats(5, 3, N) + 1
CONSTANTS: dict[str, Array] = {
    "axes": np.array([-1]),
    "last": np.array([2]),
    "middle": np.array([1]),
    "both": np.array([1, 2]),
    "eps": np.float32(1e-3),
    "eps1": np.array([1e-3], np.float32),
    "eps64": np.float64(1e-3),
    "none": np.float32(0),
    "two": np.float32(2),
    "two64": np.float64(2),
    "three": np.float32(3),
    "half": np.float32(0.5),
    "inverse": np.float32(-0.5),
    "one": np.float32(1),
    "gamma": floats(N, seed=1),
    "gamma3": floats(1, 1, N, seed=1),
    "gamma4": floats(1, 1, 1, N, seed=1),
    "beta": floats(N, seed=2),
    "rows": floats(3, 1, seed=3),
}
CENTRED = "m = ReduceMean(x, axes)  d = Sub(x, m)  "
VARIANCE = CENTRED + "q = Pow(d, two)  v = ReduceMean(q, axes)  w = Add(v, eps)  "
ROOT = VARIANCE + "r = Sqrt(w)  "
TORCH = ROOT + "n = Div(d, r)  g = Mul(n, gamma)  y = Add(g, beta)"
POWER = "q = Pow(x, two)  v = ReduceMean(q, axes)  w = Add(v, eps)  "
RMS = POWER + "r = Sqrt(w)  n = Div(x, r)  y = Mul(n, gamma)"


def model(body: str, opset: int = 21, dims: str = "n, 3, 8", outputs: str = "", kind: str = "float") -> ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {k: v for k, v in CONSTANTS.items() if k in words}
    return parse(f"g ({kind}[{dims}] x) => ({kind}[{dims}] y{outputs}) {{ {body} }}", opset, **used)


LAYER_FORMS = [
    pytest.param(TORCH, "gamma beta", id="torch"),
    pytest.param(TORCH.replace("Pow(d, two)", "Mul(d, d)"), "gamma beta", id="product"),
    pytest.param(TORCH.replace("axes", "last"), "gamma beta", id="axis-from-the-front"),
    pytest.param(TORCH.replace("Add(v, eps)", "Add(eps1, v)"), "gamma beta", id="epsilon-first", marks=needs_epsilon_first),
    pytest.param(TORCH.replace("Sqrt(w)", "Pow(w, half)"), "gamma beta", id="power-of-a-half"),
    pytest.param(TORCH.replace("n = Div(d, r)", "i = Reciprocal(r)  n = Mul(d, i)"), "gamma beta", id="reciprocal"),
    pytest.param(TORCH.replace("n = Div(d, r)", "i = Div(one, r)  n = Mul(i, d)"), "gamma beta", id="one-by-root"),
    pytest.param(VARIANCE + "i = Pow(w, inverse)  n = Mul(d, i)  g = Mul(gamma, n)  y = Add(beta, g)", "gamma beta", id="pow"),
    pytest.param(ROOT + "h = Mul(gamma, d)  g = Div(h, r)  y = Add(g, beta)", "gamma beta", id="gamma-before"),
    pytest.param(ROOT + "i = Reciprocal(r)  s = Mul(i, gamma)  g = Mul(d, s)  y = Add(g, beta)", "gamma beta", id="at-root"),
    pytest.param(
        ROOT + "i = Reciprocal(r)  s = Mul(i, gamma)  a = Mul(x, s)  b = Mul(m, s)  c = Sub(beta, b)  y = Add(a, c)",
        "gamma beta", id="keras",
    ),
    pytest.param(ROOT + "n = Div(d, r)  y = Mul(n, gamma)", "gamma", id="no-beta"),
    pytest.param(ROOT + "n = Div(d, r)  y = Add(n, beta)", "beta", id="no-gamma"),
    pytest.param(ROOT + "y = Div(d, r)", "", id="neither"),
    pytest.param(TORCH.replace("gamma", "gamma3"), "gamma beta", id="gamma-of-rank-3"),
    pytest.param(TORCH.replace("gamma", "half"), "half beta", id="gamma-a-number"),
    pytest.param(TORCH.replace("q = Pow(d, two)", "e = Sub(x, m)  q = Mul(d, e)"), "gamma beta", id="two-differences"),
    pytest.param(
        CENTRED + "c = Cast <to = 1> (d)  q = Pow(c, two)  v = ReduceMean(q, axes)  w = Add(v, eps)  r = Sqrt(w)  n = Div(d, r)  "
        "h = Cast <to = 1> (n)  g = Mul(h, gamma)  y = Add(g, beta)",
        "gamma beta", id="casts",
    ),
    pytest.param(
        "X = Cast <to = 11> (x)  m = ReduceMean(X, axes)  d = Sub(X, m)  q = Pow(d, two64)  v = ReduceMean(q, axes)  "
        "w = Add(v, eps64)  r = Sqrt(w)  n = Div(d, r)  h = Cast <to = 1> (n)  g = Mul(h, gamma)  y = Add(g, beta)",
        "gamma beta", id="in-double",
    ),
]  # fmt: skip


def layer_norm64(x: Array, constants: str) -> Array:
    """The formula in float64."""
    used = [k for k in constants.split() if k != "beta"]
    gamma = CONSTANTS[used[0]].astype(np.float64) if used else 1.0
    beta = CONSTANTS["beta"].astype(np.float64) if "beta" in constants else 0.0
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=-1, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3) * gamma + beta
    return result


@pytest.mark.parametrize(("body", "constants"), LAYER_FORMS)
def test_layer_norm(body: str, constants: str) -> None:
    report, graph = check_pass(FuseLayerNorm(), model(body), {"x": X})
    assert report.rewrites == 1
    assert ops(graph) == {"LayerNormalization": 1}
    assert not report.skipped
    found = Session(graph.to_proto()).run({"x": X})["y"]
    np.testing.assert_allclose(found, layer_norm64(X, constants), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.floats(1e-4, 1.0), st.integers(1, 4), st.integers(2, 9), st.booleans(), st.booleans(), st.integers(0, 2**16)
)  # fmt: skip
def test_any_epsilon_and_size(epsilon: float, rows: int, size: int, with_gamma: bool, with_beta: bool, seed: int) -> None:
    gamma, beta = floats(size, seed=seed), floats(size, seed=seed + 1)
    body = ROOT.replace("eps", "e0") + "n = Div(d, r)  "
    body += "g = Mul(n, G)  " if with_gamma else "g = Identity(n)  "
    body += "y = Add(g, B)" if with_beta else "y = Identity(g)"
    constants: dict[str, Array] = {"axes": np.array([-1]), "two": np.float32(2), "e0": np.float32(epsilon)}
    constants |= ({"G": gamma} if with_gamma else {}) | ({"B": beta} if with_beta else {})
    x = floats(rows, size, seed=seed + 2)
    _, graph = check_pass(
        FuseLayerNorm(), parse(f"g (float[n, {size}] x) => (float[n, {size}] y) {{ {body} }}", **constants), {"x": x}
    )
    assert ops(graph).get("LayerNormalization") == 1
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float64(np.float32(epsilon)))
    wanted = wanted * (gamma if with_gamma else 1) + (beta if with_beta else 0)
    found = Session(graph.to_proto()).run({"x": x})["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())) / min(1.0, epsilon**0.5))


def test_size_known_from_gamma_alone() -> None:
    report, graph = check_pass(FuseLayerNorm(), model(TORCH, dims="n, 3, c"), {"x": X})
    assert report.rewrites == 1
    assert ops(graph) == {"LayerNormalization": 1}


def test_result_in_double_stays_double() -> None:
    body = "X = Cast <to = 11> (x)  m = ReduceMean(X, axes)  d = Sub(X, m)  q = Pow(d, two64)  v = ReduceMean(q, axes)  "
    body += "w = Add(v, eps64)  r = Sqrt(w)  n = Div(d, r)  z = Neg(n)  y = Cast <to = 1> (z)"
    _, graph = check_pass(FuseLayerNorm(), model(body), {"x": X})
    assert ops(graph) == {"LayerNormalization": 1, "Cast": 2, "Neg": 1}


def test_gamma_product_read_elsewhere_leaves_beta_outside() -> None:
    report, graph = check_pass(FuseLayerNorm(), model(TORCH + "  z = Neg(g)", outputs=", float[n, 3, 8] z"), {"x": X})
    assert ops(graph) == {"LayerNormalization": 1, "Add": 1, "Neg": 1}
    assert not report.skipped  # the longer chain was refused, but its part was named


SHARED = "a step of it is read elsewhere, or is an output of the graph"
AXIS = "not along the last axis"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(TORCH + "  z = Neg(d)", SHARED, id="difference-read"),
        pytest.param(TORCH + "  z = Identity(v)", SHARED, id="variance-read"),
        pytest.param(TORCH.replace("axes", "middle") + "  z = Neg(x)", AXIS, id="axis"),
        pytest.param(TORCH.replace("axes", "both") + "  z = Neg(x)", AXIS, id="two-axes"),
        pytest.param(TORCH.replace("ReduceMean(q, axes)", "ReduceMean(q, middle)") + "  z = Neg(x)", AXIS, id="mixed-axes"),
        pytest.param(TORCH.replace("eps", "none") + "  z = Neg(x)", "epsilon is not a positive number", id="epsilon"),
        pytest.param(TORCH.replace("two", "three") + "  z = Neg(x)", "", id="cube"),
        pytest.param(TORCH.replace("n = Div(d, r)", "n = Div(x, r)") + "  z = Neg(x)", "", id="not-centred"),
        pytest.param(TORCH.replace("Sqrt(w)", "Exp(w)") + "  z = Neg(x)", "", id="no-root"),
    ],
)
def test_left_alone(body: str, reason: str) -> None:
    made = model(body, outputs=", float z")
    made.graph.output[1].type.tensor_type.ClearField("shape")
    graph = Graph.from_proto(made)
    before = ops(graph)
    report = FuseLayerNorm().run(graph, Context())
    assert ops(graph) == before
    assert report.rewrites == 0
    assert reason == "" or reason in report.skipped


@pytest.mark.parametrize("factor", ["rows", "gamma4"])
def test_factor_that_is_not_one_number_a_channel_stays_outside(factor: str) -> None:
    made = model(TORCH.replace("gamma", factor))
    made.graph.output[0].type.tensor_type.ClearField("shape")
    graph = Graph.from_proto(made)
    FuseLayerNorm().run(graph, Context())
    assert ops(graph) == {"LayerNormalization": 1, "Mul": 1, "Add": 1}
    np.testing.assert_allclose(Session(graph.to_proto()).run({"x": X})["y"], Session(made).run({"x": X})["y"], rtol=0, atol=1e-5)


def test_beta_that_is_not_one_number_a_channel_stays_outside() -> None:
    _, graph = check_pass(FuseLayerNorm(), model(TORCH.replace("beta", "rows")), {"x": X})
    assert ops(graph) == {"LayerNormalization": 1, "Add": 1}


def test_unknown_size() -> None:
    report, _ = check_pass(FuseLayerNorm(), model(ROOT + "y = Div(d, r)", dims="n, 3, c"), {"x": X})
    assert dict(report.skipped) == {"the size of the last axis is unknown": 1}


def test_axes_unknown_and_no_keepdims() -> None:
    body = TORCH.replace("m = ReduceMean(x, axes)", "k = ReduceMean <keepdims = 0> (x, axes)  m = Unsqueeze(k, axes)")
    report, _ = check_pass(FuseLayerNorm(), model(body), {"x": X})
    assert report.rewrites == 0


def test_older_opset_has_axes_as_attribute() -> None:
    body = TORCH.replace("(x, axes)", " <axes = [-1]> (x)").replace("(q, axes)", " <axes = [-1]> (q)")
    report, _ = check_pass(FuseLayerNorm(), model(body, opset=17), {"x": X})
    assert report.rewrites == 1
    report, _ = check_pass(FuseLayerNorm(), model(body, opset=13), {"x": X})
    assert dict(report.skipped) == {"opset below 17 has no LayerNormalization": 1}


def test_double() -> None:
    body = TORCH.replace("two", "two64").replace("eps", "eps64").replace("  g = Mul(n, gamma)  y = Add(g, beta)", "")
    report = FuseLayerNorm().run(Graph.from_proto(model(body.replace("n = Div", "y = Div"), kind="double")), Context())
    assert dict(report.skipped) == {"not float32": 1}


RMS_FORMS = [
    pytest.param(RMS, id="divided"),
    pytest.param(RMS.replace("Pow(x, two)", "Mul(x, x)"), id="product"),
    pytest.param(POWER + "r = Sqrt(w)  i = Reciprocal(r)  n = Mul(x, i)  y = Mul(gamma, n)", id="reciprocal"),
    pytest.param(POWER + "r = Sqrt(w)  i = Div(one, r)  n = Mul(i, x)  y = Mul(gamma, n)", id="one-by-root"),
    pytest.param(POWER + "i = Pow(w, inverse)  n = Mul(x, i)  y = Mul(n, gamma)", id="pow"),
    pytest.param(RMS.replace("Pow(x, two)", "Pow(c, two)").replace("q =", "c = Cast <to = 1> (x)  q =", 1), id="cast"),
]


@pytest.mark.parametrize("body", RMS_FORMS)
def test_rms_norm(body: str) -> None:
    report, graph = check_pass(FuseLayerNorm(), model(body, opset=23), {"x": X})
    assert report.rewrites == 1
    assert ops(graph) == {"RMSNormalization": 1}
    found = Session(graph.to_proto()).run({"x": X})["y"]
    wide = X.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-3) * CONSTANTS["gamma"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("body", RMS_FORMS)
def test_rms_norm_found_where_no_operator_names_it(body: str) -> None:
    report, graph = check_pass(FuseLayerNorm(), model(body), {"x": X})
    assert dict(report.skipped) == {"opset below 23 has no RMSNormalization": 1}
    found = list(find_rms_norms(graph))
    assert [(f.x.name, f.output.name, f.beta) for f in found] == [("x", "y", None)]
    np.testing.assert_array_equal(found[0].gamma, CONSTANTS["gamma"])
    assert found[0].epsilon == pytest.approx(1e-3)


def test_rms_norm_without_gamma() -> None:
    graph = Graph.from_proto(model(POWER + "r = Sqrt(w)  y = Div(x, r)"))
    graph.infer_shapes()
    (found,) = find_rms_norms(graph)
    np.testing.assert_array_equal(found.gamma, np.ones(N, np.float32))


def test_rms_norm_refused_is_not_found() -> None:
    graph = Graph.from_proto(model(RMS.replace("axes", "middle")))
    graph.infer_shapes()
    assert not list(find_rms_norms(graph))
    assert dict(FuseLayerNorm().run(graph, Context()).skipped) == {AXIS: 1}
