"""The graph layer: constants of every type, bodies, editing, saving, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_models import CHAIN, LOOKING_OUT, X, by_op, graph_of, run
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from qcompile import graph_io
from qcompile.errors import ModelError, PassError
from qcompile.graph import Const, Graph
from qcompile.runtime import Optimisation, Session


def constant_model(tensor: TensorProto) -> ModelProto:
    info = helper.make_tensor_value_info("y", tensor.data_type, list(tensor.dims))
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [info], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


NARROW = ["INT4", "UINT4", "BFLOAT16", "FLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"]


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_narrow_constants_keep_their_bits(kind: str, raw: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = getattr(TensorProto, kind)
    values = np.array([1, 2, 3, 0, 1, 2, 7], helper.tensor_dtype_to_np_dtype(code))
    tensor = numpy_helper.from_array(values, "w")
    if not raw:
        tensor = helper.make_tensor("w", code, [7], values.astype(np.float32))
    graph = Graph.from_proto(constant_model(tensor))
    assert graph.to_proto().graph.initializer[0] == tensor
    assert graph.constants["w"].array().astype(np.float32).tolist() == [1, 2, 3, 0, 1, 2, 7]
    assert graph.constants["w"].nbytes == (4 if "INT4" in kind else len(values.tobytes()))
    monkeypatch.setattr(graph_io, "_PROTO_LIMIT", 1)
    monkeypatch.setattr(graph_io, "_INLINE_LIMIT", 0)
    graph.save(tmp_path / "m.onnx")
    again = Graph.load(tmp_path / "m.onnx").constants["w"]
    assert again.proto.data_location == TensorProto.EXTERNAL
    assert again.array().tobytes() == values.tobytes()


@pytest.mark.parametrize("linear", [True, False], ids=["flat_indices", "coordinates"])
def test_sparse_initializer_survives_and_reads_dense(linear: bool) -> None:
    indices = np.array([1, 5], np.int64) if linear else np.array([[0, 1], [1, 2]], np.int64)
    values = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices), [2, 3])
    out = helper.make_tensor_value_info("y", 1, [2, 3])
    proto = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [out], sparse_initializer=[sparse])
    graph = Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert graph.to_proto().graph.sparse_initializer[0] == sparse
    assert graph.constants["w"].array().tolist() == [[0, 2, 0], [0, 0, 3]]
    assert graph.copy().constants["w"].dims == (2, 3)


def external_model(folder: Path) -> tuple[Path, np.ndarray]:
    weight = np.arange(600, dtype=np.float32)
    model = constant_model(numpy_helper.from_array(weight, "w"))
    folder.mkdir()
    onnx.save(model, str(folder / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx", weight


def test_external_data_of_another_folder_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, weight = external_model(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    graph = Graph.load(path)
    hidden = path.with_name("hidden")
    path.with_name("w.bin").rename(hidden)
    assert graph.copy().constants["w"].nbytes == 2400  # known without the file
    with pytest.raises(ModelError, match=r"'w'.*w\.bin is missing"):
        graph.constants["w"].array()
    hidden.rename(path.with_name("w.bin"))
    assert np.array_equal(graph.copy().constants["w"].array(), weight)
    assert graph.to_proto().graph.initializer[0].data_location == TensorProto.EXTERNAL
    assert run_bytes(graph.to_proto(embed=True)).tolist() == weight.tolist()
    graph.save(tmp_path / "out.onnx")
    assert np.array_equal(Graph.load(tmp_path / "out.onnx").constants["w"].array(), weight)
    assert not (tmp_path / "out.onnx.data").exists()


def run_bytes(model: ModelProto) -> np.ndarray:
    return np.asarray(Session(model, optimisation=Optimisation.OFF).run({})["y"])


def test_copy_keeps_the_folder_of_each_constant(tmp_path: Path) -> None:
    path, weight = external_model(tmp_path / "source")
    graph = Graph.load(path)
    graph.constants = {"new": graph.constant("new", np.ones(1, np.float32)), **graph.constants}
    assert np.array_equal(graph.copy().constants["w"].array(), weight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../w.bin", "outside the model's folder"),
        ("length", "99999", "too short"),
        ("offset", "-4", "too short"),
        ("offset", "x", "no number"),
    ],
)
def test_broken_external_data_name_the_tensor(tmp_path: Path, key: str, value: str, message: str) -> None:
    path, _ = external_model(tmp_path / "source")
    graph = Graph.load(path)
    proto = graph.constants["w"].proto
    kept = [e for e in proto.external_data if e.key != key]
    del proto.external_data[:]
    proto.external_data.extend(kept)
    proto.external_data.add(key=key, value=value)
    with pytest.raises(ModelError, match=rf"'w'.*{message}"):
        graph.constants["w"].array()


def test_broken_raw_data_name_the_tensor() -> None:
    graph = graph_of(CHAIN)
    graph.constants["w"].proto.CopyFrom(TensorProto(name="w", data_type=1, dims=[2], raw_data=b"abc"))
    with pytest.raises(ModelError, match="initializer 'w' cannot be read"):
        graph.constants["w"].array()


# ---- bodies ----


def test_bodies_pin_what_they_read_and_cleanup_keeps_it() -> None:
    graph = graph_of(LOOKING_OUT)
    branch = by_op(graph, "If")
    assert {t.name for t in branch.captured} == {"b", "w"}
    assert all(graph.is_pinned(t) for t in branch.captured)
    assert graph.cleanup() == 0
    assert "w" in graph.constants
    assert run(graph, flag=True, x=X)[0].tolist() == [3, 6]


def test_bypass_of_a_captured_tensor_keeps_its_name() -> None:
    graph = graph_of(LOOKING_OUT)
    identity = by_op(graph, "Identity")
    graph.bypass(identity, identity.inputs[0])
    assert [n.op for n in graph.nodes] == ["Relu", "If"]
    assert run(graph, flag=False, x=X)[0].tolist() == [0, -2]


def test_renamed_capture_is_renamed_in_the_bodies() -> None:
    graph = graph_of(LOOKING_OUT)
    by_op(graph, "Identity").outputs[0].name = "renamed"
    graph.constants["w"].name = "weight"
    written = graph.to_proto()
    assert run(graph, flag=True, x=X)[0].tolist() == [3, 6]
    assert written.graph.initializer[0].name == "weight"
    assert run(graph.copy(), flag=False, x=X)[0].tolist() == [0, -2]


def test_loop_and_scan_bodies_read_outer_tensors() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, int64 n) => (float[2] y, float[2,2] z) <float[2] w = {1, 1}, bool t = {1}, float[2,2] m = {1,2,3,4}> {
      a = Relu(x)
      y = Loop (n, t, w) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] r) { d = Identity(c)  r = Add(s, a) }>
      z = Scan <num_scan_inputs = 1, body = k (float[2] row) => (float[2] o) { o = Mul(row, a) }> (m)
    }
    """
    graph = graph_of(text)
    assert graph.cleanup() == 0
    assert [t.name for t in by_op(graph, "Scan").captured] == ["a"]
    y, z = run(graph, x=X, n=np.int64(3))
    assert y.tolist() == [1, 7]
    assert z.tolist() == [[0, 4], [0, 8]]


