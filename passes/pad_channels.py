"""Zero channels up to the width that onnxruntime's fast int8 convolutions want: C -> C', a multiple of 16 or of 4.

    Conv [C, ..] -> Relu -> depthwise [C, 1, 3, 3] -> Relu -> Conv [M, C, 1, 1]
    Conv [C', ..] -> Relu -> depthwise [C', 1, 3, 3] -> Relu -> Conv [M, C', 1, 1]

The weights and the bias of a new channel are zero, and so is whatever reads it: every sum gains zeros only.

1. Depthwise with C not a multiple of 16: everything that shares its channels is widened, from the Convs that compute them to the
   Convs that read them, through activations, pools, Add, Sub and Mul (squeeze-and-excitation too).
2. Conv over several positions with C not a multiple of 4: the same; where the channels are those of a graph input, a Pad is put
   in front.

Why: onnxruntime's kernels for symmetric int8 weights take input channels in fours, its depthwise kernel in sixteens; other widths
go through im2col or a scalar tail. Measured with onnxruntime 1.32 on one thread (AVX512-VNNI), ms: depthwise 3x3 on 112 x 112,
24 channels .262, 32 channels .133 (20: .386, 100: .952, 112: .283), 1x1 - depthwise - 1x1 with 72 channels .213, with 80 .122;
first Conv 224 x 224 x 3 -> 32, stride 2: .240, with 4 channels .121 (-> 64: .304 / .152), the Pad .005.
Whole int8 models against the same without this pass: mobilenet_v1 ratio .84, squeezenet .86, mobilenet_v2 .91, resnet20 .96.
It must not fire where the channels reach an output of the graph, a Concat, Reshape, Gemm or anything else that has no zero to
skip, where weights are computed at run time, where the wider sum costs more than it gains (see `_pays`),
nor for `--target tensorrt`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from qcompile.context import Context
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.passes._match import FLOATS, is_op
from qcompile.rewrite import Close, Promise, Report

_DEPTHWISE, _DENSE = 16, 4
_ACTIVATIONS = frozenset(
    ["Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu", "Sigmoid", "Swish", "Tanh"]
)
_POOLS = frozenset(["AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool"])
_BINARY = frozenset(["Add", "Sub", "Mul"])
_READ = "its channels are read by an operator that has no zero to skip"
_MADE = "its channels come from an operator that cannot add zeros"


@dataclass(frozen=True)
class PadChannels:
    """Widen convolutions by zero channels where the wider kernel is the faster one.

    dense: also for what dense convolutions read; else for depthwise ones alone.
    """

    dense: bool = True
    name: str = "pad_channels"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a set of channels that was widened."""
        report = Report()
        if context.settings.target in ("tensorrt", "wasm"):  # the widths were measured on x86
            return report
        graph.infer_shapes()
        padded: dict[Value, Value] = {}
        convs = [
            n for n in graph.nodes if _is_conv(n) and (self.dense or _is_depthwise(n)) and not context.settings.excluded(n.name)
        ]
        for node in sorted(convs, key=lambda n: not _is_depthwise(n)):
            source, depthwise = node.inputs[0], _is_depthwise(node)
            channels = _weight_dims(node)[0 if depthwise else 1]
            wide = -(-channels // (_DEPTHWISE if depthwise else _DENSE)) * (_DEPTHWISE if depthwise else _DENSE)
            if wide == channels or not (depthwise or _pays(node, wide / channels)) or not isinstance(source, Value):
                continue
            if not depthwise and source.producer is None and any(v is source for v in graph.inputs):
                _pad_input(graph, node, source, wide - channels, padded)
                report.rewrites += 1
                continue
            region = _Region(graph, channels)
            reason = region.grow(source)
            if reason is None:
                region.widen(wide)
                report.rewrites += 1
            else:
                report.refuse(node.label, reason)
        graph.cleanup()
        return report


def _is_conv(node: Node) -> bool:
    """Two-dimensional, with constant float weights; dense or depthwise with one output a channel."""
    if not is_op(node, "Conv"):
        return False
    weight = node.constant(1)
    if weight is None or weight.elem_type not in FLOATS or len(weight.dims) != 4:
        return False
    return (node.input(2) is None or node.constant(2) is not None) and (node.attr("group", 1) == 1 or _is_depthwise(node))


def _is_depthwise(node: Node) -> bool:
    dims = _weight_dims(node) if is_op(node, "Conv") else ()
    return len(dims) > 2 and 1 < node.attr("group", 1) == dims[0] and dims[1] == 1


def _weight_dims(node: Node) -> tuple[int, ...]:
    """[outputs, inputs a group, height, width] of a Conv's constant weights, empty where they are computed."""
    weight = node.constant(1)
    return () if weight is None else weight.dims


def _pays(node: Node, growth: float) -> bool:
    """Whether a dense Conv gains by `growth` times the input channels: twice as fast for small kernels."""
    outputs, _, *kernel = _weight_dims(node)
    area = prod(kernel)
    if area == 1 or outputs < 16:
        return False
    return area <= 9 or (area <= 25 and growth <= 1.6) or (area <= 49 and growth <= 4 / 3 and outputs >= 32)


def _pad_input(graph: Graph, node: Node, source: Value, extra: int, padded: dict[Value, Value]) -> None:
    """Let `node` read `source`, an input of the graph, with `extra` zero channels behind its own."""
    if source not in padded:
        ends = graph.constant(source.name + "_pads", np.array([0, 0, 0, 0, 0, extra, 0, 0], np.int64))
        padded[source] = graph.node("Pad", [source, ends], [source.name + "_padded"], mode="constant").outputs[0]
        padded[source].type = source.type
        _set_channels(padded[source], _weight_dims(node)[1] + extra)
    node.inputs[0] = padded[source]
    _widen_constant(graph, node, 1, 1, extra)


@dataclass
class _Region:
    """All tensors that share one axis of `channels`, and the nodes at its ends and inside."""

    graph: Graph
    channels: int
    tensors: dict[Value, None] = field(default_factory=dict)
    sources: dict[Node, None] = field(default_factory=dict)
    sinks: dict[Node, None] = field(default_factory=dict)
    depthwise: dict[Node, None] = field(default_factory=dict)
    constants: dict[tuple[Node, int], int] = field(default_factory=dict)  # -> the axis of the channels

    def grow(self, seed: Value) -> str | None:
        """Follow the channels of `seed` both ways; the reason where they lead to something that cannot be widened."""
        stack = [seed]
        while stack:
            tensor = stack.pop()
            if tensor in self.tensors:
                continue
            self.tensors[tensor] = None
            if self.graph.is_pinned(tensor):
                return "its channels are an output of the graph"
            found = self._producer(tensor)
            if found is None:
                return _MADE
            stack += found
            for node in tensor.consumers:
                found = self._consumer(node)
                if found is None:
                    return _READ
                stack += found
        return None

    def _producer(self, tensor: Value) -> list[Value] | None:
        node = tensor.producer
        if node is None:
            return None
        if _is_conv(node) and not _is_depthwise(node):
            self.sources[node] = None
            return [] if _weight_dims(node)[0] == self.channels else None
        return self._through(node)

    def _consumer(self, node: Node) -> list[Value] | None:
        if _is_conv(node) and not _is_depthwise(node):
            self.sinks[node] = None
            return [] if _weight_dims(node)[1] == self.channels else None
        return self._through(node)

    def _through(self, node: Node) -> list[Value] | None:
        """The data inputs and the output of a node that works on each channel for itself; None for any other."""
        if _is_conv(node) and _is_depthwise(node):
            self.depthwise[node] = None
            return _values([node.inputs[0], node.outputs[0]])
        if is_op(node, *_ACTIVATIONS, *_POOLS) and len(node.outputs) == 1:
            return _values([node.inputs[0], node.outputs[0]])
        if not is_op(node, *_BINARY):
            return None
        rank = len(node.outputs[0].dims or ())
        reached: list[Tensor] = [node.outputs[0]]
        for index, operand in enumerate(node.inputs):
            dims = operand.dims
            if dims is None or len(dims) > rank or rank < 2:
                return None
            axis = len(dims) - rank + 1  # of the channels, negative where the operand has none
            if axis < 0 or dims[axis] == 1:
                continue
            if dims[axis] != self.channels:
                return None
            if isinstance(operand, Const):
                self.constants[(node, index)] = axis
            else:
                reached.append(operand)
        return _values(reached)

    def widen(self, channels: int) -> None:
        """Append zeros to all weights, biases and constants, and write the new number of channels into types."""
        extra = channels - self.channels
        for node in self.sources | self.depthwise:
            _widen_constant(self.graph, node, 1, 0, extra)
            if node.input(2) is not None:
                _widen_constant(self.graph, node, 2, 0, extra)
        for node in self.depthwise:
            node.set_attr("group", channels)
        for node in self.sinks:
            _widen_constant(self.graph, node, 1, 1, extra)
        for (node, index), axis in self.constants.items():
            _widen_constant(self.graph, node, index, axis, extra)
        for tensor in self.tensors:
            _set_channels(tensor, channels)


def _values(tensors: list[Tensor]) -> list[Value] | None:
    """The tensors where all are computed, else None."""
    values = [t for t in tensors if isinstance(t, Value)]
    return values if len(values) == len(tensors) else None


def _widen_constant(graph: Graph, node: Node, index: int, axis: int, extra: int) -> None:
    """Give `node` its own copy of constant input `index`, with `extra` zeros at the end of `axis`."""
    old = node.constant(index)
    if old is None:
        raise TypeError(f"{node.label}: input {index} is not constant")
    values = old.array()
    node.inputs[index] = graph.constant(old.name, np.pad(values, [(0, extra * (a == axis)) for a in range(values.ndim)]))


def _set_channels(tensor: Value, channels: int) -> None:
    if tensor.type is None or not tensor.type.tensor_type.HasField("shape") or len(tensor.type.tensor_type.shape.dim) < 2:
        return
    kind = type(tensor.type)()
    kind.CopyFrom(tensor.type)
    kind.tensor_type.shape.dim[1].dim_value = channels
    tensor.type = kind
