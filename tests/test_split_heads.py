from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.simplify_shapes import SimplifyShapes
from qcompile.passes.split_heads import SplitHeads

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
ATTENTION = "kt = Transpose <perm = [0, 1, 3, 2]> (k)  s = MatMul(q, kt)  p = Softmax(s)  y = MatMul(p, v)"
# x [n, 5, 24] -> 3 parts, 2 heads, 4 numbers
RESHAPE = "r = Reshape(x, shape)"
MOVED = f"{RESHAPE}  t = Transpose <perm = [2, 0, 3, 1, 4]> (r)"
GATHERS = "q = Gather({of}, i0)  k = Gather({of}, i1)  v = Gather({of}, i2)"
CONSTANTS = {"shape": np.array([-1, 5, 3, 2, 4]), **{f"i{i}": np.array(i) for i in range(3)}}
FEEDS = [{"x": floats(2, 5, 24)}, {"x": floats(1, 5, 24, seed=1)}]


def used(text: str, constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return {k: v for k, v in constants.items() if k in words}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(f"{MOVED}  " + GATHERS.format(of="t"), id="gathers"),
        pytest.param(
            f"{MOVED}  q = Gather(t, i0)  k = Gather(t, m2)  v = Gather(t, i2)",
            id="negative-index",
        ),
        pytest.param(
            f"{MOVED}  a, b, c = Split <axis = 0> (t, ones)  q = Squeeze(a, axis)  k = Squeeze(b, axis)  v = Squeeze(c, axis)",
            id="split-squeeze",
        ),
        pytest.param(
            f"{RESHAPE}  t = Transpose <perm = [0, 3, 2, 1, 4]> (r)  q = Gather <axis = 2> (t, i0)  "
            "k = Gather <axis = 2> (t, i1)  v = Gather <axis = -3> (t, i2)",
            id="parts-stay-inside",
        ),
    ],
)
def test_attention(body: str) -> None:
    constants = {**CONSTANTS, "ones": np.ones(3, np.int64), "axis": np.array([0]), "m2": np.array(-2)}
    text = f"{body}  {ATTENTION}"
    model = parse(f"g (float[n, 5, 24] x) => (float[n, 2, 5, 4] y) {{ {text} }}", **used(text, constants))
    report, graph = check_pass(SplitHeads(), model, FEEDS)
    assert report.rewrites == 1
    assert ops(graph) == {"Reshape": 1, "Transpose": 2, "Split": 1, "MatMul": 2, "Softmax": 1}


def test_parts_without_a_transpose() -> None:
    text = f"{RESHAPE}  {GATHERS.format(of='r').replace('Gather', 'Gather <axis = 2> ')}  y = Sum(q, k, v)"
    model = parse(f"g (float[n, 5, 24] x) => (float[n, 5, 2, 4] y) {{ {text} }}", **used(text, CONSTANTS))
    report, graph = check_pass(SplitHeads(), model, FEEDS)
    assert report.rewrites == 1
    assert ops(graph) == {"Reshape": 1, "Split": 1, "Sum": 1}


def test_dynamic_length_and_parts_that_are_outputs() -> None:
    model = parse(
        """g (float[n, l, 8] x) => (float[n, 2, l, 2] q, float[n, 2, l, 2] k) {
            s = Shape <end = 2> (x)  to = Concat <axis = 0> (s, tail)  r = Reshape(x, to)
            t = Transpose <perm = [2, 0, 3, 1, 4]> (r)  q = Gather(t, i0)  k = Gather(t, i1) }""",
        tail=np.array([2, 2, 2]),
        i0=np.array(0),
        i1=np.array(1),
    )
    report, graph = check_pass(SplitHeads(), model, [{"x": floats(2, 5, 8)}, {"x": floats(1, 3, 8)}])
    assert report.rewrites == 1
    assert ops(graph)["Split"] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(
            f"{MOVED}  q = Gather(t, i0)  k = Gather(t, i1)  y = Add(q, k)",
            "",
            id="a-part-nobody-reads",
        ),
        pytest.param(
            f"{MOVED}  u = Neg(r)  " + GATHERS.format(of="t") + "  y = Sum(q, k, v)",
            "no Reshape of its own makes the axis of the parts",
            id="reshape-read-twice",
        ),
        pytest.param(
            f"{MOVED}  " + GATHERS.format(of="t") + "  w = Gather(t, list)  y = Sum(q, k, v)",
            "",
            id="several-at-once",
        ),
        pytest.param(
            f"{MOVED}  e = Relu(t)  " + GATHERS.format(of="e") + "  y = Sum(q, k, v)",
            "",
            id="something-in-between",
        ),
        pytest.param(
            "r = Reshape(x, behind)  " + GATHERS.format(of="r").replace("Gather", "Gather <axis = 4> ") + "  y = Sum(q, k, v)",
            "the axis behind the parts is not of a known size",
            id="parts-last",
        ),
        pytest.param(
            "r = Reshape(x, shape)  q = Gather <axis = 2> (r, i0)  k = Gather <axis = 3> (r, i1)  v = Gather <axis = 2> (r, i2)  "
            "y = Sum(q, v)",
            "",
            id="different-axes",
        ),
    ],
)  # fmt: skip
def test_left_alone(body: str, reason: str) -> None:
    constants = {**CONSTANTS, "list": np.array([0, 1]), "behind": np.array([-1, 5, 2, 4, 3])}
    extra = "".join(f", float[d{i}, e{i}, f{i}, g{i}, h{i}] {n}" for i, n in enumerate("uw") if f"{n} = " in body)
    extra += ", float[a, b, c, d] k" if "different" in reason or "axis = 3" in body else ""
    model = parse(f"g (float[n, 5, 24] x) => (float[o, p, q1, r1] y{extra}) {{ {body} }}", **used(body, constants))
    report, _ = check_pass(SplitHeads(), model, FEEDS)
    assert report.rewrites == 0
    assert dict(report.skipped) == ({reason: 1} if reason else {})


@pytest.mark.zoo
def test_vit() -> None:
    if not ZOO.exists():
        pytest.skip(f"{ZOO} is absent")
    graph = Graph.from_proto(onnx.version_converter.convert_version(onnx.load(ZOO / "vit_mnist" / "model.onnx"), 21))
    for pass_ in (FoldConstants(), SimplifyShapes()):
        pass_.run(graph, Context())
    report, after = check_pass(SplitHeads(), graph.to_proto(), {"input": floats(3, 1, 28, 28)})
    assert report.rewrites == 4
    assert ops(after)["Split"] == 4
