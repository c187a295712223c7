"""Take the Q/DQ of another tool out of the graph, and remember what it said.

    x -> Q -> DQ -> y               becomes  y = Clip(x, (low - zero) S, (high - zero) S), which stands for the pair from here on
    x -> Q -> MaxPool -> DQ -> y    becomes  the Clip, and MaxPool on floats: every operator on integers is lifted in this way
    w (integers) -> DQ              becomes  a float constant; the integers of linear nodes are remembered by node

The Clip keeps what the pair does besides rounding: exporters drop a Relu that the range of its Q/DQ makes good for, and only the
saturation is left of it. Scales, zero points and integers go into `context.imported`; `quantise_imported` puts the pairs back.

Left as they are: DequantizeLinear of a graph input of integers and of the rows of a table that Gather looks up. Taken out and
counted: activations of 16 bits, whose Clip stays; the pair between a MatMul and the constant Add that is its bias.
Refused with the node's name (ModelError): scales computed at run time, per-channel or blocked scales of activations, arithmetic
on the integers, a DequantizeLinear with other parameters than the QuantizeLinear before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from qcompile.context import Context
from qcompile.errors import ModelError
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.import_read import EIGHT_BIT, NARROW, Quantiser, is_dequantise, is_quantise, read, same_parameters, stored_integers
from qcompile.imported import Imported, Mark
from qcompile.passes._import_weights import remember_weights
from qcompile.passes._match import is_op, producer_of
from qcompile.placement import data_inputs
from qcompile.rewrite import Lossy, Promise, Report

_SAMPLES = 32  # for bias correction and the diagnosis
_MOVES = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "DepthToSpace", "SpaceToDepth", "Expand",
    "Tile", "Identity", "MaxPool", "Pad", "Resize", "Concat", "Split",
}  # fmt: skip
_BIAS_PAIR = "rounding between a MatMul and its bias"


@dataclass(frozen=True)
class ImportQdq:
    """Lift a Q/DQ model to floats; fills `context.imported`."""

    name: str = "import_qdq"
    keeps: Promise = field(default_factory=lambda: Lossy(-30.0))  # 4-bit activations leave little of the unrounded signal

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a Q/DQ node that is gone. Raises ModelError for what cannot be imported."""
        report = Report()
        if context.imported is not None:
            return report
        graph.sort()
        graph.infer_shapes()
        context.imported = imported = Imported()
        if context.diagnose or not context.synthetic:
            context.samples = [dict(feeds) for feeds in islice(context.calibration(), _SAMPLES)]
        before = sum(is_quantise(n) or is_dequantise(n) for n in graph.nodes)
        remember_weights(graph, imported)
        _constants(graph)
        lift = _Lift(graph, imported)
        for node in list(graph.nodes):
            lift.visit(node)
        graph.cleanup()
        graph.sort()
        lift.check()
        report.rewrites = before - sum(is_quantise(n) or is_dequantise(n) for n in graph.nodes)
        for reason in imported.unusable.items():
            report.refuse(*reason)
        return report


def _constants(graph: Graph) -> None:
    """Dequantise constants; a table of integers that only Gather looks up (one scale) is dequantised behind the Gather."""
    for node in list(graph.nodes):
        if not is_dequantise(node):
            continue
        integers, output, table = stored_integers(node.outputs[0]), node.outputs[0], node.constant(0)
        if integers is None:
            continue
        looks_up = [is_op(n, "Gather") and n.inputs[0] is output and isinstance(n.inputs[1], Value) for n in output.consumers]
        if table is not None and integers.scale.size == 1 and looks_up and all(looks_up) and not graph.is_pinned(output):
            _behind_gather(graph, node, table, output.consumers)
            continue
        graph.bypass(node, graph.constant(output.name + "_float", integers.floats()))
    graph.cleanup()


def _behind_gather(graph: Graph, node: Node, table: Const, readers: list[Node]) -> None:
    for gather in readers:
        rows = Value(graph.fresh_name(gather.outputs[0].name + "_integers"))
        output = gather.outputs[0]
        gather.inputs[0], gather.outputs[0] = table, rows
        graph.node("DequantizeLinear", [rows, *node.inputs[1:]], [output], name=gather.label + "_dq", domain=node.domain)
    graph.remove(node)
    graph.sort()


@dataclass
class _Lifted:
    """A tensor of integers as the float tensor that it stands for."""

    value: Tensor
    parameters: Quantiser


