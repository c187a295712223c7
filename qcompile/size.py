"""Size of a model on disk, with the files that hold its external data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qcompile.errors import ModelError


def size_bytes(path: str | Path) -> int:
    """Bytes of the ONNX file at `path` plus each external data file it refers to, counted once.

    Whole files are counted, because whole files are shipped. No tensor data are read. Raises ModelError where the model or
    one of its data files is missing or is not ONNX.
    """
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
        total = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise ModelError(f"{path}: is not an ONNX model") from error
    files: dict[Path, str] = {}
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            files.setdefault((path.parent / location).resolve(), tensor.name)
    for file, name in files.items():
        if not file.is_file():
            raise ModelError(f"{path}: external data file {file} of tensor '{name}' is missing; put it beside the model")
        total += file.stat().st_size
    return total


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)
