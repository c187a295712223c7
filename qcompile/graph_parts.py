"""What the graph layer needs to know about protos alone: shapes, sparse constants, subgraph bodies and the order of nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, GraphProto, SparseTensorProto, TypeProto, numpy_helper

from qcompile.errors import ModelError

Array = npt.NDArray[Any]
Shape = tuple["int | str | None", ...]


def domain_aliases(domain: str) -> tuple[str, ...]:
    """All spellings of an operator domain: the default one is written '' or 'ai.onnx'."""
    return ("", "ai.onnx") if domain in ("", "ai.onnx") else (domain,)


def dims_of(type: TypeProto | None) -> Shape | None:
    """The shape in a tensor type: ints where static, names or None where not; None where even the rank is unknown."""
    if type is None or not type.HasField("tensor_type") or not type.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in type.tensor_type.shape.dim)


def dense_array(sparse: SparseTensorProto) -> Array:
    """A sparse constant written out, zeros included."""
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    dense = np.zeros(int(np.prod(sparse.dims, dtype=np.int64)), values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))
    dense[flat] = values
    return dense.reshape(tuple(sparse.dims))


def node_bodies(attributes: Sequence[AttributeProto]) -> Iterator[GraphProto]:
    """The subgraphs that a node's attributes hold, in order."""
    for attribute in attributes:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def body_captures(body: GraphProto) -> set[str]:
    """Names that a subgraph reads from the graphs around it."""
    own = _declared(body)
    reads: set[str] = set()
    for node in body.node:
        reads |= {name for name in node.input if name} - own
        for inner in node_bodies(node.attribute):
            reads |= body_captures(inner) - own
        own |= set(node.output)
    return reads | ({o.name for o in body.output} - own)


def body_names(body: GraphProto) -> set[str]:
    """Every name that a subgraph, or one inside it, gives to a tensor or node."""
    names = _declared(body)
    for node in body.node:
        names.update(node.output)
        names.add(node.name)
        for inner in node_bodies(node.attribute):
            names |= body_names(inner)
    return names


def rename_captures(body: GraphProto, names: Mapping[str, str]) -> None:
    """Let a subgraph read outer tensors under new names {old: new}; names it declares itself are left alone."""
    own = _declared(body)
    for node in body.node:
        live = {old: new for old, new in names.items() if old not in own}
        node.input[:] = [live.get(name, name) for name in node.input]
        for inner in node_bodies(node.attribute):
            rename_captures(inner, live)
        own |= set(node.output)
    for output in body.output:
        if output.name not in own:
            output.name = names.get(output.name, output.name)


def _declared(body: GraphProto) -> set[str]:
    names = {i.name for i in body.input} | {i.name for i in body.initializer}
    return names | {s.values.name for s in body.sparse_initializer}


class _Link(Protocol):
    @property
    def producer(self) -> Any: ...


class _Node(Protocol):
    inputs: Any
    captured: Any

    @property
    def label(self) -> str: ...


_AnyNode = TypeVar("_AnyNode", bound=_Node)


def topological(nodes: Sequence[_AnyNode]) -> list[_AnyNode]:
    """Nodes after all that they read; stable: among ready ones the earlier in `nodes` comes first. ModelError on a cycle."""
    index = {n: i for i, n in enumerate(nodes)}
    waiting: dict[_AnyNode, int] = {}
    follow: dict[_AnyNode, list[_AnyNode]] = {}
    for node in nodes:
        links: list[_Link] = [*node.inputs, *node.captured]
        before = {t.producer for t in links if t.producer is not None}
        waiting[node] = len(before)
        for producer in before:
            follow.setdefault(producer, []).append(node)
    ready = [index[n] for n in nodes if waiting[n] == 0]
    heapify(ready)
    order: list[_AnyNode] = []
    while ready:
        node = nodes[heappop(ready)]
        order.append(node)
        for after in follow.get(node, ()):
            waiting[after] -= 1
            if waiting[after] == 0:
                heappush(ready, index[after])
    if len(order) != len(nodes):
        stuck = next(n for n in nodes if waiting[n] > 0)
        raise ModelError(f"node '{stuck.label}' is part of a cycle; the model is not a valid ONNX graph")
    return order
