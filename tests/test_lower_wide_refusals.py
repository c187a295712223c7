"""What lower_wide refuses late, on Q/DQ graphs: the graph stays valid, computes the same, and the reason is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from passes_helpers import parse

from qcompile.context import Context, Settings
from qcompile.graph import Graph
from qcompile.passes.lower_wide import LowerWide
from qcompile.plan import Plan
from qcompile.rewrite import Report
from qcompile.runtime import Session

READ = "f = DequantizeLinear(x, sx, zx)"
SCALES: dict[str, Any] = {"sx": np.float32(0.05), "zx": np.uint8(128), "sy": np.float32(0.05), "zy": np.uint8(128)}


def lowered(
    body: str, output: str = "uint8[n, k] y", shape: str = "2, 4", **constants: Any
) -> tuple[Report, Graph, onnx.ModelProto]:
    model = parse(f"g (uint8[{shape}] x) => ({output}) {{ {READ} {body} }}", 21, **{**SCALES, **constants})
    graph = Graph.from_proto(model)
    context = Context(Settings(format="qoperator"))
    context.plan = Plan()
    return LowerWide().run(graph, context), graph, model


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a table that is NaN": ("l = Log(f) y = QuantizeLinear(l, sy, zy)", "outside the kernel's domain", {}),
    "steps too coarse": (
        "l = Neg(f) y = QuantizeLinear(l, sy, zy)",
        "too coarse",
        {"sy": np.float32(1e-6), "sx": np.float32(50)},
    ),
    "the same after smoothing": (
        "l = Neg(f) m = Mul(l, c) y = QuantizeLinear(m, sy, zy)",
        "too coarse",
        {"sy": np.float32(1e-6), "sx": np.float32(50), "c": np.ones(4, np.float32)},
    ),
    "a function of numbers a channel that is NaN": (
        "p = Mul(f, c) s = Add(p, d) l = Log(s) y = QuantizeLinear(l, sy, zy)",
        "outside the kernel's domain",
        {"c": np.float32([1, 2, 3, 4]), "d": np.float32([1, 2, 3, 4])},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_late_refusal_leaves_the_graph_whole(case: str) -> None:
    body, reason, constants = CASES[case]
    report, graph, model = lowered(body, **constants)
    assert any(reason in text for text in report.skipped), report.skipped
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    feed = {"x": np.random.default_rng(0).integers(0, 256, (2, 4), np.uint8)}
    np.testing.assert_array_equal(Session(result).run(feed)["y"], Session(model).run(feed)["y"])


def test_factors_a_channel_at_the_models_end_become_integers() -> None:
    _, graph, model = lowered("l = Neg(f) y = Mul(l, c)", "float[n, k] y", c=np.float32([1, 2, 4, 0.5]))
    assert [n.op for n in graph.nodes][-1] == "DequantizeLinear"
    feed = {"x": np.random.default_rng(0).integers(0, 256, (2, 4), np.uint8)}
    np.testing.assert_allclose(Session(graph.to_proto()).run(feed)["y"], Session(model).run(feed)["y"], rtol=1e-4, atol=1e-4)


def test_a_mean_of_nothing_is_refused() -> None:
    report, _, _ = lowered("l = Neg(f) y = ReduceMean<keepdims = 1>(l, axes)", "float[n, k] y", "2, 0", axes=np.array([1]))
    assert any("over no values" in text for text in report.skipped), report.skipped
