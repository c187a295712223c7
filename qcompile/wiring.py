"""Who makes and who reads each tensor of an ONNX file, and which element type it has, subgraphs included.

For *reading* a graph that another program wrote (onnxruntime's optimised one): nothing is changed, no weight is loaded.
Element types are inferred here because onnxruntime drops `value_info` of what it fuses and onnx's own inference stops at
the first operator of another domain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, defs, external_data_helper, numpy_helper

from qcompile.runtime import Array

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})
NARROW = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2})
WIDE = frozenset({TensorProto.INT16, TensorProto.UINT16})

#: Operators that only move, repeat or reinterpret elements.
MOVES = frozenset(
    [
        "Compress",
        "Concat",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "Reshape",
        "ReorderInput",  # com.microsoft.nchwc: into and out of the blocked layout of float Conv
        "ReorderOutput",
        "ReverseSequence",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Size",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)

#: Those of them whose first input is the data.
CARRIES = MOVES - {"Shape", "Size"}

_TYPE_OF_TEXT = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(int64)": TensorProto.INT64,
    "tensor(int32)": TensorProto.INT32,
    "tensor(bool)": TensorProto.BOOL,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(int8)": TensorProto.INT8,
}
#: Attributes in which a Constant may hold numbers without a tensor.
_CONSTANT_TYPES = {
    "value_int": int(TensorProto.INT64),
    "value_ints": int(TensorProto.INT64),
    "value_float": int(TensorProto.FLOAT),
    "value_floats": int(TensorProto.FLOAT),
}
_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT2, TensorProto.UINT2), 2),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), 8),
    **dict.fromkeys((TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), 16),
    **dict.fromkeys((TensorProto.INT64, TensorProto.UINT64, TensorProto.DOUBLE), 64),
}


@dataclass(frozen=True, eq=False)
class Node:
    """One node; compared by identity, because names need be neither present nor unique."""

    proto: onnx.NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def op(self) -> str:
        """Operator type, without its domain."""
        return str(self.proto.op_type)

    @property
    def label(self) -> str:
        """The name, or the first output's where there is none."""
        return str(self.proto.name) or next((o for o in self.outputs if o), self.op)

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        """The attribute of that name, or None."""
        return next((a for a in self.proto.attribute if a.name == name), None)


@dataclass(frozen=True)
class Root:
    """The largest stored tensor that a constant is made from."""

    name: str
    elem_type: int
    elements: int

    @property
    def is_integer(self) -> bool:
        """Whether it is stored as quantised weights are: 2 to 16 bits. (int32 and int64 are shapes, indices, biases.)"""
        return self.elem_type in BYTES | NARROW | WIDE


