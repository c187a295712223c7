"""Insert Q/DQ pairs: the graph then says what is int8, with float weights still in it.

    x -> Conv -> Relu -> y    becomes    Q(x) -> DQ -> Conv -> Q' -> DQ' -> y      (Relu is the lower end of the range of Q')

Where to quantise is decided in `qcompile.placement`, the ranges come from `calibrate`. Data movement (MaxPool, Concat, Pad,
Transpose ...) between integer nodes works on the integers themselves, so that it rescales nothing at any optimisation level.
A tensor that an integer node computes is read by everybody through its DequantizeLinear, under its own name; a tensor that a
float node computes stays as it is for its float readers.

Refused, with the reason counted: see `placement.linear_refusal`; a graph without any linear node raises ModelError.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper

from qcompile.context import Context, matches
from qcompile.errors import InputError, ModelError
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.kernel_operands import TABULATED, kernel_operands
from qcompile.passes._activation_widths import ActivationWidths, width_groups
from qcompile.passes._flat_ends import bent_range
from qcompile.passes._match import is_op
from qcompile.placement import Placement, clip_bounds, data_inputs, maker, place, pool_area, shares_scale
from qcompile.plan import AddSite, ClampSite, LinearSite, Plan, PoolSite, ScaleClass
from qcompile.qparams import activation_params
from qcompile.ranges import choose_range
from qcompile.rewrite import Lossy, Promise, Report


def scale_sources(graph: Graph, placement: Placement) -> list[str]:
    """Names of the tensors whose values decide a scale: quantised ones that no shared-scale node computes."""
    ordered = [v for v in graph.values() if v in placement.quantised]
    return [v.name for v in ordered if v.producer is None or not (v.producer in placement.integer and shares_scale(v.producer))]


@dataclass(frozen=True)
class Quantise:
    """Q/DQ insertion; `context.observers` must hold the calibration of `scale_sources`."""

    name: str = "quantise"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a Q/DQ pair. Sets `context.plan` and `context.float_graph`."""
        report = Report()
        if any(n.op == "QuantizeLinear" for n in graph.nodes):
            return report
        graph.infer_shapes()
        placement = place(graph, context.settings)
        for node, reason in placement.refused:
            report.refuse(node.label, reason)
        if not placement.linears:
            raise ModelError(
                "no node can be quantised: there is no Conv or Gemm/MatMul with constant weights (or all are excluded)"
            )
        context.float_graph = graph.copy()
        inserter = Inserter(graph, context, placement)
        report.rewrites = inserter.run()
        context.plan = inserter.plan
        for label, reason in inserter.wider:
            report.refuse(label, reason)
        return report


