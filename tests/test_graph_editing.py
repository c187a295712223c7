"""The graph layer: editing and saving."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_models import CHAIN, LOOKING_OUT, X, by_op, graph_of, run
from onnx import ModelProto

from qcompile import graph_io
from qcompile.errors import InputError, ModelError
from qcompile.graph import Graph, Value
from qcompile.runtime import Session

# ---- editing ----


def test_bypass_in_the_middle_and_before_an_output() -> None:
    graph = graph_of(CHAIN)
    identity = by_op(graph, "Identity")
    graph.bypass(identity, identity.inputs[0])
    assert [n.op for n in graph.nodes] == ["Relu", "Add"]
    add = by_op(graph, "Add")
    graph.bypass(add, add.inputs[0])
    assert [n.op for n in graph.nodes] == ["Relu"]
    assert graph.outputs[0].name == "y"
    assert graph.cleanup() == 0
    assert graph.constants == {}
    assert run(graph, x=X)[0].tolist() == [0, 2]


@pytest.mark.parametrize("source", ["x", "w", "other"], ids=["graph_input", "constant", "other_output"])
def test_bypass_keeps_an_output_whose_source_cannot_be_renamed(source: str) -> None:
    graph = graph_of(f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y, float[2] other) <float[2] w = {{1, 2}}> {{
      other = Neg(x)
      y = Relu({source})
    }}
    """)
    relu = by_op(graph, "Relu")
    graph.bypass(relu, relu.inputs[0])
    expected = {"x": X, "w": np.array([1, 2]), "other": -X}[source]
    assert sorted(n.op for n in graph.nodes) == ["Identity", "Neg"]
    assert run(graph, x=X)[0].tolist() == expected.tolist()
    identity = by_op(graph, "Identity")
    before = graph.to_proto()
    graph.bypass(identity, identity.inputs[0])  # nothing left to gain
    assert graph.to_proto() == before


def test_replace_uses_leaves_outputs_and_honours_the_filter() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] a, float[2] y, float[2] z) { a = Relu(x) y = Add(a, a) z = Neg(a) }
    """)
    a, x = by_op(graph, "Relu").outputs[0], graph.inputs[0]
    assert graph.replace_uses(a, x, only=lambda n: n.op == "Add") == 2
    assert graph.outputs[0] is a
    values = run(graph, x=X)
    assert [v.tolist() for v in values] == [[0, 2], [-2, 4], [0, -2]]


def test_outputs_that_are_inputs_or_constants() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] x, float[2] w) <float[2] w = {1, 2}, float[2] v = {1, 2}> { a = Relu(x) }
    """)
    assert graph.cleanup() == 1
    assert list(graph.constants) == ["w"]
    assert [v.tolist() for v in run(graph, x=X)] == [[-1, 2], [1, 2]]


def test_same_named_tensors_are_not_the_same() -> None:
    left, right = Value("t"), Value("t")
    assert left != right
    assert len({left, right}) == 2


def test_new_nodes_take_fresh_names_and_missing_inputs() -> None:
    graph = graph_of(CHAIN)
    low = graph.constant("w", np.float32(0))
    assert low.name == "w_1"
    assert low.dims == ()
    node = graph.node("Clip", [graph.inputs[0], None, low], ["a"], domain="")
    assert node.outputs[0].name == "a_1"
    assert node.input(1) is None
    assert node.constant(2) is low
    graph.node("Gelu", [node.outputs[0]], ["c"], domain="com.microsoft")
    assert graph.opset("com.microsoft") == 1
    assert graph.opset("ai.onnx") == 17
    assert graph.cleanup() == 2


def test_sort_is_stable_and_output_bytes_do_not_depend_on_history() -> None:
    graph = graph_of(CHAIN)
    expected = graph.to_proto().SerializeToString(deterministic=True)
    graph.nodes.reverse()
    assert graph.to_proto().SerializeToString(deterministic=True) == expected


def test_shapes_are_inferred_with_large_constants_by_shape_only() -> None:
    graph = graph_of(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 64] x) => (float[M, K] y) { a = Relu(x) y = MatMul(a, a) }'
    )
    weight = graph.constant("weight", np.zeros((64, 32), np.float32))
    by_op(graph, "MatMul").inputs[1] = weight
    graph.infer_shapes()
    assert by_op(graph, "Relu").outputs[0].dims == ("N", 64)


def test_shape_inference_that_fails_is_an_error_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> ModelProto:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    with pytest.raises(ModelError, match="shape inference failed: no"):
        graph_of(CHAIN).infer_shapes()


# ---- saving ----


def test_streaming_save_reads_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }')
    weights = [np.full(70_001 + i, i, np.float32) for i in range(5)]
    tail: Value = graph.nodes[0].outputs[0]
    for i, weight in enumerate(weights):
        tail = graph.node("Concat", [tail, graph.constant(f"w{i}", weight)], [f"c{i}"], axis=0).outputs[0]
    tail.type = graph.outputs[0].type
    graph.outputs = [tail]
    graph.save(tmp_path / "whole.onnx")
    monkeypatch.setattr(graph_io, "_PROTO_LIMIT", 100_000)
    graph.save(tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "whole.onnx"]
    assert (tmp_path / "m.onnx").stat().st_size < 10_000
    offsets = [
        int(e.value)
        for c in Graph.load(tmp_path / "m.onnx").constants.values()
        for e in c.proto.external_data
        if e.key == "offset"
    ]
    assert [o % 4096 for o in offsets] == [0] * 5
    feeds = {"x": X}
    left, right = (Session(tmp_path / n).run(feeds) for n in ("m.onnx", "whole.onnx"))
    assert all(np.array_equal(left[k], right[k]) for k in left)
    again = Graph.load(tmp_path / "m.onnx")
    again.save(tmp_path / "n.onnx")  # from external data to external data
    assert (tmp_path / "n.onnx.data").read_bytes() == (tmp_path / "m.onnx.data").read_bytes()
    with pytest.raises(InputError, match="holds weights of the model being read"):
        again.save(tmp_path / "m.onnx")
    mode = (tmp_path / "m.onnx.data").stat().st_mode & 0o777
    assert mode == (tmp_path / "m.onnx").stat().st_mode & 0o777


def test_save_writes_the_same_bytes_twice_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        graph_of(LOOKING_OUT).save(tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl_c", "disk_full"])
@pytest.mark.parametrize("limit", [2**31, 1], ids=["one_file", "streaming"])
def test_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | OSError, limit: int
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(graph_io, "_PROTO_LIMIT", limit)
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InputError):
        graph_of(CHAIN).save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_places_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder does not exist"):
        graph_of(CHAIN).save(tmp_path / "no" / "m.onnx")
    with pytest.raises(InputError, match="a folder"):
        graph_of(CHAIN).save(tmp_path)
    with pytest.raises(ModelError, match="a folder"):
        Graph.load(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        Graph.load(tmp_path / "m.onnx")
