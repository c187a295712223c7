from __future__ import annotations

import numpy as np
import onnx
import pytest
from passes_helpers import ops, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.passes.quantise_embeddings import QuantiseEmbeddings
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

TABLE = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
TABLE *= np.geomspace(0.01, 10, 300, dtype=np.float32)[:, None]
TABLE[7] = 0
TEXT = "g (int64[n,5] ids) => (float[n,5,64] y) { y = Gather (table, ids) }"
IDS = np.array([[0, 7, 299, -1, 41], [3, 3, 120, 200, -300]])


def expected(top: int) -> Array:
    """Round to nearest of each looked-up row by its own peak, in float64."""
    rows = TABLE[IDS].astype(np.float64)
    scale = np.abs(rows).max(axis=-1, keepdims=True).astype(np.float64) / top
    scale = np.where(scale > 0, scale, 1).astype(np.float32).astype(np.float64)
    return np.rint(rows / scale) * scale


def run(text: str, settings: Settings | None = None, **constants: Array) -> tuple[Graph, Report]:
    graph = Graph.from_proto(parse(text, **constants))
    context = Context(settings or Settings())
    report = QuantiseEmbeddings().run(graph, context)
    onnx.checker.check_model(graph.to_proto())
    assert QuantiseEmbeddings().run(graph, context).rewrites == 0
    return graph, report


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL], ids=["off", "all"])
def test_rows_are_rounded_by_their_own_scale(level: Optimisation) -> None:
    graph, report = run(TEXT, table=TABLE)
    assert report.rewrites == 1
    assert ops(graph) == {"Gather": 2, "Cast": 1, "Mul": 1}
    got = Session(graph.to_proto(), optimisation=level).run({"ids": IDS})["y"]
    np.testing.assert_allclose(got, expected(127), rtol=1e-6, atol=0)
    assert sum(c.nbytes for c in graph.constants.values()) == 300 * 64 + 300 * 4


def test_four_bits_hold_to_seven_and_beat_the_peak() -> None:
    graph, _ = run(TEXT, Settings(bits=4), table=TABLE)
    stored = next(c for c in graph.constants.values() if c.elem_type == onnx.TensorProto.INT8).array()
    assert np.abs(stored).max() == 7
    got = Session(graph.to_proto()).run({"ids": IDS})["y"]
    assert np.square(got - TABLE[IDS]).sum() < np.square(expected(7) - TABLE[IDS]).sum()


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        pytest.param(TEXT.replace("table, ids", "small, ids").replace("64", "8"), Settings(), "a small table", id="small"),
        pytest.param(
            TEXT.replace("table, ids", "thin, ids").replace("64", "4"), Settings(), "rows too short to share a scale", id="thin"
        ),
        pytest.param(
            TEXT.replace("{ y = Gather (table, ids)", "{ s = ReduceSum (table) g = Gather (table, ids) y = Add (g, s)"),
            Settings(),
            "the table is read by more than look-ups",
            id="tied to an output layer",
        ),
        pytest.param(TEXT.replace("{ y", "{ [look] y"), Settings(exclude=("look",)), "excluded by --exclude", id="excluded"),
    ],
)
def test_refusals(text: str, settings: Settings, reason: str) -> None:
    graph, report = run(text, settings, table=TABLE, small=TABLE[:, :8].copy(), thin=np.tile(TABLE[:, :4], (20, 1)))
    assert report.rewrites == 0
    assert report.skipped == {reason: 1}
    assert "Cast" not in ops(graph)