class _Lift:
    """Goes through the nodes in topological order and gives each tensor of integers its float twin."""

    def __init__(self, graph: Graph, imported: Imported) -> None:
        self.graph = graph
        self.imported = imported
        self.lifted: dict[Tensor, _Lifted] = {}

    def visit(self, node: Node) -> None:
        if is_quantise(node):
            self._quantise(node)
        elif is_dequantise(node):
            self._dequantise(node)
        elif any(t in self.lifted for t in [*node.inputs, *node.captured]):
            self._operate(node)

    def check(self) -> None:
        """Raise ModelError where a QuantizeLinear is left whose integers are read: nothing may be quantised twice."""
        for node in self.graph.nodes:
            if is_quantise(node) and not self.graph.is_output(node.outputs[0]):
                raise ModelError(f"node '{node.label}': its integers are read in a way that is not imported")

    def _quantise(self, node: Node) -> None:
        found, output = read(node), node.outputs[0]
        if not found.per_tensor:
            kind = "quantised in blocks" if found.block else "with one scale a channel"
            raise ModelError(f"node '{node.label}': activations {kind} are not imported; quantise them with one scale a tensor")
        if isinstance(node.inputs[0], Const):
            raise ModelError(f"node '{node.label}': integers of a constant are read in a way that is not imported")
        source = node.inputs[0]
        if _is_bias_pair(self.graph, node):
            self.imported.changed[_BIAS_PAIR] += 1
            self.lifted[output] = _Lifted(source, found)
            return
        if found.elem_type not in (*EIGHT_BIT, *NARROW):
            low, high = found.limits
            zero, scale = int(found.zero.reshape(-1)[0]), float(found.scale.reshape(-1)[0])
            self.imported.changed[f"activations of {_bits(found)} bits computed in float"] += 1
            clipped = self._clip(source, ((low - zero) * scale, (high - zero) * scale), f"{output.name}_float")
            self.lifted[output] = _Lifted(clipped, found)
            return
        mark = found.mark()
        readers = output.consumers
        if (
            len(readers) == 1
            and is_op(readers[0], "Clip")
            and readers[0].inputs[0] is output
            and not self.graph.is_pinned(output)
        ):
            narrow = _narrowed(readers[0], mark, found)
            if narrow is not None:  # Clip on integers between Q and DQ: narrow integers, or fewer than 8 bits
                mark, output = narrow, readers[0].outputs[0]
        value = self._clip(source, mark.bounds, f"{output.name}_float")
        producer = value.producer
        assert producer is not None
        self.imported.marks[producer.name] = mark
        self.lifted[output] = _Lifted(value, found)

    def _clip(self, source: Tensor, bounds: tuple[float, float], name: str) -> Value:
        ends = [
            self.graph.constant(f"{name}_{end}", np.asarray(b, np.float32))
            for end, b in zip(("low", "high"), bounds, strict=True)
        ]
        clip = self.graph.node("Clip", [source, *ends], [name], name=f"{name}_import")
        output = clip.outputs[0]
        output.type = source.type if isinstance(source, Value) else None
        return output

    def _dequantise(self, node: Node) -> None:
        integers, output = node.inputs[0], node.outputs[0]
        lifted = self.lifted.get(integers)
        found = read(node)
        if lifted is None:
            self._loose(node, found)
            return
        if not same_parameters(found, lifted.parameters):
            raise ModelError(
                f"node '{node.label}': dequantises with other parameters than '{lifted.parameters.node.label}' quantised with; "
                "export the model again"
            )
        self.graph.bypass(node, lifted.value)
        if lifted.value.producer is None or not any(o is lifted.value for o in lifted.value.producer.outputs):
            lifted.value = output  # a graph output: its name won

    def _loose(self, node: Node, found: Quantiser) -> None:
        """Integers that no QuantizeLinear made: a graph input or rows of a table. They stay, and the result has a known scale."""
        source, output = node.inputs[0], node.outputs[0]
        gather = producer_of(source, "Gather")
        given = any(v is source for v in self.graph.inputs) or (gather is not None and isinstance(gather.inputs[0], Const))
        if not given:
            raise ModelError(f"node '{node.label}': dequantises integers that are computed in a way that is not imported")
        readers = [n for n in output.consumers if not is_quantise(n)]  # those say themselves what they round to
        if found.elem_type not in EIGHT_BIT or not found.per_tensor or self.graph.is_pinned(output) or not readers:
            return
        mark = found.mark()
        value = self._clip(output, mark.bounds, f"{output.name}_marked")
        assert value.producer is not None
        self.imported.marks[value.producer.name] = mark
        for reader in readers:
            self.graph.replace_uses(output, value, only=lambda n, r=reader: n is r)  # type: ignore[misc]

    def _operate(self, node: Node) -> None:
        """An operator on integers becomes the same on floats, where it only moves or clips them."""
        sources = [t for t in node.inputs if t in self.lifted]
        first = self.lifted[sources[0]]
        moves = node.domain in ("", "ai.onnx") and node.op in _MOVES and not node.captured
        if moves and set(map(id, data_inputs(node))) == set(map(id, sources)):
            if not all(same_parameters(self.lifted[t].parameters, first.parameters) for t in sources):
                raise ModelError(f"node '{node.label}': {node.op} of integers with unequal scales is not imported")
            if node.op == "Pad":
                self._pad(node, first.parameters)
        elif is_op(node, "Clip") and sources == node.inputs[:1]:
            self._clip_integers(node, first)
            return
        else:
            raise ModelError(f"node '{node.label}': {node.op} on integers of QuantizeLinear is not imported")
        for index, tensor in enumerate(node.inputs):
            if tensor in self.lifted:
                node.inputs[index] = self.lifted[tensor].value
        for index, integers in enumerate(list(node.outputs)):
            if not integers.name:
                continue
            if self.graph.is_pinned(integers):
                raise ModelError(f"node '{node.label}': gives integers as output '{integers.name}', which is not imported")
            twin = Value(self.graph.fresh_name(integers.name + "_float"))
            node.outputs[index] = twin
            self.lifted[integers] = _Lifted(twin, first.parameters)

    def _pad(self, node: Node, found: Quantiser) -> None:
        fill = node.constant(2)
        if node.input(2) is not None and fill is None:
            raise ModelError(f"node '{node.label}': pads with a value computed at run time, which is not imported")
        if node.attr("mode", "constant") != "constant":
            return
        value = 0 if fill is None else int(fill.array().reshape(()))
        real = np.float32(value - int(found.zero.reshape(-1)[0])) * np.float32(found.scale.reshape(-1)[0])
        while len(node.inputs) < 3:
            node.inputs.append(Value(""))
        node.inputs[2] = self.graph.constant(node.label + "_value", np.asarray(real, np.float32))

    def _clip_integers(self, node: Node, lifted: _Lifted) -> None:
        integers, found = node.outputs[0], lifted.parameters
        bounds: list[float] = []
        for index, limit in ((1, found.limits[0]), (2, found.limits[1])):
            constant = node.constant(index)
            if constant is None and node.input(index) is not None:
                raise ModelError(f"node '{node.label}': clips at a bound computed at run time, which is not imported")
            bound = limit if constant is None else int(constant.array().reshape(()))
            bounds.append((bound - int(found.zero.reshape(-1)[0])) * float(found.scale.reshape(-1)[0]))
        if self.graph.is_pinned(integers):
            raise ModelError(f"node '{node.label}': gives integers as output '{integers.name}', which is not imported")
        value = self._clip(lifted.value, (bounds[0], bounds[1]), integers.name + "_float")
        self.lifted[integers] = _Lifted(value, found)


