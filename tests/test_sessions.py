"""Sessions of graphs and of segments: in memory, through a file, with constants of every kind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from core_models import floats, model

import qcompile.sessions as sessions
from qcompile.errors import ModelError
from qcompile.graph import Graph
from qcompile.runtime import Optimisation, Session
from qcompile.sessions import graph_session, segment_session

TEXT = "g (float[2, 4] x) => (float[2, 3] y) { h = MatMul(x, w)  r = Relu(h)  y = Mul(r, k) }"


def linked() -> Graph:
    return Graph.from_proto(model(TEXT, w=floats(4, 3), k=np.float32(2)))


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL])
def test_a_session_runs_the_graph_as_it_stands(level: Optimisation) -> None:
    graph = linked()
    graph.constants["k"].assign(np.asarray(3, np.float32))
    x = floats(2, 4)
    got = graph_session(graph, optimisation=level).run({"x": x})["y"]
    np.testing.assert_allclose(got, 3 * np.maximum(x @ floats(4, 3), 0), rtol=1e-6)


def test_beyond_the_limit_a_file_is_used_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_LIMIT", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = floats(2, 4)
    got = graph_session(linked()).run({"x": x})["y"]
    np.testing.assert_array_equal(got, Session(model(TEXT, w=floats(4, 3), k=np.float32(2))).run({"x": x})["y"])
    assert list(tmp_path.iterdir()) == []


def test_a_segment_takes_its_constants_along() -> None:
    graph = linked()
    matmul, relu, mul = graph.nodes
    float32 = np.dtype(np.float32)
    session = segment_session(graph, [relu, mul], [(matmul.outputs[0], float32)], [mul.outputs[0], relu.outputs[0]])
    h = floats(2, 3)
    got = session.run({"h": h})
    np.testing.assert_array_equal(got["r"], np.maximum(h, 0))
    np.testing.assert_array_equal(got["y"], 2 * np.maximum(h, 0))


def test_a_segment_leaves_the_graph_alone() -> None:
    graph = linked()
    before = graph.to_proto().SerializeToString(deterministic=True)
    segment_session(graph, graph.nodes[:1], [(graph.inputs[0], np.dtype(np.float32))], [graph.nodes[0].outputs[0]])
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_constants_in_another_file(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "m.onnx"
    onnx.save_model(
        model(TEXT, w=floats(4, 3), k=np.float32(2)), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    graph = Graph.load(path)
    x = floats(2, 4)
    expected = np.maximum(x @ floats(4, 3), 0)
    np.testing.assert_allclose(graph_session(graph).run({"x": x})["y"], 2 * expected, rtol=1e-6)
    session = segment_session(graph, graph.nodes[:2], [(graph.inputs[0], np.dtype(np.float32))], [graph.nodes[1].outputs[0]])
    np.testing.assert_allclose(session.run({"x": x})["r"], expected, rtol=1e-6)


def test_a_segment_that_cannot_run_names_its_end() -> None:
    graph = linked()
    graph.nodes[1].op = "NoSuchOperator"
    with pytest.raises(ModelError, match="segment ending at 'relu_1'"):
        segment_session(graph, [graph.nodes[1]], [(graph.nodes[0].outputs[0], np.dtype(np.float32))], [graph.nodes[1].outputs[0]])