@dataclass(eq=False)
class Wiring:
    """One graph: `roots` holds every constant tensor, `types` every element type that could be told.

    Nodes must be in topological order, as ONNX requires. A name of an outer graph is found through `outer`.
    """

    opsets: dict[str, int]
    outer: Wiring | None = None
    nodes: list[Node] = field(default_factory=list)
    producers: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[Node]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    roots: dict[str, Root] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    stored: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inner: list[Wiring] = field(default_factory=list)

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Wiring:
        """Index the main graph of `model`; functions must have been inlined."""
        wiring = cls({o.domain: o.version for o in model.opset_import})
        wiring._index(model.graph)
        return wiring

    def scopes(self) -> Iterator[Wiring]:
        """This graph and every subgraph in it."""
        yield self
        for inner in self.inner:
            yield from inner.scopes()

    def producer(self, name: str) -> Node | None:
        """The node of this graph or an outer one that makes `name`; None for inputs and stored tensors."""
        if name in self.producers or self.outer is None:
            return self.producers.get(name)
        return self.outer.producer(name)

    def root(self, name: str) -> Root | None:
        """What the constant `name` is made from; None where it is no constant."""
        found = self.roots.get(name)
        return self.outer.root(name) if found is None and self.outer is not None else found

    def value(self, name: str) -> Array | None:
        """The stored tensor `name`, for scales; None where it is computed, or lies in an external file."""
        found = self.stored.get(name)
        if found is None:
            return None if self.outer is None else self.outer.value(name)
        return None if external_data_helper.uses_external_data(found) else numpy_helper.to_array(found)

    def elem_type(self, name: str) -> int:
        """Element type, TensorProto.UNDEFINED where it could not be told."""
        found = self.types.get(name)
        if found is None:
            return self.outer.elem_type(name) if self.outer is not None else int(TensorProto.UNDEFINED)
        return found

    def is_float(self, name: str) -> bool:
        """Whether `name` is a float tensor that is only known at run time."""
        return bool(name) and self.elem_type(name) in FLOATS and self.root(name) is None

    def behind_moves(self, name: str) -> Node | None:
        """The first producer going back from `name` that computes; moved data is followed."""
        node = self.producer(name)
        while node is not None and node.op in CARRIES:
            node = self.producer(node.inputs[0])
        return node

    def ahead_of_moves(self, name: str) -> list[Node]:
        """The nodes that compute on `name`, or on the same data moved."""
        found: list[Node] = []
        waiting, seen = [name], {name}
        while waiting:
            data = waiting.pop()
            for node in self.readers.get(data, []):
                if node.op not in MOVES:
                    found.append(node)
                elif node.op in CARRIES and (data == node.inputs[0] or node.op == "Concat"):
                    waiting += [o for o in node.outputs if o not in seen]
                    seen.update(node.outputs)
        return found

    def _index(self, graph: onnx.GraphProto) -> None:
        self.outputs = frozenset(o.name for o in graph.output)
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type"):
                self.types[value.name] = value.type.tensor_type.elem_type
        for sparse in graph.sparse_initializer:
            self._store(sparse.values.name, sparse.values.data_type, math.prod(sparse.dims))
        for tensor in graph.initializer:
            self._store(tensor.name, tensor.data_type, math.prod(tensor.dims))
            self.stored[tensor.name] = tensor
        for proto in graph.node:
            node = Node(proto, tuple(proto.input), tuple(proto.output))
            self.nodes.append(node)
            self._connect(node)

    def _store(self, name: str, elem_type: int, elements: int) -> None:
        self.types[name] = elem_type
        self.roots[name] = Root(name, elem_type, elements)

    def _connect(self, node: Node) -> None:
        self.producers.update({o: node for o in node.outputs if o})
        for name in set(node.inputs) - {""}:
            owner: Wiring | None = self
            while owner is not None:  # a reader inside a subgraph is one of the outer tensor as well
                owner.readers.setdefault(name, []).append(node)
                owner = owner.outer
        value = node.attribute("value")
        if node.op == "Constant" and value is not None and value.HasField("t"):
            self._store(node.outputs[0], value.t.data_type, math.prod(value.t.dims))
            self.stored[node.outputs[0]] = value.t
            return
        number = next((node.attribute(a) for a in _CONSTANT_TYPES if node.attribute(a) is not None), None)
        if node.op == "Constant" and number is not None:
            self._store(node.outputs[0], _CONSTANT_TYPES[number.name], max(len(number.ints), len(number.floats), 1))
            return
        subgraphs = [g for a in node.proto.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
        for subgraph in subgraphs:
            inner = Wiring(self.opsets, self)
            inner._index(subgraph)
            self.inner.append(inner)
        made_from = [self.root(i) for i in node.inputs if i]
        for name, elem_type in zip(node.outputs, _output_types(self, node), strict=True):
            self.types.setdefault(name, elem_type)
        if made_from and None not in made_from and not subgraphs:
            root = max((r for r in made_from if r is not None), key=lambda r: r.elements)
            self.roots.update(dict.fromkeys((o for o in node.outputs if o), root))


def bits(elem_type: int) -> int:
    """Width of one element as ONNX stores it."""
    return _BITS.get(elem_type, 32)


def _output_types(wiring: Wiring, node: Node) -> list[int]:
    """Element type of each output, by the operator's own schema where it is a standard operator."""
    given = [wiring.elem_type(i) if i else int(TensorProto.UNDEFINED) for i in node.inputs]
    special = _special_type(node, given)
    if special is not None:
        return [special] * len(node.outputs)
    domain = node.proto.domain
    try:
        schema = defs.get_schema(node.op, wiring.opsets.get(domain, 1), domain)
    except defs.SchemaError:  # another domain: its operators compute in the first float type they are given
        return [next((t for t in given if t in FLOATS), int(TensorProto.FLOAT))] * len(node.outputs)
    known = {
        c.type_param_str: _TYPE_OF_TEXT.get(c.allowed_type_strs[0], int(TensorProto.UNDEFINED))
        for c in schema.type_constraints
        if len(c.allowed_type_strs) == 1
    }
    for position, elem_type in enumerate(given):
        if elem_type != TensorProto.UNDEFINED and schema.inputs:
            known.setdefault(schema.inputs[min(position, len(schema.inputs) - 1)].type_str, elem_type)
    texts = [schema.outputs[min(k, len(schema.outputs) - 1)].type_str for k in range(len(node.outputs))]
    return [known.get(text, _TYPE_OF_TEXT.get(text, int(TensorProto.UNDEFINED))) for text in texts]


def _special_type(node: Node, given: list[int]) -> int | None:
    """Output type of the operators whose schema does not tell it: it is an attribute's, or another domain's rule."""
    undefined = int(TensorProto.UNDEFINED)
    asked = node.attribute("to") or node.attribute("output_dtype")
    if asked is not None and asked.i:
        return int(asked.i)
    if node.op == "QuantizeLinear":
        return given[2] if len(given) > 2 else int(TensorProto.UINT8)
    if node.op == "DequantizeLinear":
        return given[1]
    if node.op == "ConstantOfShape":
        value = node.attribute("value")
        return int(TensorProto.FLOAT) if value is None else int(value.t.data_type)
    if node.op == "QGemm":
        quantised = len(given) > 8 and given[8] != undefined
        return given[8] if quantised else int(TensorProto.FLOAT)
    if node.op.startswith("QLinear"):
        return next((t for t in given if t in BYTES), undefined)
    return None