def test_names_inside_bodies_are_taken() -> None:
    graph = graph_of(LOOKING_OUT)
    assert graph.fresh_name("p") == "p_1"
    assert graph.fresh_name("p") == "p_2"
    assert graph.fresh_name("") == "_1"


def test_local_functions_are_inlined() -> None:
    model = parse_model("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.twice(x) }
    <domain: "local", opset_import: ["" : 17]>
    twice (a) => (b) { b = Add(a, a) }
    """)
    graph = Graph.from_proto(model)
    assert [n.op for n in graph.nodes] == ["Add"]
    assert run(graph, x=X)[0].tolist() == [-2, 4]


# ---- what protos hold ----


def test_documentation_metadata_and_empty_attributes_survive() -> None:
    model = parse_model(CHAIN)
    model.doc_string, model.producer_name = "model text", "maker"
    model.metadata_props.add(key="k", value="v")
    model.graph.doc_string = "graph text"
    model.graph.node[0].doc_string = "node text"
    model.graph.node[0].metadata_props.add(key="a", value="b")
    empty = helper.make_attribute("axes", [], attr_type=onnx.AttributeProto.INTS)
    model.graph.node[0].attribute.append(empty)
    model.graph.input[0].doc_string = "input text"
    model.graph.value_info.add(name="b").doc_string = "no type, only words"
    graph = Graph.from_proto(model)
    assert by_op(graph, "Relu").attr("axes") == []
    assert graph.to_proto() == model
    assert graph.copy().to_proto() == model


def test_value_info_of_sequence_and_optional_types_survives() -> None:
    model = parse_model(CHAIN)
    tensor = helper.make_tensor_type_proto(1, [2])
    infos = [helper.make_value_info("a", helper.make_sequence_type_proto(tensor))]
    infos.append(helper.make_value_info("b", helper.make_optional_type_proto(tensor)))
    model.graph.value_info.extend(infos)
    assert list(Graph.from_proto(model).to_proto().graph.value_info) == infos


def test_inputs_that_ir_3_lists_for_initializers_become_constants() -> None:
    model = parse_model(CHAIN)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [2]))
    graph = Graph.from_proto(model)
    assert [i.name for i in graph.inputs] == ["x"]
    assert graph.to_proto().ir_version == 4
    assert run(graph, x=X)[0].tolist() == [1, 4]


# ---- refusals ----


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a = Relu(x) a = Neg(x) y = Add(a, a)", "'a' is written twice"),
        ("w = Relu(x) y = Add(w, w)", "'w' is written twice"),
        ("x = Relu(w) y = Add(x, w)", "'x' is written twice"),
        ("a = Add(x, b) b = Relu(a) y = Neg(b)", "cycle"),
        ("y = Add(x, nowhere)", "'nowhere' is read"),
    ],
    ids=["node_twice", "over_constant", "over_input", "cycle", "dangling"],
)
def test_invalid_graphs_are_refused(body: str, message: str) -> None:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) <float[2] w = {{1, 2}}> {{ {body} }}'
    with pytest.raises(ModelError, match=message):
        graph_of(text).to_proto()


def test_constants_declared_twice_are_refused() -> None:
    model = parse_model(CHAIN)
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(ModelError, match="'w' is declared twice"):
        Graph.from_proto(model)


def test_faults_of_passes_are_named() -> None:
    graph = graph_of(CHAIN)
    by_op(graph, "Relu").outputs[0].name = "b"
    with pytest.raises(PassError, match="two tensors are named 'b'"):
        graph.to_proto()
    graph = graph_of(CHAIN)
    by_op(graph, "Add").inputs[1] = Const("loose", numpy_helper.from_array(X, "loose"))
    with pytest.raises(PassError, match="reads tensor 'loose'"):
        graph.to_proto()
    graph = graph_of(CHAIN)
    graph.remove(by_op(graph, "Add"))
    with pytest.raises(PassError, match="graph output 'y'"):
        graph.to_proto()
