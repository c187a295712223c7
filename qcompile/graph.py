"""The graph that passes work on: onnx-graphsurgeon's nodes and tensors, with everything carried through that it loses.

graphsurgeon supplies the linked structure (a node's inputs know their consumers, its outputs their producer). This file adds:
identity instead of comparison by name; attributes, types and constants kept as the protos they came from (INT4, FP8, sparse,
empty lists, optional and sequence types, metadata survive); external data read one tensor at a time; bodies of If, Loop and
Scan kept whole, with the outer tensors that they read pinned. No other file imports onnx_graphsurgeon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

from qcompile.graph_parts import Shape, body_captures, dense_array, dims_of, domain_aliases, topological
from qcompile.tensors import byte_size, read_tensor

Array = npt.NDArray[Any]
__all__ = ["Array", "Const", "Graph", "Node", "Shape", "Tensor", "Value", "body_captures"]
_EMBED_LIMIT = 1024  # constants up to this many bytes take part in shape inference by value


class Value(gs.Variable):  # type: ignore[misc]
    """A tensor computed at run time, a graph input, or (with the empty name) a missing optional input."""

    inputs: list[Node]
    outputs: list[Node]
    name: str

    def __init__(self, name: str, type: TypeProto | None = None) -> None:
        super().__init__(name)
        self.type = type
        self.info: onnx.ValueInfoProto | None = None

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def producer(self) -> Node | None:
        """The node that computes it, if any."""
        return self.inputs[0] if self.inputs else None

    @property
    def consumers(self) -> list[Node]:
        """Nodes that read it, once each, in the order they were linked."""
        return list(dict.fromkeys(self.outputs))

    @property
    def dims(self) -> Shape | None:
        """Its shape, ints where static, names or None where not; None where even the rank is unknown."""
        return dims_of(self.type)

    @property
    def elem_type(self) -> int:
        """TensorProto.DataType, UNDEFINED (0) where unknown."""
        return self.type.tensor_type.elem_type if self.type is not None else 0


class Const(gs.Constant):  # type: ignore[misc]
    """A constant tensor, held as the proto it came from; `array()` reads it, nothing is cached."""

    inputs: list[Node]
    outputs: list[Node]
    name: str

    def __init__(self, name: str, proto: TensorProto | SparseTensorProto, directory: Path | None = None) -> None:
        super().__init__(name, np.zeros(0, np.float32))
        self.proto = proto
        self.directory = directory or Path()
        self.info: onnx.ValueInfoProto | None = None  # where it is a graph output: how the output was declared

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def array(self) -> Array:
        """The values. Sparse ones are made dense, external ones read from their file."""
        if isinstance(self.proto, SparseTensorProto):
            return dense_array(self.proto)
        return read_tensor(self.proto, self.directory)

    def assign(self, value: Array) -> None:
        """Replace the values; the name stays."""
        self.proto = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), self.name)

    @property
    def producer(self) -> Node | None:
        """None: nothing computes a constant."""
        return None

    @property
    def consumers(self) -> list[Node]:
        """Nodes that read it, once each."""
        return list(dict.fromkeys(self.outputs))

    @property
    def dims(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.proto.dims)

    @property
    def elem_type(self) -> int:
        """TensorProto.DataType."""
        return self.proto.values.data_type if isinstance(self.proto, SparseTensorProto) else self.proto.data_type

    @property
    def nbytes(self) -> int:
        """Bytes of its values, without reading them."""
        return self.proto.ByteSize() if isinstance(self.proto, SparseTensorProto) else byte_size(self.proto)


Tensor = Value | Const


class Node(gs.Node):  # type: ignore[misc]
    """One operator. `attrs` maps names to AttributeProtos; read them with `attr`, write them with `set_attr`."""

    inputs: list[Tensor]
    outputs: list[Value]
    op: str
    name: str

    def __init__(
        self,
        op: str,
        name: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Value],
        domain: str = "",
        attrs: dict[str, AttributeProto] | None = None,
        source: NodeProto | None = None,
    ) -> None:
        super().__init__(op, name, attrs or {}, list(inputs), list(outputs), domain)
        self.source = source  # doc string, metadata, overload and device annotations ride here
        self.captured: list[Tensor] = []  # outer tensors that its bodies read ...
        self.captured_as: list[str] = []  # ... and the names the bodies know them by

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def attr(self, name: str, default: Any = None) -> Any:
        """The attribute's Python value (str for strings), or `default`."""
        proto = self.attrs.get(name)
        if proto is None:
            return default
        value = helper.get_attribute_value(proto)
        return value.decode() if isinstance(value, bytes) else value

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute from a Python value."""
        self.attrs[name] = helper.make_attribute(name, value)

    def input(self, index: int) -> Tensor | None:
        """Input `index`, or None where it is absent or empty."""
        if index >= len(self.inputs) or self.inputs[index].name == "":
            return None
        return self.inputs[index]

    def constant(self, index: int) -> Const | None:
        """Input `index` where it is a constant, else None."""
        tensor = self.input(index)
        return tensor if isinstance(tensor, Const) else None

    @property
    def bodies(self) -> bool:
        """Whether it holds subgraphs (If, Loop, Scan ...)."""
        return any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in self.attrs.values())

    @property
    def label(self) -> str:
        """What errors and reports call it: its name, or its operator and first output where it has none."""
        return self.name or f"{self.op}({self.outputs[0].name if self.outputs else ''})"


class Graph:
    """A model as linked nodes and tensors. `Graph.load` and `Graph.from_proto` make one, `to_proto` and `save` write it."""

    def __init__(self, shell: ModelProto) -> None:
        self.shell = shell  # the ModelProto without graph contents: IR, producer, metadata, opsets
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.outputs: list[Tensor] = []
        self.constants: dict[str, Const] = {}
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}  # where fresh_name goes on counting

    # ---- reading and writing ----
    @classmethod
    def from_proto(cls, model: ModelProto, directory: Path | None = None) -> Graph:
        """Link a ModelProto. Local functions are inlined; initializers listed as inputs become plain constants."""
        from qcompile.graph_io import read_model

        return read_model(model, directory or Path())

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read a file; external data stay on disk until asked for. Raises ModelError naming the file."""
        from qcompile.graph_io import load_file

        return load_file(Path(path))

    def to_proto(self, embed: bool = False) -> ModelProto:
        """The model as one ModelProto, nodes sorted. External constants stay external, or with `embed` are read in."""
        from qcompile.graph_io import write_model

        return write_model(self, embed=embed)

    def save(self, path: str | Path) -> None:
        """Write to `path` atomically; beyond 2 GiB the constants stream into `<path>.data`."""
        from qcompile.graph_io import save_file

        save_file(self, Path(path))

    def copy(self) -> Graph:
        """An independent graph; constants' protos are shared, not copied."""
        from qcompile.graph_io import copy_graph

        return copy_graph(self)

    # ---- opsets ----
    def opset(self, domain: str = "") -> int | None:
        """The imported version of `domain`, or None."""
        return next((o.version for o in self.shell.opset_import if o.domain in domain_aliases(domain)), None)

    def require_opset(self, domain: str, version: int = 1) -> None:
        """Import `domain` at `version` unless it is imported already."""
        if self.opset(domain) is None:
            self.shell.opset_import.append(helper.make_opsetid(domain, version))

    # ---- editing ----
    def fresh_name(self, base: str) -> str:
        """A tensor or node name not used yet: `base`, else `base_1`, `base_2` ..."""
        name, count = base, self._counts.get(base, 0)
        while name in self._names or name == "":
            count += 1
            name = f"{base}_{count}"
        self._counts[base] = count
        self._names.add(name)
        return name

    def reserve(self, names: Iterable[str]) -> None:
        """Mark names as used."""
        self._names.update(names)

    def constant(self, base: str, value: Array | TensorProto) -> Const:
        """Add a constant named after `base`."""
        name = self.fresh_name(base)
        if isinstance(value, TensorProto):
            proto = TensorProto()
            proto.CopyFrom(value)
            proto.name = name
        else:
            proto = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        const = Const(name, proto)
        self.constants[name] = const
        return const

    def node(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[str | Value],
        *,
        name: str | None = None,
        domain: str = "",
        **attrs: Any,
    ) -> Node:
        """Append a node. `outputs` are base names (made fresh) or existing values without a producer; None inputs are empty."""
        made = [o if isinstance(o, Value) else Value(self.fresh_name(o)) for o in outputs]
        ins: list[Tensor] = [Value("") if i is None else i for i in inputs]
        protos = {key: helper.make_attribute(key, value) for key, value in attrs.items() if value is not None}
        node = Node(op, self.fresh_name(name or made[0].name + "_" + op.lower()), ins, made, domain, protos)
        if domain:
            self.require_opset(domain)
        self.nodes.append(node)
        return node

    def is_output(self, tensor: Tensor) -> bool:
        """Whether `tensor` is an output of the graph."""
        return any(o is tensor for o in self.outputs)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether its name must stay: a graph output, or read inside the body of an If, Loop or Scan."""
        return self.is_output(tensor) or any(c is tensor for n in self.nodes for c in n.captured)

    def replace_uses(self, old: Tensor, new: Tensor, only: Callable[[Node], bool] | None = None) -> int:
        """Make the consumers of `old` (those that `only` accepts) read `new`; returns how many inputs changed.

        Graph outputs are not touched: their names are a promise. Use `take_name` for those.
        """
        changed = 0
        for node in old.consumers:
            if only is not None and not only(node):
                continue
            for index, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[index] = new
                    changed += 1
        return changed

    def bypass(self, node: Node, source: Tensor) -> None:
        """Remove `node` (one used output) and let `source` stand for its output, graph output names kept.

        Where the output is pinned and `source` is itself pinned, an input or a constant, an Identity keeps the name.
        """
        output = node.outputs[0]
        if self.is_pinned(output):
            fixed = isinstance(source, Const) or self.is_pinned(source) or any(i is source for i in self.inputs)
            if fixed or source.producer is None:
                self.replace_uses(output, source, only=lambda n: n is not node)
                if node.op != "Identity" or node.inputs[0] is not source:
                    self.remove(node, detach_outputs=True)
                    self.nodes.append(Node("Identity", self.fresh_name(output.name + "_identity"), [source], [output]))
                return
            producer = source.producer
            self.remove(node, detach_outputs=True)
            self.replace_uses(source, output)
            index = next(i for i, o in enumerate(producer.outputs) if o is source)
            producer.outputs[index] = output
            return
        self.replace_uses(output, source)
        self.remove(node)

    def remove(self, node: Node, detach_outputs: bool = True) -> None:
        """Unlink `node` from its tensors and take it out of the graph."""
        node.inputs.clear()
        if detach_outputs:
            node.outputs.clear()
        node.captured, node.captured_as = [], []
        self.nodes = [n for n in self.nodes if n is not node]

    def cleanup(self) -> int:
        """Remove nodes that no output needs, and constants that nothing reads; returns the number of nodes removed."""
        needed: set[Node] = set()
        stack: list[Tensor] = list(self.outputs)
        while stack:
            tensor = stack.pop()
            producer = tensor.producer
            if producer is not None and producer not in needed:
                needed.add(producer)
                stack.extend(producer.inputs)
                stack.extend(producer.captured)
        dead = [n for n in self.nodes if n not in needed]
        for node in dead:
            node.inputs.clear()
            node.outputs.clear()
        self.nodes = [n for n in self.nodes if n in needed]
        pinned = {t for n in self.nodes for t in n.captured} | set(self.outputs)
        self.constants = {k: c for k, c in self.constants.items() if c.outputs or c in pinned}
        return len(dead)

    def sort(self) -> None:
        """Topological order, stable: among ready nodes the earlier in the list comes first. Raises ModelError on a cycle."""
        self.nodes = topological(self.nodes)

    def values(self) -> Iterator[Value]:
        """Graph inputs and all computed tensors, in node order."""
        yield from self.inputs
        for node in self.nodes:
            yield from (o for o in node.outputs if o.name)

    def infer_shapes(self) -> None:
        """Fill types and shapes of computed tensors where onnx can infer them; large constants take part by shape only."""
        from qcompile.graph_io import infer_types

        infer_types(self, _EMBED_LIMIT)