class Inserter:
    """Puts Q/DQ pairs where `placement` says, and writes down in `plan` what it decided."""

    def __init__(self, graph: Graph, context: Context, placement: Placement) -> None:
        self.graph = graph
        self.context = context
        self.placement = placement
        self.plan = Plan()
        self.pairs = 0
        self.class_of: dict[Tensor, ScaleClass] = {}
        self.integers: dict[Tensor, Value] = {}
        self.dequantised: dict[Tensor, Value] = {}
        self.bounds: dict[Tensor, tuple[float, float]] = {}
        self.ranges_used: set[str] = set()
        self.wider: list[tuple[str, str]] = []  # tensors with more bits than asked for, and why

    def run(self) -> int:
        """Returns the number of pairs."""
        self._fold()
        self._group()
        graph, placement = self.graph, self.placement
        operands = list(self._operands())
        for value in list(graph.inputs):
            if value in placement.quantised:
                self._quantise_float(value)
        linears = set(placement.linears)
        for node in list(graph.nodes):
            if node in placement.integer and (shares_scale(node) or clip_bounds(node) is not None):
                self._move(node)
            elif node in linears or node in placement.integer:
                self._compute(node, linear=node in linears)
            else:
                self._leave(node)
        for node, index in operands:
            node.inputs[index] = self._read(node.inputs[index])
        self._shield()
        graph.cleanup()
        graph.sort()
        return self.pairs

    def _operands(self) -> Iterable[tuple[Node, int]]:
        """(node, input) of what integer kernels besides the linear ones read."""
        return kernel_operands(self.graph, self.context.settings)

    def _fold(self) -> None:
        """Take folded Relu/Clip out; their tensor is then computed by the linear node or Add itself.

        A symmetric range has no lower end to fold a Relu into: there the nodes stay between their producer and its Q.
        """
        if self.context.activations.symmetric:
            return
        for node in [n for n in self.graph.nodes if n in self.placement.folded]:
            bounds = clip_bounds(node)
            assert bounds is not None
            source, output = node.inputs[0], node.outputs[0]
            low, high = self.bounds.pop(source, (-np.inf, np.inf))
            self.bounds[output] = (max(low, bounds[0]), min(high, bounds[1]))
            producer = source.producer
            assert producer is not None
            self.graph.remove(node)
            producer.outputs[0] = output

    def _group(self) -> None:
        """Union of tensors that share a scale; then each class's range."""
        leader: dict[Tensor, Tensor] = {v: v for v in self.graph.values() if v in self.placement.quantised}

        def find(tensor: Tensor) -> Tensor:
            while leader[tensor] is not tensor:
                leader[tensor] = leader[leader[tensor]]
                tensor = leader[tensor]
            return tensor

        for node in self.graph.nodes:
            if node in self.placement.integer and (shares_scale(node) or clip_bounds(node) is not None):
                members = [t for t in [*data_inputs(node), *node.outputs] if t in leader]
                for member in members[1:]:
                    leader[find(member)] = find(members[0])
        by_leader: dict[Tensor, ScaleClass] = {}
        for tensor in leader:
            root = find(tensor)
            if root not in by_leader:
                by_leader[root] = ScaleClass(len(by_leader))
                self.plan.classes.append(by_leader[root])
            by_leader[root].tensors.append(tensor.name)
            self.class_of[tensor] = by_leader[root]
        self.plan.groups = width_groups(self.graph, self.placement, self.class_of)
        self.wider = ActivationWidths(self.context.settings, self.plan.groups).assign()
        for root, place_ in by_leader.items():
            self._range(place_, [t for t in leader if find(t) is root])
        for pattern, low, high in self.context.settings.node_ranges:
            if pattern not in self.ranges_used and not self.context.settings.names_float(pattern):
                raise InputError(f"[nodes] {pattern}: range [{low:g}, {high:g}]: no quantised tensor comes from such a node")

    def _range(self, place_: ScaleClass, members: list[Tensor]) -> None:
        kind = place_.kind(self.context.activations)
        self._choose(place_, members)
        place_.clamped = place_.bits < 8
        place_.scale, place_.zero_point = activation_params(place_.low, place_.high, kind)
        first = min(members, key=lambda t: t.name != place_.tensors[0])
        place_.scale_const = self.graph.constant(first.name + "_scale", np.asarray(place_.scale, np.float32))
        place_.zero_const = self.graph.constant(first.name + "_zero_point", np.asarray(place_.zero_point, kind.dtype))

    def _choose(self, place_: ScaleClass, members: list[Tensor]) -> None:
        """The range of a class, by calibration, and the bounds that it carries."""
        context = self.context
        observers = [context.observers[t.name] for t in members if t.name in context.observers]
        asked = [context.settings.range_for(t.name if t.producer is None else t.producer.name) for t in members]
        wanted = [bounds for bounds in asked if bounds is not None]
        if wanted:
            names = [t.name if t.producer is None else t.producer.name for t in members]
            self.ranges_used |= {p for p, *_ in context.settings.node_ranges if any(matches(n, p) for n in names)}
            place_.low, place_.high, place_.given = *wanted[-1], True
        else:
            place_.low, place_.high = choose_range(observers, context.settings.ranges)
        sources = [t for t in members if t.name in context.observers]
        if sources and all(t in self.bounds for t in sources):
            place_.floor = min(self.bounds[t][0] for t in sources)
            place_.ceiling = max(self.bounds[t][1] for t in sources)
        functions = [r for t in members for r in t.consumers]
        if functions and all(is_op(r, *TABULATED) for r in functions):
            place_.low, place_.high = bent_range(functions, place_.low, place_.high)

    def _shield(self) -> None:
        """Put a copy (Sum of one) behind each float Conv or Gemm that stands between DQ and Q.

        onnxruntime takes DQ -> Conv -> Q for a quantised node whatever its weights are, and would round them, one scale a tensor.
        """
        sites = {site.node for site in self.plan.linears}
        for node in list(self.graph.nodes):
            if node in sites or node.op not in ("Conv", "ConvTranspose", "Gemm") or node.constant(1) is None:
                continue
            source = maker(node.inputs[0])
            output = node.outputs[0]
            readers = {n.op for n in output.consumers}
            if is_op(source, "DequantizeLinear") and readers & {"QuantizeLinear", "Relu", "Clip"}:
                node.outputs[0] = Value(self.graph.fresh_name(output.name + "_unshielded"), output.type)
                self.graph.node("Sum", [node.outputs[0]], [output])

    def _leave(self, node: Node) -> None:
        """A node that stays float, what it computes may be quantised."""
        for output in node.outputs:
            if output in self.placement.quantised:
                self._quantise_float(output)

    def _quantise_float(self, tensor: Value) -> None:
        """Q and DQ for a tensor that stays float for its float readers."""
        place_ = self.class_of[tensor]
        integers = self._q(tensor, place_, tensor.name)
        self.integers[tensor] = self._clamped(integers, tensor, place_) if place_.bits < 8 else integers
        self.dequantised[tensor] = self._dq(tensor, Value(self.graph.fresh_name(tensor.name + "_dequantized")))

    def _q(self, source: Value, place_: ScaleClass, name: str) -> Value:
        self.pairs += 1
        node = self.graph.node(
            "QuantizeLinear", [source, place_.scale_const, place_.zero_const], [name + "_quantized"], name=name + "_q"
        )
        return node.outputs[0]

    def _dq(self, tensor: Tensor, output: Value) -> Value:
        place_ = self.class_of[tensor]
        self.graph.node(
            "DequantizeLinear",
            [self.integers[tensor], place_.scale_const, place_.zero_const],
            [output],
            name=tensor.name + "_dq",
        )
        return output

    def _read(self, tensor: Tensor) -> Value:
        """What an integer compute node reads for `tensor`: its dequantised form."""
        return self.dequantised[tensor]

    def _produced(self, output: Value, integers: Value) -> None:
        """`integers` now hold `output`, which is from here on computed by a DequantizeLinear under its own name."""
        self.integers[output] = integers
        self.dequantised[output] = self._dq(output, output)

    def _compute(self, node: Node, linear: bool) -> None:
        for index in range(1 if linear else len(node.inputs)):
            node.inputs[index] = self._read(node.inputs[index])
        last = node
        while len(last.outputs[0].consumers) == 1 and last.outputs[0].consumers[0] in self.placement.folded:
            last = last.outputs[0].consumers[0]
        output = last.outputs[0]
        integer = output in self.placement.quantised
        if linear:
            self._linear_site(node, self.class_of[output] if integer else None, output.name)
        if not integer:
            return
        place_ = self.class_of[output]
        last.outputs[0] = base = Value(self.graph.fresh_name(output.name + "_float"), output.type)
        result = self._clamped(self._q(base, place_, output.name), output, place_)
        self._produced(output, result)
        if node.op == "Add":
            left, right = (self._class_read(node.inputs[i]) for i in (0, 1))
            self.plan.adds.append(AddSite(node, left, right, place_))
        elif node.op == "GlobalAveragePool":
            area = pool_area(node)
            assert area is not None
            self.plan.pools.append(PoolSite(node, self._class_read(node.inputs[0]), place_, area))

    def _class_read(self, value: Tensor) -> ScaleClass:
        producer = value.producer
        assert producer is not None and producer.op == "DequantizeLinear"
        return next(c for c in self.plan.classes if c.scale_const is producer.inputs[1])

    def _linear_site(self, node: Node, result: ScaleClass | None, output: str) -> None:
        weight = node.constant(1)
        assert weight is not None
        axis = 1 if node.op == "Gemm" and not node.attr("transB", 0) else 0
        channels = weight.dims[axis]
        if node.input(2) is None:
            zero = self.graph.constant(node.label + "_bias", np.zeros(channels, np.float32))
            if len(node.inputs) > 2:
                node.inputs[2] = zero
            else:
                node.inputs.append(zero)
        else:
            bias = node.constant(2)
            assert bias is not None
            flat = np.broadcast_to(bias.array().reshape(-1), (channels,)).astype(np.float32)
            node.inputs[2] = self.graph.constant(node.label + "_bias", flat)  # its own: correction must not touch a shared one
        groups = node.attr("group", 1) if node.op == "Conv" else 1
        depthwise = 1 < groups == weight.dims[0] and weight.dims[1] == 1  # with a channel multiplier kernels add in pairs
        self.plan.linears.append(LinearSite(node, self._class_read(node.inputs[0]), result, axis, depthwise, output=output))

    def _clamped(self, integers: Value, output: Value, place_: ScaleClass) -> Value:
        """A Clip on the integers where the class's range reaches past the tensor's own bounds, or has fewer than 8 bits."""
        low, high = self.bounds.get(output, (-np.inf, np.inf))
        floor, ceiling = place_.floor, place_.ceiling
        if (
            place_.bits == 8
            and (low == -np.inf or (floor is not None and floor >= low))
            and (high == np.inf or (ceiling is not None and ceiling <= high))
        ):
            return integers
        return self._clip(integers, place_, output.name, low, high)

    def _clip(self, integers: Value, place_: ScaleClass, name: str, low: float, high: float) -> Value:
        dtype = self.context.activations.dtype
        bounds = [self.graph.constant(f"{name}_clip_{end}", np.zeros((), dtype)) for end in ("low", "high")]
        node = self.graph.node("Clip", [integers, *bounds], [name + "_clipped"], name=name + "_clip")
        site = ClampSite(node, place_, low, high)
        self.plan.clamps.append(site)
        set_clamp(site, self.context)
        return node.outputs[0]

    def _move(self, node: Node) -> None:
        """Run a shared-scale node (or a Relu/Clip that could not be folded) on the integers."""
        if self.context.settings.target == "tensorrt":
            self._move_between(node)
            return
        bounds = clip_bounds(node)
        if bounds is not None:
            output, source = node.outputs[0], node.inputs[0]
            self.graph.remove(node)
            self._produced(output, self._clip(self.integers[source], self.class_of[output], output.name, *bounds))
            return
        for index in range(len(data_inputs(node))):
            node.inputs[index] = self.integers[node.inputs[index]]
        if node.op == "Pad" and node.attr("mode", "constant") == "constant":
            zero = self.class_of[node.outputs[0]].zero_const
            assert zero is not None
            if len(node.inputs) > 2:
                node.inputs[2] = zero
            else:
                node.inputs.append(zero)
        for index, output in enumerate(list(node.outputs)):
            if not output.name:
                continue
            integers = Value(self.graph.fresh_name(output.name + "_quantized"))
            if output.dims is not None:
                kind = TensorProto.UINT8 if self.context.activations.dtype is np.uint8 else TensorProto.INT8
                integers.type = helper.make_tensor_type_proto(kind, list(output.dims))
            node.outputs[index] = integers
            self._produced(output, integers)

    def _move_between(self, node: Node) -> None:
        """The same between DQ and Q, for runtimes that take integers nowhere else."""
        for index, tensor in enumerate(data_inputs(node)):
            node.inputs[index] = self._read(tensor)
        for index, output in enumerate(list(node.outputs)):
            if not output.name:
                continue
            node.outputs[index] = base = Value(self.graph.fresh_name(output.name + "_float"), output.type)
            self._produced(output, self._q(base, self.class_of[output], output.name))


def set_clamp(site: ClampSite, context: Context) -> None:
    """Write a clamp's integer bounds for its class's present scale."""
    kind = site.place.kind(context.activations)
    for index, bound in ((1, site.floor), (2, site.ceiling)):
        edge = kind.low if index == 1 else kind.high
        value = (
            edge
            if not np.isfinite(bound)
            else int(np.clip(np.rint(bound / float(site.place.scale)) + site.place.zero_point, kind.low, kind.high))
        )
        constant = site.node.constant(index)
        assert constant is not None
        constant.assign(np.asarray(value, kind.dtype))
