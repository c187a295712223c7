from __future__ import annotations

import numpy as np
import onnx
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.context import Context
from qcompile.graph import Array, Graph
from qcompile.passes._norms import find_rms_norms
from qcompile.passes.sink_reshapes import SinkReshapes

LINEAR = """
    f = Reshape(x, flat)  g1 = Gemm(f, w)  v = Reshape(g1, up)
    {body}
    f2 = Reshape(z, flat)  g2 = Gemm(f2, w)  y = Reshape(g2, up)
"""
CONSTANTS = {"flat": np.array([-1, 6]), "up": np.array([-1, 5, 6]), "w": floats(6, 6) / 3}


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        pytest.param("z = Relu(v)", {}, id="relu"),
        pytest.param("a = Div(v, c)  e = Erf(a)  p = Add(e, one)  m = Mul(v, p)  z = Mul(m, half)", {
            "c": np.float32(1.414), "one": np.float32(1), "half": np.array([0.5], np.float32)}, id="gelu"),
        pytest.param("z = Mul(v, c)", {"c": floats(6)}, id="last-axis"),
        pytest.param("z = Add(c, v)", {"c": floats(1, 1, 6)}, id="last-axis-rank-3"),
        pytest.param("z = LayerNormalization(v, c, d)", {"c": floats(6), "d": floats(6)}, id="layer-norm"),
        pytest.param("z = Softmax <axis = 2> (v)", {}, id="softmax"),
        pytest.param("z = Add(v, x)", {}, id="residual"),
        pytest.param("r = Add(x, v)  n = LayerNormalization(r, c)  z = Add(r, n)", {"c": floats(6)}, id="transformer"),
        pytest.param("z = Clip(v, low, high)", {"low": np.float32(-1), "high": np.float32(1)}, id="clip"),
        pytest.param("z = Clip(v, , high)", {"high": np.float32(1)}, id="clip-one-side"),
    ],
)  # fmt: skip
def test_only_the_ends_are_left(body: str, constants: dict[str, Array]) -> None:
    text = f"g (float[n, 5, 6] x) => (float[n, 5, 6] y) {{ {LINEAR.format(body=body)} }}"
    report, graph = check_pass(
        SinkReshapes(), parse(text, **CONSTANTS, **constants), [{"x": floats(2, 5, 6)}, {"x": floats(1, 5, 6)}]
    )
    assert ops(graph)["Reshape"] == 2
    assert report.rewrites >= 2


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        pytest.param("z = Add(v, c)", {"c": floats(5, 1)}, id="constant-along-rows"),
        pytest.param("z = Add(v, c)", {"c": floats(1, 5, 6)}, id="position-embedding"),
        pytest.param("z = Softmax <axis = 1> (v)", {}, id="softmax-over-rows"),
        pytest.param("z = LayerNormalization <axis = 1> (v, c)", {"c": floats(5, 6)}, id="layer-norm-over-rows"),
        pytest.param(
            "t = Transpose <perm = [0, 2, 1]> (v)  u = Relu(t)  z = Transpose <perm = [0, 2, 1]> (u)", {}, id="transpose"
        ),
    ],
)
def test_what_mixes_rows_stops_it(body: str, constants: dict[str, Array]) -> None:
    text = f"g (float[n, 5, 6] x) => (float[n, 5, 6] y) {{ {LINEAR.format(body=body)} }}"
    _, graph = check_pass(SinkReshapes(), parse(text, **CONSTANTS, **constants), {"x": floats(2, 5, 6)})
    assert ops(graph)["Reshape"] == 4


def test_other_tensor_that_broadcasts_stops_it() -> None:
    text = f"g (float[n, 5, 6] x, float[n, 1, 6] k) => (float[n, 5, 6] y) {{ {LINEAR.format(body='z = Add(v, k)')} }}"
    report, _ = check_pass(SinkReshapes(), parse(text, **CONSTANTS), {"x": floats(2, 5, 6), "k": floats(2, 1, 6)})
    assert report.rewrites == 0


def test_split_into_heads_merges() -> None:
    model = parse(
        """g (float[n, l, 6] x) => (float[n, 2, l, 3] y) {
            f = Reshape(x, flat)  g1 = Gemm(f, w)  s = Shape <end = 2> (x)  t = Concat <axis = 0> (s, six)  v = Reshape(g1, t)
            h = Reshape(v, heads)  y = Transpose <perm = [0, 2, 1, 3]> (h) }""",
        flat=np.array([-1, 6]),
        w=floats(6, 6),
        six=np.array([6]),
        heads=np.array([0, 0, 2, 3]),
    )
    _, graph = check_pass(SinkReshapes(), model, [{"x": floats(2, 5, 6)}, {"x": floats(3, 1, 6)}])
    assert ops(graph) == {"Shape": 1, "Concat": 1, "Reshape": 2, "Gemm": 1, "Transpose": 1}


def test_a_reshape_that_splits_the_last_axis_is_no_row_reshape() -> None:
    model = parse(
        "g (float[n, 6] x) => (float[n, 2, 3] y) { r = Relu(x)  v = Reshape(r, s)  y = Neg(v) }", s=np.array([-1, 2, 3])
    )
    report, _ = check_pass(SinkReshapes(), model, {"x": floats(4, 6)})
    assert report.rewrites == 0


def test_output_names_stay() -> None:
    model = parse(
        """g (float[n, 5, 6] x) => (float[n, 5, 6] v, float[n, 5, 6] y) {
            f = Reshape(x, flat)  r = Relu(f)  v = Reshape(r, s)  y = Neg(v) }""",
        flat=np.array([-1, 6]),
        s=np.array([-1, 5, 6]),
    )
    _, graph = check_pass(SinkReshapes(), model, {"x": floats(2, 5, 6)})
    assert ops(graph) == {"Reshape": 3, "Relu": 1, "Neg": 1}


def test_sizes_not_known_to_match_are_left_alone() -> None:
    model = parse(
        "g (float[n, 6] x) => (float[m, 5, 6] y) { r = Relu(x)  v = Reshape(r, s)  y = Neg(v) }", s=np.array([-1, 5, 6])
    )
    report, _ = check_pass(SinkReshapes(), model, {"x": floats(10, 6)})
    assert report.rewrites == 0


def test_an_rms_norm_written_out_stays_whole() -> None:
    """Kernels of norms are found by the pattern; a Reshape between its square and its mean would hide it."""
    model = parse(
        """g (float[2, 3, 4] x) => (float[2, 3, 4] y) {
            rows = Reshape(x, flat) z = MatMul(rows, w) t = Reshape(z, back)
            s = Mul(t, t) m = ReduceMean(s, last) n = Add(m, eps) r = Sqrt(n) d = Div(t, r) y = Mul(d, g)
        }""",
        flat=np.array([-1, 4]),
        back=np.array([2, 3, 4]),
        w=floats(4, 4),
        last=np.array([-1]),
        eps=np.float32(1e-5),
        g=floats(4),
    )
    graph = Graph.from_proto(onnx.shape_inference.infer_shapes(model))
    assert len(list(find_rms_norms(graph))) == 1
    assert SinkReshapes().run(graph, Context()).rewrites == 0
    assert len(list(find_rms_norms(graph))) == 1
