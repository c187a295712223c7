from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.passes._dims import Dim
from qcompile.passes.simplify_shapes import SimplifyShapes

I0, I1, I2 = np.array(0), np.array(1), np.array(2)
HEADS = """
    s = Shape(x)  b = Gather(s, i0)  l = Gather(s, i1)  b1 = Unsqueeze(b, axis)  l1 = Unsqueeze(l, axis)
    t = Concat <axis = 0> (b1, l1, heads, width)  y = Reshape(x, t)
"""
SIZES = {"i0": I0, "i1": I1, "axis": np.array([0]), "heads": np.array([2]), "width": np.array([3])}


@pytest.mark.parametrize("opset", [13, 14, 21])
def test_split_into_heads(opset: int) -> None:
    model = parse(f"g (float[b, l, 6] x) => (float[b, l, 2, 3] y) {{ {HEADS} }}", opset, **SIZES)
    report, graph = check_pass(SimplifyShapes(), model, [{"x": floats(1, 4, 6)}, {"x": floats(3, 7, 6)}])
    assert ops(graph) == {"Reshape": 1}
    assert graph.nodes[0].inputs[1].array().tolist() == [0, 0, 2, 3]
    assert report.rewrites == 1


def test_sizes_of_another_tensor_with_the_same_dimensions() -> None:
    text = HEADS.replace("y = Reshape(x, t)", "e = Exp(x)  m = MatMul(e, w)  y = Reshape(m, t)")
    model = parse(f"g (float[b, l, 6] x) => (float[b, l, 2, 3] y) {{ {text} }}", **SIZES, w=floats(6, 6))
    _, graph = check_pass(SimplifyShapes(), model, [{"x": floats(2, 4, 6)}])
    assert ops(graph) == {"Exp": 1, "MatMul": 1, "Reshape": 1}


def test_unrelated_dimension_becomes_minus_one() -> None:
    model = parse(
        """g (float[b, l, 6] x, float[k, 2] z) => (float[k, r] y) {
            s = Shape(z)  k0 = Gather(s, i0)  t = Concat <axis = 0> (k0, rest)  y = Reshape(x, t) }""",
        i0=np.array([0]),
        rest=np.array([6]),
    )
    _, graph = check_pass(SimplifyShapes(), model, [{"x": floats(2, 4, 6), "z": floats(8, 2)}])
    assert graph.nodes[-1].inputs[1].array().tolist() == [-1, 6]


def test_two_unrelated_dimensions_are_refused() -> None:
    model = parse(
        "g (float[b, l, 6] x, float[k, m, 2] z) => (float[k, m, r] y) { s = Shape <end = 2> (z)  t = Concat <axis = 0> (s, rest)"
        " y = Reshape(x, t) }",
        rest=np.array([3]),
    )
    report, graph = check_pass(SimplifyShapes(), model, [{"x": floats(2, 4, 6), "z": floats(8, 2, 2)}])
    assert report.skipped == {"target shape is not numbers and dimensions of the data": 1}
    assert ops(graph)["Shape"] == 1


def test_swapped_dimensions_are_not_copied() -> None:
    text = HEADS.replace("(b1, l1,", "(l1, b1,")
    model = parse(f"g (float[b, l, 6] x) => (float[l, b, 2, 3] y) {{ {text} }}", **SIZES)
    report, graph = check_pass(SimplifyShapes(), model, [{"x": floats(2, 4, 6)}])
    assert len(report.refusals) == 1
    assert ops(graph) == {"Shape": 2, "Concat": 1, "Reshape": 1}


def test_allowzero_with_a_copied_dimension_is_refused() -> None:
    text = HEADS.replace("Reshape(", "Reshape <allowzero = 1> (")
    model = parse(f"g (float[b, l, 6] x) => (float[b, l, 2, 3] y) {{ {text} }}", **SIZES)
    report, _ = check_pass(SimplifyShapes(), model, [{"x": floats(2, 4, 6)}])
    assert len(report.refusals) == 1


def test_rank_unknown_to_onnx() -> None:
    text = HEADS.replace("s = Shape(x)", "u = Reshape(x, free)  s = Shape(u)").replace("Reshape(x, t)", "Reshape(u, t)")
    model = parse(f"g (float[n] x, int64[r] free) => (y) {{ {text} }}".replace("(y)", "(float[p, q, 2, 3] y)"), **SIZES)
    _, graph = check_pass(SimplifyShapes(), model, [{"x": floats(48), "free": np.array([2, 4, 6])}])
    assert ops(graph) == {"Reshape": 2}


def test_expand_target_becomes_shape_and_concat() -> None:
    model = parse(
        """g (float[b, l, 6] x, float[1, 1, 6] c) => (float[b, m, 6] y) {
            s = Shape(x)  b0 = Gather(s, i0)  b1 = Unsqueeze(b0, axis)  t = Concat <axis = 0> (b1, minus, minus)
            f = ConstantOfShape <value = int64[1] {1}> (three)  n = Mul(f, minus)  e = Equal(t, n)  w = Where(e, f, t)
            k = Expand(c, w)  y = Concat <axis = 1> (k, x) }""",
        i0=I0,
        axis=np.array([0]),
        minus=np.array([-1]),
        three=np.array([3]),
    )
    _, graph = check_pass(SimplifyShapes(), model, [{"x": floats(2, 4, 6), "c": floats(1, 1, 6)}])
    assert ops(graph) == {"Shape": 1, "Concat": 2, "Expand": 1}


def test_broadcast_of_two_unknowns_is_not_taken_for_either() -> None:
    """x [b, l] + z [b, m] has l rows only where l is not 1: the sum's own size must be used."""
    model = parse(
        """g (float[b, l, 6] x, float[b, m, 6] z) => (float[b, r, 2, 3] y) {
            a = Add(x, z)  s = Shape(x)  b0 = Gather(s, i0)  l0 = Gather(s, i1)  t = Concat <axis = 0> (b0, l0, heads, width)
            y = Reshape(a, t) }""",
        i0=np.array([0]),
        i1=np.array([1]),
        heads=np.array([-1]),
        width=np.array([3]),
    )
    feeds = [{"x": floats(2, 1, 6), "z": floats(2, 5, 6)}, {"x": floats(2, 5, 6), "z": floats(2, 5, 6)}]
    report, _ = check_pass(SimplifyShapes(), model, feeds)
    assert len(report.refusals) == 1


@pytest.mark.parametrize(
    ("a", "b", "quotient"),
    [
        pytest.param(Dim(12, ("l", "n")), Dim(4, ("n",)), Dim(3, ("l",)), id="exact"),
        pytest.param(Dim(12, ("n",)), Dim(5), None, id="rest"),
        pytest.param(Dim(12), Dim(4, ("n",)), None, id="symbol-missing"),
        pytest.param(Dim(12, ("n", "n")), Dim(1, ("n",)), Dim(12, ("n",)), id="square"),
        pytest.param(Dim(12), Dim(0), None, id="by-zero"),
    ],
)
def test_monomial_division(a: Dim, b: Dim, quotient: Dim | None) -> None:
    assert a.over(b) == quotient
    if quotient is not None:
        assert quotient * b == a
