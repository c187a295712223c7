"""Sessions of graphs: in memory where protobuf allows it, through a temporary file beyond 2 GiB."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, SparseTensorProto, helper

from qcompile.graph import Const, Graph, Node, Value
from qcompile.graph_io import node_proto, write_model
from qcompile.runtime import Optimisation, Session
from qcompile.tensors import is_external, with_data

_LIMIT = 2**31 - 2**24


def graph_session(
    graph: Graph, *, optimisation: Optimisation = Optimisation.ALL, threads: int = 0, label: str = "model", fuse_qdq: bool = True
) -> Session:
    """A session that runs `graph` as it stands. Constants over 2 GiB go through a temporary folder, removed at once."""
    if sum(c.nbytes for c in graph.constants.values()) < _LIMIT:
        return Session(write_model(graph, embed=True), optimisation=optimisation, threads=threads, label=label, fuse_qdq=fuse_qdq)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "model.onnx"
        graph.save(path)
        return Session(path, optimisation=optimisation, threads=threads, label=label, fuse_qdq=fuse_qdq)


def segment_session(
    graph: Graph | None,
    nodes: Sequence[Node],
    inputs: Sequence[tuple[Value, np.dtype[Any]]],
    outputs: Sequence[Value],
    *,
    threads: int = 0,
) -> Session:
    """A session of `segment_model`."""
    return Session(segment_model(graph, nodes, inputs, outputs), threads=threads, label=f"segment ending at '{nodes[-1].label}'")


def segment_model(
    graph: Graph | None, nodes: Sequence[Node], inputs: Sequence[tuple[Value, np.dtype[Any]]], outputs: Sequence[Value]
) -> ModelProto:
    """A few linked `nodes` alone: `inputs` with their types come from outside, constants are taken along."""
    model = ModelProto()
    if graph is None:
        model.ir_version = 10
        model.opset_import.append(helper.make_opsetid("", 21))
    else:
        model.ir_version = graph.shell.ir_version
        model.opset_import.extend(graph.shell.opset_import)
    model.graph.name = "segment"
    model.graph.node.extend(node_proto(n) for n in nodes)
    for value, dtype in inputs:
        model.graph.input.append(helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(dtype), None))
    for value in outputs:
        model.graph.output.add(name=value.name)
    constants = dict.fromkeys(t for n in nodes for t in [*n.inputs, *n.captured] if isinstance(t, Const))
    for const in constants:
        if isinstance(const.proto, SparseTensorProto):
            model.graph.sparse_initializer.append(const.proto)
        else:
            model.graph.initializer.append(with_data(const.proto, const.directory) if is_external(const.proto) else const.proto)
            model.graph.initializer[-1].name = const.name
    return model
