from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.graph import Array
from qcompile.passes.eliminate import Eliminate

X = floats(2, 3, 4)
X[0, 0, :2] = [-0.0, 0.0]


def run(body: str, constants: dict[str, Array], result: str = "float[n, 3, 4]", opset: int = 21):  # type: ignore[no-untyped-def]
    text = f"g (float[n, 3, 4] x) => ({result} y) {{ a = Relu(x)  {body}  y = Neg(b) }}"
    return check_pass(Eliminate(), parse(text, opset, **constants), {"x": X})


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        pytest.param("b = Identity(a)", {}, id="identity"),
        pytest.param("b = Dropout(a)", {}, id="dropout"),
        pytest.param("b = Dropout(a, r, m)", {"r": np.float32(0.3), "m": np.array(False)}, id="dropout-inference"),
        pytest.param("b = Cast <to = 1> (a)", {}, id="cast"),
        pytest.param("b = Concat <axis = 1> (a)", {}, id="concat"),
        pytest.param("b = Sum(a)", {}, id="sum"),
        pytest.param("b = Reshape(a, s)", {"s": np.array([-1, 3, 4])}, id="reshape"),
        pytest.param("b = Reshape(a, s)", {"s": np.array([0, 0, 4])}, id="reshape-copy"),
        pytest.param("b = Transpose <perm = [0, 1, 2]> (a)", {}, id="transpose"),
        pytest.param("c = Transpose <perm = [1, 2, 0]> (a)  b = Transpose <perm = [2, 0, 1]> (c)", {}, id="transpose-twice"),
        pytest.param("b = Pad(a, p)", {"p": np.zeros(6, np.int64)}, id="pad"),
        pytest.param("b = Slice(a, s, e)", {"s": np.array([0]), "e": np.array([2**63 - 1])}, id="slice-to-the-end"),
        pytest.param("b = Slice(a, s, e, ax)", {"s": np.array([0]), "e": np.array([3]), "ax": np.array([-2])}, id="slice-static"),
        pytest.param("b = Expand(a, s)", {"s": np.array([1, 3, 4])}, id="expand"),
        pytest.param("b = Mul(a, c)", {"c": np.float32(1)}, id="mul-scalar"),
        pytest.param("b = Mul(c, a)", {"c": np.ones((3, 1), np.float32)}, id="mul-channel"),
        pytest.param("b = Div(a, c)", {"c": np.float32(1)}, id="div"),
        pytest.param("b = Pow(a, c)", {"c": np.float32(1)}, id="pow"),
        pytest.param("b = Sub(a, c)", {"c": np.float32(0)}, id="sub"),
        pytest.param("b = Add(a, c)", {"c": np.float32(-0.0)}, id="add-minus-zero"),
    ],
)
def test_goes(body: str, constants: dict[str, Array]) -> None:
    _, graph = run(body, constants)
    assert ops(graph) == {"Relu": 1, "Neg": 1}
    assert not graph.constants


@pytest.mark.parametrize(
    ("body", "constants", "result"),
    [
        pytest.param("b = Transpose <perm = [0, 2, 1]> (a)", {}, "float[n, 4, 3]", id="transpose"),
        pytest.param("b = Reshape(a, s)", {"s": np.array([-1, 4, 3])}, "float[n, 4, 3]", id="reshape"),
        pytest.param("b = Slice(a, s, e)", {"s": np.array([0]), "e": np.array([2])}, "float[m, 3, 4]", id="slice-of-dynamic"),
        pytest.param("b = Mul(a, c)", {"c": np.ones((1, 1, 1, 1), np.float32)}, "float[1, n, 3, 4]", id="mul-adds-an-axis"),
        pytest.param("b = Mul(a, c)", {"c": np.ones((2, 1, 1), np.float32)}, "float[m, 3, 4]", id="mul-broadcasts-the-batch"),
        pytest.param("b = Expand(a, s)", {"s": np.array([2, 3, 4])}, "float[m, 3, 4]", id="expand-the-batch"),
        pytest.param("b = Cast <to = 11> (a)", {}, "double[n, 3, 4]", id="cast"),
        pytest.param("b = Sub(c, a)", {"c": np.float32(0)}, "float[n, 3, 4]", id="zero-minus-x"),
    ],
)
def test_stays(body: str, constants: dict[str, Array], result: str) -> None:
    report, graph = run(body, constants, result)
    assert len(graph.nodes) == 3
    assert report.rewrites == 0


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        pytest.param("b = Add(a, c)", {"c": np.float32(0)}, "x + 0 turns -0.0 into 0.0", id="add-zero"),
        pytest.param("b = Sub(a, c)", {"c": np.float32(-0.0)}, "x + 0 turns -0.0 into 0.0", id="sub-minus-zero"),
        pytest.param(
            "b = Mul(a, c)", {"c": np.ones((2, 1, 1), np.float32)}, "the constant may broadcast the other operand", id="broadcast"
        ),
        pytest.param("d, m = Dropout(a)  f = Cast <to = 1> (m)  b = Mul(d, f)", {}, "mask of Dropout is read", id="mask"),
        pytest.param(
            "b = Dropout(a, r, m)", {"r": np.float32(0), "m": np.array(True)}, "Dropout may be in training mode", id="training"
        ),
    ],
)
def test_refusals(body: str, constants: dict[str, Array], reason: str) -> None:
    report, _ = run(body, constants)
    assert report.skipped == {reason: 1}


def test_reshapes_merge() -> None:
    _, graph = run("c = Flatten(a)  b = Reshape(c, s)", {"s": np.array([-1, 2, 6])}, "float[n, 2, 6]")
    assert ops(graph) == {"Relu": 1, "Reshape": 1, "Neg": 1}


def test_a_reshape_that_copies_a_dimension_does_not_merge() -> None:
    _, graph = run("c = Flatten(a)  b = Reshape(c, s)", {"s": np.array([0, 2, 6])}, "float[n, 2, 6]")
    assert ops(graph)["Flatten"] == 1


def test_dead_nodes_and_constants() -> None:
    report, graph = run("d = Exp(a)  e = Mul(d, c)  b = Abs(a)", {"c": floats(4)})
    assert ops(graph) == {"Relu": 1, "Abs": 1, "Neg": 1}
    assert not graph.constants
    assert report.rewrites == 2


def test_between_input_and_output_a_name_stays() -> None:
    model = parse("g (float[2] x) => (float[2] y, float[2] z) { y = Identity(x)  z = Reshape(x, s) }", s=np.array([2]))
    report, graph = check_pass(Eliminate(), model, {"x": floats(2)})
    assert ops(graph) == {"Identity": 1, "Reshape": 1}
    assert report.skipped == {"stands between two names that must stay": 1}


def test_output_name_moves_to_the_producer() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Relu(x)  y = Identity(a) }")
    _, graph = check_pass(Eliminate(), model, {"x": floats(2)})
    assert ops(graph) == {"Relu": 1}


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_opsets(opset: int) -> None:
    _, graph = run("b = Identity(a)", {}, opset=opset)
    assert len(graph.nodes) == 2
