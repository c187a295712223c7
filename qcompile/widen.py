"""float16 and bfloat16 models made float32 inside: weights, constants, casts and types; the ends keep names and types.

Works on the proto, before linking, so that bodies of If, Loop and Scan are treated like the graph itself. Values are only
widened, never rounded: every half-precision number is a float32 number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

from qcompile.graph_parts import body_names, node_bodies, rename_captures
from qcompile.tensors import read_tensor

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")


def widen(model: ModelProto, directory: Path) -> int:
    """Make `model` compute in float32, in place; returns how many half-precision tensors were found (0: left alone).

    External float16 weights are read from `directory` and kept in memory as float32.
    """
    count = _count(model.graph)
    if count == 0:
        return 0
    ends = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    halves = {name: code for name, code in ends.items() if code in HALVES}
    _widen_graph(model.graph, directory)
    _keep_ends(model.graph, halves)
    return count


def _count(graph: GraphProto) -> int:
    count = sum(t.data_type in HALVES for t in graph.initializer)
    count += sum(t.values.data_type in HALVES for t in graph.sparse_initializer)
    count += sum(_has_half(i.type) for i in [*graph.input, *graph.output, *graph.value_info])
    for node in graph.node:
        for attribute in node.attribute:
            count += attribute.type == AttributeProto.TENSOR and attribute.t.data_type in HALVES
            count += attribute.type == AttributeProto.SPARSE_TENSOR and attribute.sparse_tensor.values.data_type in HALVES
            count += attribute.name in _TYPE_ATTRIBUTES and attribute.i in HALVES
        count += sum(_count(body) for body in node_bodies(node.attribute))
    return count


def _has_half(type: TypeProto) -> bool:
    probe = TypeProto()
    probe.CopyFrom(type)
    return _widen_type(probe)


def _widen_type(type: TypeProto) -> bool:
    kind = type.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(type, kind)
        if tensor.elem_type in HALVES:
            tensor.elem_type = TensorProto.FLOAT
            return True
    elif kind in ("sequence_type", "optional_type"):
        return _widen_type(getattr(type, kind).elem_type)
    elif kind == "map_type":
        return _widen_type(type.map_type.value_type)
    return False


def _widen_graph(graph: GraphProto, directory: Path) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor, directory)
    for sparse in graph.sparse_initializer:
        _widen_sparse(sparse, directory)
    for info in [*graph.input, *graph.output, *graph.value_info]:
        _widen_type(info.type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t, directory)
            elif attribute.type == AttributeProto.SPARSE_TENSOR:
                _widen_sparse(attribute.sparse_tensor, directory)
            elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
        for body in node_bodies(node.attribute):
            _widen_graph(body, directory)


def _widen_tensor(tensor: TensorProto, directory: Path) -> None:
    if tensor.data_type in HALVES:
        values = np.asarray(read_tensor(tensor, directory), np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _widen_sparse(sparse: SparseTensorProto, directory: Path) -> None:
    _widen_tensor(sparse.values, directory)


def _keep_ends(graph: GraphProto, halves: dict[str, int]) -> None:
    """A Cast at each half-precision end: inputs stay as they are called and typed, so do outputs."""
    names = body_names(graph) | {""}

    def fresh(base: str) -> str:
        name, count = base, 0
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.add(name)
        return name

    fixed = {t.name for t in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
    inside: dict[str, str] = {}
    head: list[NodeProto] = []
    for value in graph.input:
        if value.name in halves and value.name not in fixed:
            value.type.tensor_type.elem_type = halves[value.name]
            inside[value.name] = fresh(f"{value.name}_float")
            cast = helper.make_node(
                "Cast", [value.name], [inside[value.name]], fresh(f"{value.name}_widen"), to=TensorProto.FLOAT
            )
            head.append(cast)
    inputs = set(inside)
    tail: list[NodeProto] = []
    produced: dict[str, str] = {}
    for value in graph.output:
        if value.name not in halves:
            continue
        value.type.tensor_type.elem_type = halves[value.name]
        if value.name in inputs:
            continue  # an input handed through
        produced[value.name] = fresh(f"{value.name}_float")
        cast = helper.make_node(
            "Cast", [produced[value.name]], [value.name], fresh(f"{value.name}_narrow"), to=halves[value.name]
        )
        tail.append(cast)
    renamed = {**inside, **produced}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [produced.get(name, name) for name in node.output]
        for body in node_bodies(node.attribute):
            rename_captures(body, renamed)
    for tensor in graph.initializer:
        tensor.name = produced.get(tensor.name, tensor.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = produced.get(sparse.values.name, sparse.values.name)
    kept = [_copy(n) for n in graph.node]
    del graph.node[:]
    graph.node.extend([*head, *kept, *tail])


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy
