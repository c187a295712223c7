from __future__ import annotations

import numpy as np
import onnx
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.graph import Array, Graph
from qcompile.passes.fold_constants import FoldConstants

X = floats(2, 3)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        pytest.param("c = Constant <value_floats = [1.0, 2.0, 3.0]> ()\n y = Add(x, c)", {}, id="constant-floats"),
        pytest.param("c = Constant <value = float[3] {1, 2, 3}> ()\n y = Add(x, c)", {}, id="constant-value"),
        pytest.param("c = Constant <value_float = 2.5> ()\n y = Mul(x, c)", {}, id="constant-float"),
        pytest.param("t = Transpose <perm = [1, 0]> (w)\n y = MatMul(x, t)", {"w": floats(3, 3)}, id="transpose"),
        pytest.param(
            "a = Shape(w)\n b = ConstantOfShape <value = float[1] {2}> (a)\n c = Exp(b)\n y = Mul(x, c)",
            {"w": floats(2, 3)},
            id="shape-fill-exp",
        ),
        pytest.param(
            "l = Constant <value_int = 3> ()\n o = Constant <value_int = 1> ()\n z = Constant <value_int = 0> ()\n"
            "r = Range(z, l, o)\n f = Cast <to = 1> (r)\n y = Add(x, f)",
            {},
            id="range",
        ),
        pytest.param(
            "e = Equal(s, m)\n c = Where(e, n, s)\n b = Expand(w, c)\n y = Add(x, b)",
            {
                "s": np.array([-1, 3]),
                "m": np.array([-1, -1]),
                "n": np.array([2, 1]),
                "w": floats(1, 3),
            },
            id="equal-where-expand",
        ),
        pytest.param(
            "a, b = Split <axis = 0, num_outputs = 2> (w)\n c = Concat <axis = 0> (b, a)\n y = Add(x, c)",
            {"w": floats(2, 3)},
            id="split-concat",
        ),
    ],
)
def test_folds_to_nothing_but_the_last_node(body: str, constants: dict[str, Array]) -> None:
    report, graph = check_pass(
        FoldConstants(), parse(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", **constants), {"x": X}
    )
    assert len(graph.nodes) == 1
    assert report.rewrites > 0
    assert not report.refusals


def test_static_dimension_of_a_dynamic_tensor() -> None:
    model = parse(
        """g (float[n, 3] x) => (float[n, 3] y) {
            s = Shape(x)  one = Constant <value_int = 1> ()  k = Gather(s, one)  f = Cast <to = 1> (k)  y = Mul(x, f)
        }"""
    )
    _, graph = check_pass(FoldConstants(), model, [{"x": floats(2, 3)}, {"x": floats(5, 3)}])
    assert ops(graph) == {"Mul": 1}


def test_dynamic_dimension_stays() -> None:
    model = parse(
        """g (float[n, 3] x) => (float[n, 3] y) {
            s = Shape(x)  zero = Constant <value_int = 0> ()  k = Gather(s, zero)  f = Cast <to = 1> (k)  y = Mul(x, f)
        }"""
    )
    _, graph = check_pass(FoldConstants(), model, [{"x": floats(2, 3)}, {"x": floats(5, 3)}])
    assert ops(graph) == {"Shape": 1, "Gather": 1, "Cast": 1, "Mul": 1}


def test_constant_graph_output_keeps_its_name() -> None:
    model = parse("g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) { z = Exp(w)  y = Add(x, z) }", w=floats(2, 3))
    _, graph = check_pass(FoldConstants(), model, {"x": X})
    assert ops(graph) == {"Identity": 1, "Add": 1}


def test_constants_over_the_embedding_limit_are_fed() -> None:
    model = parse("g (float[2, 300] x) => (float[2, 300] y) { t = Transpose(w)  y = Add(x, t) }", w=floats(300, 2))
    _, graph = check_pass(FoldConstants(), model, {"x": floats(2, 300)})
    assert ops(graph) == {"Add": 1}


def test_small_batches_give_the_same_as_one() -> None:
    model = parse(
        "g (float[2, 3] x) => (float[2, 3] y) { a = Exp(w)  b = Neg(a)  c = Abs(b)  d = Sqrt(c)  y = Add(x, d) }", w=floats(2, 3)
    )
    _, graph = check_pass(FoldConstants(batch_bytes=1), model, {"x": X})
    assert ops(graph) == {"Add": 1}


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        pytest.param(
            "r = RandomUniformLike(w)\n z = Mul(r, zero)\n y = Add(x, z)",
            {"w": floats(2, 3), "zero": np.float32(0)},
            "draws random numbers",
            id="random",
        ),
        pytest.param(
            "d = DequantizeLinear(w, s)\n y = Add(x, d)",
            {"w": np.ones((2, 3), np.int8), "s": np.float32(0.5)},
            "quantisation operator",
            id="dequantize",
        ),
        pytest.param(
            "q = SequenceConstruct(w)\n d = SequenceAt(q, i)\n y = Add(x, d)",
            {"w": floats(2, 3), "i": np.array(0)},
            "result is not a tensor",
            id="sequence",
        ),
        pytest.param(
            "f = ConstantOfShape(s)\n m = ReduceSum <keepdims = 0> (f)\n y = Add(x, m)",
            {"s": np.array([512, 1024, 16])},
            "result would be large, and larger than its inputs",
            id="blow-up",
        ),
    ],
)
def test_refusals(body: str, constants: dict[str, Array], reason: str) -> None:
    model = parse(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", **constants)
    report, _ = check_pass(FoldConstants(), model, {"x": X})
    assert report.skipped == {reason: 1}


def test_packed_weights_behind_a_cast_stay() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) { c = Cast <to = 3> (w)  f = DequantizeLinear(c, s)  y = Add(x, f) }", s=np.float32(1)
    )
    model.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [2], [1, -2]))
    report, graph = check_pass(FoldConstants(), model, {"x": floats(2)})
    assert report.skipped["cast of 4-bit weights"] == 1
    assert ops(graph) == {"Cast": 1, "DequantizeLinear": 1, "Add": 1}


def test_what_onnxruntime_cannot_evaluate_is_refused_alone() -> None:
    model = parse("g (float[2, 3] x) => (float[2, 3] y) { r = Reshape(w, s)  e = Exp(v)  z = Add(r, e)  y = Add(x, z) }")
    for name, value in {"w": floats(5), "s": np.array([2, 3]), "v": floats(2, 3)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    graph = Graph.from_proto(model)
    from qcompile.context import Context

    report = FoldConstants().run(graph, Context())
    assert report.skipped["onnxruntime cannot evaluate it"] >= 1
    assert ops(graph) == {"Reshape": 1, "Add": 2}


def test_a_body_sees_the_constant_under_its_name() -> None:
    model = parse(
        """g (float[2, 3] x, bool c) => (float[2, 3] y) {
            k = Exp(w)
            y = If (c) <
                then_branch = t () => (float[2, 3] a) { a = Add(x, k) },
                else_branch = e () => (float[2, 3] b) { b = Sub(x, k) }
            >
        }""",
        w=floats(2, 3),
    )
    _, graph = check_pass(FoldConstants(), model, [{"x": X, "c": np.array(True)}, {"x": X, "c": np.array(False)}])
    assert ops(graph) == {"If": 1}
    assert list(graph.constants) == ["k"]


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_opsets(opset: int) -> None:
    model = parse("g (float[2, 3] x) => (float[2, 3] y) { t = Transpose(w)  y = Add(x, t) }", opset, w=floats(3, 2))
    _, graph = check_pass(FoldConstants(), model, {"x": X})
    assert ops(graph) == {"Add": 1}
