"""f(constants) -> constant: whatever does not depend on the inputs is computed now.

1. Constant nodes become constants; their protos are kept as they are.
2. A node whose inputs are all constants is evaluated in onnxruntime with optimisation off: the runtime's own values, bit for bit.
3. A shape tensor whose elements are all known numbers (Shape of static dimensions, Gather of one ...) becomes a constant.

It must not fire on operators that draw random numbers, on quantisation operators (a folded DequantizeLinear would lose the
integers), on operators with bodies, outside the standard domain, on 4-bit weights behind a Cast (the cast is the decompression),
nor where the result would be both over `limit_bytes` and larger than what it is computed from (ConstantOfShape, Expand and Tile
would bloat the file).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from qcompile.context import Context
from qcompile.errors import ModelError
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._match import is_op
from qcompile.passes._shape_values import Shapes
from qcompile.rewrite import Exact, Promise, Report
from qcompile.runtime import Optimisation, Session

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
_QUANTISATION = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_GROWING = ("ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "Resize", "Upsample", "Pad", "EyeLike", "CenterCropPad")
_NO_TENSOR = ("SequenceEmpty", "SequenceConstruct", "SplitToSequence", "Optional")
_PACKED = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1})
_CONST_ATTRIBUTES = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
_EMBEDDED = 1024  # bytes: constants up to this size are initializers of the evaluated model, larger ones are fed


@dataclass(frozen=True)
class FoldConstants:
    """Evaluate everything that does not depend on the inputs. `batch_bytes` bounds the memory of one evaluation."""

    name: str = "fold_constants"
    keeps: Promise = field(default_factory=Exact)
    limit_bytes: int = 16 << 20
    batch_bytes: int = 256 << 20

    def run(self, graph: Graph, context: Context) -> Report:
        """Fold until nothing changes; refusals are those of the last round."""
        report = Report()
        report.rewrites += sum(_inline_constant(graph, n) for n in list(graph.nodes) if is_op(n, "Constant"))
        while True:
            report.skipped.clear()
            report.refusals.clear()
            count = _fold_known_shapes(graph)
            for batch in self._batches(graph, report):
                count += _evaluate(graph, batch, report)
            report.rewrites += count
            if count == 0:
                break
        graph.cleanup()
        return report

    def _batches(self, graph: Graph, report: Report) -> Iterator[list[Node]]:
        """Foldable nodes in topological order, cut where their constants pass `batch_bytes`."""
        batch: list[Node] = []
        inside: set[Tensor] = set()
        fed: dict[Tensor, int] = {}
        for node in list(graph.nodes):
            if not all(isinstance(t, Const) or t in inside or t.name == "" for t in node.inputs) or _kept(graph, node):
                continue
            reason = self._refusal(node)
            if reason is not None:
                report.refuse(node.label, reason)
                continue
            batch.append(node)
            inside.update(node.outputs)
            fed.update({t: t.nbytes for t in node.inputs if isinstance(t, Const)})
            if sum(fed.values()) > self.batch_bytes:
                yield batch
                batch, fed = [], {}
                inside = set()
        if batch:
            yield batch

    def _refusal(self, node: Node) -> str | None:
        if node.domain not in ("", "ai.onnx"):
            return "operator outside the standard domain"
        if node.op in _RANDOM:
            return "draws random numbers"
        if node.op in _QUANTISATION:
            return "quantisation operator"
        if node.bodies:
            return "has a body"
        if node.op in _NO_TENSOR or any(o.type is not None and not o.type.HasField("tensor_type") for o in node.outputs):
            return "result is not a tensor"
        if node.op == "Cast" and node.inputs[0].elem_type in _PACKED:
            return "cast of 4-bit weights"
        sources = sum(t.nbytes if isinstance(t, Const) else (_nbytes(t) or 0) for t in node.inputs)
        for output in node.outputs:
            size = _nbytes(output)
            if size is None and node.op in _GROWING:
                return "size of the result is not known"
            if size is not None and size > self.limit_bytes and size > sources:
                return "result would be large, and larger than its inputs"
        return None


def _kept(graph: Graph, node: Node) -> bool:
    """Whether `node` is the Identity that gives a constant the name of a graph output."""
    return is_op(node, "Identity") and graph.is_output(node.outputs[0])


def _nbytes(tensor: Tensor) -> int | None:
    dims = tensor.dims
    if dims is None or not all(isinstance(d, int) for d in dims) or tensor.elem_type in (0, TensorProto.STRING):
        return None
    return prod(int(d) for d in dims if d is not None) * helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize


def _inline_constant(graph: Graph, node: Node) -> int:
    name, proto = next((k, a) for k, a in node.attrs.items() if k.startswith(("value", "sparse")))
    if name == "value":
        value: TensorProto | SparseTensorProto = proto.t
    elif name == "sparse_value":
        value = proto.sparse_tensor
    elif name in _CONST_ATTRIBUTES:
        value = numpy_helper.from_array(np.asarray(helper.get_attribute_value(proto), _CONST_ATTRIBUTES[name]))
    else:
        words = [proto.s] if name == "value_string" else list(proto.strings)
        value = helper.make_tensor("", TensorProto.STRING, [] if name == "value_string" else [len(words)], words)
    _place(graph, node.outputs[0], value)
    return 1


def _place(graph: Graph, value: Value, proto: TensorProto | SparseTensorProto) -> None:
    """Let a constant take the place and the name of `value`; a graph output becomes an Identity of it instead."""
    producer = value.inputs[0]
    index = next(i for i, o in enumerate(producer.outputs) if o is value)
    producer.outputs[index] = Value(graph.fresh_name(value.name))
    name = graph.fresh_name(value.name) if graph.is_output(value) else value.name
    own = type(proto)()
    own.CopyFrom(proto)
    if isinstance(own, SparseTensorProto):
        own.values.name = name
    else:
        own.name = name
    const = graph.constants[name] = Const(name, own)
    graph.replace_uses(value, const)
    if graph.is_output(value):
        graph.nodes.append(Node("Identity", graph.fresh_name(value.name + "_identity"), [const], [value]))
        return
    for node in graph.nodes:  # bodies see the constant under the name they know
        if any(c is value for c in node.captured):
            node.captured = [const if c is value else c for c in node.captured]


def _fold_known_shapes(graph: Graph) -> int:
    shapes, count = Shapes(graph), 0
    for node in list(graph.nodes):
        output = node.outputs[0] if len(node.outputs) == 1 else None
        values = shapes.values(output)
        if output is None or values is None or not all(v.static for v in values):
            continue
        rank = shapes.dims(output)
        if rank is None or graph.is_output(output):
            continue
        dtype = helper.tensor_dtype_to_np_dtype(output.elem_type)
        array = np.array([v.factor for v in values], dtype).reshape(() if not rank else -1)
        _place(graph, output, numpy_helper.from_array(array))
        count += 1
    graph.cleanup()
    return count


def _evaluate(graph: Graph, batch: list[Node], report: Report) -> int:
    """Fold `batch` in one session; where that fails each node goes alone, so that one bad node is refused and no other."""
    try:
        results = _run(graph, batch)
    except ModelError:
        if len(batch) == 1:
            report.refuse(batch[0].label, "onnxruntime cannot evaluate it")
            return 0
        ready = [n for n in batch if all(isinstance(t, Const) or t.name == "" for t in n.inputs)]
        return sum(_evaluate(graph, [n], report) for n in ready)
    for value, array in results.items():
        _place(graph, value, numpy_helper.from_array(array))
    graph.cleanup()
    return len(batch)


def _run(graph: Graph, batch: list[Node]) -> dict[Value, Array]:
    """Values of the tensors that are read outside `batch`."""
    inside = set(batch)
    wanted = [o for n in batch for o in n.outputs if o.name and (graph.is_pinned(o) or any(c not in inside for c in o.consumers))]
    if not wanted:
        return {}
    model = ModelProto()
    model.CopyFrom(graph.shell)
    proto, feeds = model.graph, {}
    for const in dict.fromkeys(t for n in batch for t in n.inputs if isinstance(t, Const)):
        if isinstance(const.proto, SparseTensorProto) or const.nbytes > _EMBEDDED:
            array = const.array()
            if array.dtype.kind in "fiubO" and array.dtype.name in _NUMPY_TYPES:
                proto.input.append(helper.make_tensor_value_info(const.name, const.elem_type, array.shape))
                feeds[const.name] = array
                continue
        own = numpy_helper.from_array(const.array(), const.name)
        proto.initializer.append(own)
    proto.node.extend(node_proto(n) for n in batch)
    proto.output.extend(onnx.ValueInfoProto(name=o.name) for o in wanted)
    session = Session(model, optimisation=Optimisation.OFF, threads=1, label="constant folding")
    found = session.run(feeds, [o.name for o in wanted])
    return {o: found[o.name] for o in wanted}


_NUMPY_TYPES = frozenset(
    {"float32", "float64", "float16", "bool", "object"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def node_proto(node: Node) -> onnx.NodeProto:
    """The node alone, as a proto."""
    proto = onnx.NodeProto(op_type=node.op, name=node.name, domain=node.domain)
    proto.input.extend(t.name for t in node.inputs)
    proto.output.extend(t.name for t in node.outputs)
    proto.attribute.extend(node.attrs.values())
    return proto
