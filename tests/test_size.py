"""Size on disk with external data, wherever a tensor may stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.size import size_bytes


def weight(name: str, elements: int, location: str | None = None) -> TensorProto:
    """A float tensor, referring to the file `location` where one is given."""
    if location is None:
        return numpy_helper.from_array(np.ones(elements, np.float32), name)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[elements])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def save(path: Path, initializers: list[TensorProto], nodes: list[onnx.NodeProto] | None = None) -> None:
    graph = helper.make_graph(nodes or [], "g", [], [], initializers)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def test_a_single_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(path, [weight("w", 100)])
    assert size_bytes(path) == size_bytes(str(path)) == path.stat().st_size > 400


def test_external_files_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(70))
    (tmp_path / "unrelated.bin").write_bytes(bytes(5))
    save(path, [weight("v", 4, "a.bin"), weight("w", 4, "./a.bin"), weight("u", 4, "sub/b.bin")])
    assert size_bytes(path) == path.stat().st_size + 1070


def in_constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def in_subgraph(tensor: TensorProto) -> onnx.NodeProto:
    branch = helper.make_graph([in_constant(tensor)], "then", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=branch)


def in_subgraph_list(tensor: TensorProto) -> onnx.NodeProto:
    node = helper.make_node("Custom", [], ["y"], domain="test")
    node.attribute.append(helper.make_attribute("graphs", [helper.make_graph([], "g", [], [], [tensor])]))
    node.attribute.append(helper.make_attribute("tensors", [weight("t", 1)]))
    return node


@pytest.mark.parametrize("place", [in_constant, in_subgraph, in_subgraph_list], ids=lambda f: f.__name__)
def test_external_data_below_the_graph(tmp_path: Path, place: object) -> None:
    assert callable(place)
    path = tmp_path / "m.onnx"
    (tmp_path / "a.bin").write_bytes(bytes(64))
    save(path, [], [place(weight("w", 16, "a.bin"))])
    assert size_bytes(path) == path.stat().st_size + 64


def test_external_data_of_sparse_tensors_and_functions(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for name in ("values.bin", "indices.bin", "function.bin"):
        (tmp_path / name).write_bytes(bytes(8))
    graph = helper.make_graph([], "g", [], [])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(weight("s", 2, "values.bin"))
    sparse.indices.CopyFrom(weight("i", 2, "indices.bin"))
    constant = in_constant(weight("w", 2, "function.bin"))
    function = helper.make_function("test", "F", [], ["c"], [constant], [helper.make_opsetid("", 17)])
    path.write_bytes(helper.make_model(graph, functions=[function]).SerializeToString())
    assert size_bytes(path) == path.stat().st_size + 24


def test_a_missing_data_file_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(path, [weight("w", 4, "gone.bin")])
    with pytest.raises(ModelError, match=r"m\.onnx.*gone\.bin.*'w'"):
        size_bytes(path)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.onnx: cannot be read"):
        size_bytes(tmp_path / "no.onnx")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(b"this is not protobuf")
    with pytest.raises(ModelError, match=r"text\.onnx: is not an ONNX model"):
        size_bytes(path)
