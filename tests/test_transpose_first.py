from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, floats, parse

from qcompile.graph import Graph
from qcompile.passes.transpose_first import TransposeFirst

ROWS = "a = Conv(x, w)  r = {reshape}  t = Transpose <perm = [0, 2, 1]> (r)  y = Relu(t)"
MAP = "t = Transpose <perm = [0, 2, 1]> (x)  r = Reshape(t, s)  y = Conv(r, w)"


def order(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


@pytest.mark.parametrize("target", [pytest.param([-1, 8, 12], id="batch"), pytest.param([0, 8, -1], id="extent")])
def test_rows(target: list[int]) -> None:
    model = parse(
        f"g (float[n, 2, 3, 4] x) => (float[n, 12, 8] y) {{ {ROWS.format(reshape='Reshape(a, s)')} }}",
        w=floats(8, 2, 1, 1),
        s=np.array(target),
    )
    report, graph = check_pass(TransposeFirst(), model, [{"x": floats(2, 2, 3, 4)}, {"x": floats(1, 2, 3, 4)}])
    assert report.rewrites == 1
    assert order(graph) == ["Conv", "Transpose", "Reshape", "Relu"]


def test_rows_of_a_dynamic_image() -> None:
    model = parse(
        f"g (float[n, 2, h, v] x) => (float[n, l, 8] y) {{ {ROWS.format(reshape='Reshape(a, s)')} }}",
        w=floats(8, 2, 1, 1),
        s=np.array([0, 0, -1]),
    )
    report, graph = check_pass(TransposeFirst(), model, [{"x": floats(2, 2, 3, 4)}, {"x": floats(1, 2, 5, 2)}])
    assert (report.rewrites, dict(report.skipped), order(graph)) == (1, {}, ["Conv", "Transpose", "Reshape", "Relu"])


def test_map() -> None:
    model = parse(f"g (float[n, 12, 8] x) => (float[n, 2, 3, 4] y) {{ {MAP} }}", w=floats(2, 8, 1, 1), s=np.array([-1, 8, 3, 4]))
    report, graph = check_pass(TransposeFirst(), model, [{"x": floats(2, 12, 8)}, {"x": floats(1, 12, 8)}])
    assert report.rewrites == 1
    assert order(graph) == ["Reshape", "Transpose", "Conv"]


def test_there_and_back_again() -> None:
    swap = "Transpose <perm = [0, 2, 1]> "
    text = f"r = Reshape(x, s)  t = {swap}(r)  e = Relu(t)  u = {swap}(e)  y = Reshape(u, m)"
    model = parse(
        f"g (float[n, 2, 3, 4] x) => (float[n, 2, 3, 4] y) {{ {text} }}", s=np.array([-1, 2, 12]), m=np.array([-1, 2, 3, 4])
    )
    report, graph = check_pass(TransposeFirst(), model, {"x": floats(2, 2, 3, 4)})
    assert report.rewrites == 2
    assert order(graph) == ["Transpose", "Reshape", "Relu", "Reshape", "Transpose"]


def test_rows_of_unknown_width_and_length() -> None:
    text = "s = Shape <end = 2> (x)  to = Concat <axis = 0> (s, minus)  r = Reshape(x, to)  y = Transpose <perm = [0, 2, 1]> (r)"
    model = parse(f"g (float[n, c, h, v] x) => (float[n, l, c] y) {{ {text} }}", minus=np.array([-1]))
    report, _ = check_pass(TransposeFirst(), model, {"x": floats(2, 2, 3, 4)})
    assert dict(report.skipped) == {"the shape of the result cannot be written down": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param("r = Reshape(x, s)  z = Neg(r)  t = SWAP(r)  y = Add(t, t)", "", id="read-twice"),
        pytest.param("r = Reshape(x, s)  y = Transpose <perm = [1, 0, 2]> (r)", "", id="other-order"),
        pytest.param("r = Reshape(x, m)  y = SWAP(r)", "the Reshape does not join height and width", id="joins-other-axes"),
        pytest.param("a = Transpose <perm = [0, 1, 3, 2]> (x)  y = Reshape(a, s)", "", id="other-rank"),
        pytest.param(
            "r = Reshape(x, m)  u = Relu(r)  t = SWAP(u)  y = Reshape(t, m4)",
            "the Reshape does not part height and width",
            id="parts-other-axes",
        ),
    ],
)
def test_left_alone(body: str, reason: str) -> None:
    body = body.replace("SWAP", "Transpose <perm = [0, 2, 1]> ")
    constants = {"s": np.array([-1, 2, 12]), "m": np.array([-1, 6, 4]), "m4": np.array([-1, 2, 3, 4])}
    words = body.replace(")", " ").replace("(", " ").split()
    extra = ", float[d, e, f] z" if "z = " in body else ""
    rank = {"m4": "[n, a, b, c]"}.get("m4" if "m4" in body else "", "[n, a, b]")
    model = parse(
        f"g (float[n, 2, 3, 4] x) => (float{rank} y{extra}) {{ {body} }}", **{k: v for k, v in constants.items() if k in words}
    )
    report, _ = check_pass(TransposeFirst(), model, {"x": floats(2, 2, 3, 4)})
    assert report.rewrites == 0
    assert dict(report.skipped) == ({reason: 1} if reason else {})
