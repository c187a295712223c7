"""Channels that must be scaled together: what joins the outputs of some Convs to the inputs of others.

    Conv -> Relu -> Conv            Conv -> Add -> Add -> Conv (a residual stream)         Conv, Conv -> Concat -> MaxPool -> Conv
                                    Conv --^     Conv --^

Channel k of a Conv's output can be divided by any s[k] > 0 when what reads it is multiplied by s[k], as long as every node in
between is positively homogeneous and mixes no two channels. An Add ties channel k of one operand to channel k of the other; a
Concat puts the channels of several tensors into one, which has one quantisation scale; a Pad of channels adds some that are zero,
tied to nothing. Channels stand in axis 1 (for attention heads and other layouts of the last axis see `_channels`). They are
numbered in one pass over the graph; ties are resolved afterwards: connected components, once for channels, once for tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from qcompile.graph import Array, Graph, Node, Value
from qcompile.passes._linear import bias_of, linear_at
from qcompile.passes._match import array_of, ints_of, is_op, scalar_of, split_operands

_SAME = ("Identity", "Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_SHIFTING = ("Identity", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "Add", "Sub", "Flatten", "Reshape", "Slice")

READ = "read by an operator that is not homogeneous"
BOUNDED = "bounded by a Clip, which is not homogeneous"
OUTPUT = "its channels are an output of the graph"
EXCLUDED = "a node of the stream is excluded"
RUN_TIME = "read by weights that are computed at run time"
JOINED = "joined with channels that no Conv with constant weights computes"


@dataclass
class ChannelStream:
    """Tensors tied by their channels; all arrays hold channel numbers, 0 to `size` - 1.

    channels: of axis 1 of each tensor. sources: of the output channels of each Conv. sinks: of what each Conv or Gemm reads,
    one a channel or column. constants: of the channels of a constant operand (node, input), which scales with them. depthwise:
    of depthwise Convs on the way (in `_orders` alone; else they end a stream). nodes: all that is in between, in graph order.
    refusal: why the channels cannot be scaled, "" where they can.
    """

    size: int
    channels: dict[Value, Array] = field(default_factory=dict)
    sources: dict[Node, Array] = field(default_factory=dict)
    sinks: dict[Node, Array] = field(default_factory=dict)
    constants: dict[tuple[Node, int], Array] = field(default_factory=dict)
    depthwise: dict[Node, Array] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    refusal: str = ""

    def shifts(self) -> dict[Value, Array] | None:
        """How far each tensor moves where source i is moved by 1 along its channels: coefficients [sources].

        None where a shift would not come out at the sinks as a constant: behind Relu, or where a sink pads with zeros.
        """
        if any(not is_op(n, *_SHIFTING) for n in self.nodes) or any(_pads(n) for n in self.sinks):
            return None
        found: dict[Value, Array] = {}
        for index, node in enumerate(self.sources):
            found[node.outputs[0]] = np.eye(len(self.sources))[index]
        for node in self.nodes:
            parts = [found[t] for t in node.inputs if isinstance(t, Value) and t in found]
            sign = -1.0 if node.op == "Sub" else 1.0
            if len(parts) == 2:
                found[node.outputs[0]] = parts[0] + sign * parts[1]
            else:  # constant - x turns the sign around
                found[node.outputs[0]] = parts[0] * (1.0 if node.inputs[0] in found else sign)
        return found


def channel_streams(graph: Graph, excluded: frozenset[Node]) -> list[ChannelStream]:
    """All streams that start at a Conv with constant weights, in graph order; shapes must have been inferred."""
    graph.sort()
    return Numbering(graph, excluded).streams()


class Numbering:
    """Gives each channel of each tensor its number, and ties what must change together."""

    def __init__(self, graph: Graph, excluded: frozenset[Node]) -> None:
        self.graph = graph
        self.excluded = excluded
        self.count = 0
        self.found: dict[Value, Array] = {}
        self.sources: dict[Node, Array] = {}
        self.sinks: dict[Node, Array] = {}
        self.constants: dict[tuple[Node, int], Array] = {}
        self.inner: dict[Node, Array] = {}
        self.depthwise: dict[Node, Array] = {}
        self.ties: list[tuple[Array, Array]] = []
        self.refusals: list[tuple[int, str]] = []

    def streams(self) -> list[ChannelStream]:
        """Number, resolve the ties, and split by what shares a tensor."""
        for node in self.graph.nodes:
            self._visit(node)
        for tensor, numbers in self.found.items():
            if self.graph.is_pinned(tensor):
                self._refuse(numbers, OUTPUT)
        channel = components(self.count, self.ties)
        groups = components(self.count, [*self.ties, *((n[:-1], n[1:]) for n in self.found.values())])
        streams: dict[int, ChannelStream] = {}
        local = np.zeros(self.count, np.int64)
        for first in dict.fromkeys(int(groups[n[0]]) for n in self.sources.values()):
            members = np.flatnonzero(groups == first)
            distinct, local[members] = np.unique(channel[members], return_inverse=True)
            streams[first] = ChannelStream(distinct.size)
        for tensor, numbers in self.found.items():
            streams[int(groups[numbers[0]])].channels[tensor] = local[numbers]
        for node, numbers in self.sources.items():
            streams[int(groups[numbers[0]])].sources[node] = local[numbers]
        for node, numbers in self.sinks.items():
            streams[int(groups[numbers[0]])].sinks[node] = local[numbers]
        for place, numbers in self.constants.items():
            streams[int(groups[numbers[0]])].constants[place] = local[numbers]
        for node, numbers in self.depthwise.items():
            streams[int(groups[numbers[0]])].depthwise[node] = local[numbers]
        for node, numbers in self.inner.items():
            streams[int(groups[numbers[0]])].nodes.append(node)
        for number, reason in self.refusals:
            stream = streams[int(groups[number])]
            stream.refusal = stream.refusal or reason
        return list(streams.values())

    def _refuse(self, numbers: Array, reason: str) -> None:
        self.refusals.append((int(numbers[0]), reason))

    def _fresh(self, size: int) -> Array:
        self.count += size
        return np.arange(self.count - size, self.count)

    def _visit(self, node: Node) -> None:
        read = [t for t in dict.fromkeys([*node.inputs, *node.captured]) if isinstance(t, Value) and t in self.found]
        linear = linear_at(self.graph, node.outputs[0]) if is_op(node, "Conv", "Gemm") else None
        if linear is not None and read and (reason := self._sink(node, read)):
            for tensor in read:
                self._refuse(self.found[tensor], reason)
        if linear is not None and node.op == "Conv":
            self.sources[node] = self.found[node.outputs[0]] = self._fresh(linear.channels)
            if node in self.excluded:
                self._refuse(self.sources[node], EXCLUDED)
        if linear is not None or not read:
            return
        made = self._carry(node, read)
        if isinstance(made, str):
            for tensor in read:
                self._refuse(self.found[tensor], made)
        else:
            self.found[node.outputs[0]] = self.inner[node] = made

    def _sink(self, node: Node, read: list[Value]) -> str:
        """Note what a Conv or Gemm with constant weights reads; a reason where its weights cannot follow."""
        if node in self.excluded:
            return EXCLUDED
        if read != [node.inputs[0]] or (node.op == "Gemm" and node.attr("transA", 0)):
            return READ
        numbers = self.found[read[0]]
        linear = linear_at(self.graph, node.outputs[0])
        if linear is None or bias_of(linear) is None:
            return READ
        self.sinks[node] = numbers
        return ""

    def _carry(self, node: Node, read: list[Value]) -> Array | str:
        """Channel numbers of the node's output; a reason where it is not homogeneous, or mixes channels."""
        if node.op == "Clip":
            return BOUNDED
        if node in self.excluded:
            return EXCLUDED
        if is_op(node, "Conv", "Gemm", "ConvTranspose", "MatMul"):
            return RUN_TIME if node.constant(1) is None else READ
        if node.captured or len(node.outputs) != 1:
            return READ
        if is_op(node, *_SAME):
            return self.found[read[0]]
        if is_op(node, "Add", "Sub", "Mul", "Div"):
            return self._combine(node, read)
        if is_op(node, "Concat"):
            return self._concatenate(node)
        if read != [node.inputs[0]]:
            return READ
        if is_op(node, "Flatten", "Reshape"):
            return self._flatten(node, read[0])
        if is_op(node, "Slice"):
            return self._slice(node, read[0])
        return self._pad(node, read[0]) if is_op(node, "Pad") else READ

    def _combine(self, node: Node, read: list[Value]) -> Array | str:
        operands = split_operands(node)
        if node.op in ("Mul", "Div"):
            if operands is None or (node.op == "Div" and operands[0] is not node.inputs[0]):
                return READ
            factor, fits = scalar_of(operands[1]), len(operands[1].dims) <= len(operands[0].dims or ())
            return self.found[read[0]] if fits and factor is not None and np.isfinite(factor) and factor != 0 else READ
        if operands is not None:
            numbers, index = self.found[read[0]], 1 if operands[1] is node.inputs[1] else 0
            rank, dims = len(operands[0].dims or ()), operands[1].dims
            one_a_channel = all(d == (numbers.size if i == 1 else 1) for i, d in enumerate((1,) * (rank - len(dims)) + dims))
            if rank < 2 or len(dims) > rank or not one_a_channel:
                return READ
            self.constants[(node, index)] = numbers
            return numbers
        if any(t not in self.found for t in node.inputs[:2]):
            return JOINED
        left, right = (self.found[t] for t in node.inputs[:2] if isinstance(t, Value))
        ranks = {len(t.dims or ()) for t in node.inputs[:2]}
        if left.size != right.size or len(ranks) != 1:
            return READ
        self.ties.append((left, right))
        return left

    def _concatenate(self, node: Node) -> Array | str:
        rank = len(node.inputs[0].dims or ())
        if rank < 2 or node.attr("axis") not in (1, 1 - rank):
            return READ
        parts = [self.found[t] for t in node.inputs if isinstance(t, Value) and t in self.found]
        return np.concatenate(parts) if len(parts) == len(node.inputs) else JOINED

    def _flatten(self, node: Node, source: Value) -> Array | str:
        """[N, C, H, W] -> [N, C * H * W]: rows stay rows, and each channel becomes H * W columns."""
        before, after = source.dims, node.outputs[0].dims
        if before is None or after is None or len(after) != 2:
            return READ
        positions = [d for d in before[2:] if isinstance(d, int)]
        numbers = self.found[source]
        if len(positions) != len(before) - 2 or after[1] != numbers.size * prod(positions):
            return READ
        return np.repeat(numbers, prod(positions))

    def _slice(self, node: Node, source: Value) -> Array | str:
        starts, ends, axes, steps = (ints_of(node, n, i) for i, n in enumerate(("starts", "ends", "axes", "steps"), 1))
        rank = len(source.dims or ())
        if starts is None or ends is None or (node.input(3) is not None and axes is None) or rank < 2:
            return READ
        axes = [a % rank for a in axes or range(len(starts))]
        if 1 not in axes:
            return self.found[source]
        if node.input(4) is not None and steps is None:
            return READ
        place = axes.index(1)
        kept = self.found[source][starts[place] : ends[place] : (steps or [1] * len(starts))[place]]
        return kept if kept.size else READ

    def _pad(self, node: Node, source: Value) -> Array | str:
        """Zeros around an image keep its channels; zero channels are new and tied to nothing."""
        pads, value = ints_of(node, "pads", 1), array_of(node, 2)
        rank = len(source.dims or ())
        unknown = (node.input(2) is not None and value is None) or node.input(3) is not None
        if pads is None or unknown or len(pads) != 2 * rank or node.attr("mode", "constant") != "constant":
            return READ
        if (value is not None and np.any(value)) or min(pads[1], pads[rank + 1]) < 0:
            return READ
        return np.concatenate([self._fresh(pads[1]), self.found[source], self._fresh(pads[rank + 1])])


def components(count: int, edges: list[tuple[Array, Array]]) -> Array:
    """The least member of the connected component of each of `count` numbers, where edges tie a[i] to b[i]."""
    label = np.arange(count)
    if not edges:
        return label
    left, right = (np.concatenate(side) for side in zip(*edges, strict=True))
    while True:
        least = np.minimum(label[left], label[right])
        following = label.copy()
        np.minimum.at(following, label[left], least)
        np.minimum.at(following, label[right], least)
        following = following[following]
        if np.array_equal(following, label):
            return label
        label = following


def _pads(node: Node) -> bool:
    """Whether a Conv reads zeros around its image."""
    padded = any(node.attr("pads", [])) or node.attr("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    return node.op == "Conv" and padded