def _bits(found: Quantiser) -> int:
    low, high = found.limits
    return (high - low).bit_length()


def _narrowed(clip: Node, mark: Mark, found: Quantiser) -> Mark | None:
    """`mark` within the constant bounds of a Clip on its integers; None where they are not constant or leave 0.0 out."""
    ends = [mark.low, mark.high]
    shift = 128 if found.limits[0] < 0 else 0
    for index in (1, 2):
        if clip.input(index) is None:
            continue
        constant = clip.constant(index)
        if constant is None:
            return None
        bound = int(constant.array().reshape(())) + shift
        ends[index - 1] = max(ends[0], bound) if index == 1 else min(ends[1], bound)
    low, high = ends
    return Mark(mark.scale, mark.zero, low, high) if low <= mark.zero <= high and low < high else None


def _is_bias_pair(graph: Graph, node: Node) -> bool:
    """Whether `node` rounds a MatMul's result that is read by nothing but the Add of a constant row behind it.

    The Add is then the product's bias: it belongs into the accumulator.
    """
    product = node.inputs[0].producer
    if not is_op(product, "MatMul") or product is None or product.constant(1) is None or len(node.inputs[0].consumers) != 1:
        return False
    if graph.is_pinned(node.inputs[0]) or graph.is_pinned(node.outputs[0]) or len(node.outputs[0].consumers) != 1:
        return False
    found = read(node)
    if found.elem_type not in EIGHT_BIT or found.mark().low == found.mark().zero:
        return False
    dequantise = node.outputs[0].consumers[0]
    if not is_dequantise(dequantise) or graph.is_pinned(dequantise.outputs[0]) or len(dequantise.outputs[0].consumers) != 1:
        return False
    add = dequantise.outputs[0].consumers[0]
    constant = next((t for t in add.inputs if isinstance(t, Const)), None) if is_op(add, "Add") else None
    return constant is not None and all(d == 1 for d in constant.dims[:-1])
