"""Put channels side by side whose weights may share a pair: a permutation, exact in every format, that costs nothing at run time.

    W2 f(W1 x + b1)  =  (W2 P^T) f(P W1 x + P b1)        f works on each channel for itself, P a permutation

For `--target any` two neighbouring weights of one sign must not exceed 128 together (the pair rule, `qcompile.qparams`). In the
order in which training left the channels this costs 1 to 2 dB of a layer's weights. Neighbours are chosen by `qcompile.pairing`
for all layers that read the channels together, and the layers that compute them write them in that order; depthwise Convs,
activations, pools, Add, Concat, Pad and Slice in between are followed, constant operands move along.

It must not fire for other targets, nor where no integer layer reads the channels in pairs: below 8 bits no pair exceeds the
limit, depthwise kernels add no pairs, and rows of an odd number of channels pair differently at each tap. Channels
stay where they are when they are an output of the graph or are read by anything that tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Graph, Node
from qcompile.pairing import match_pairs, matching_cost, pair_costs
from qcompile.passes._linear import bias_of, linear_at, weight_of, write
from qcompile.passes._orders import permutable_streams, places, slot_classes
from qcompile.passes._streams import ChannelStream
from qcompile.placement import place
from qcompile.qparams import PAIR_LIMIT
from qcompile.rewrite import Close, Promise, Report


@dataclass(frozen=True)
class PairChannels:
    """Reorders channels where that lowers what the pair rule forbids, `least_gain` of it at least."""

    least_gain: float = 0.01
    name: str = "pair_channels"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a stream. The extremes of `context.observers` follow. Runs once."""
        report = Report()
        settings = context.settings
        if not settings.pair_rule or context.paired or any(n.op == "QuantizeLinear" for n in graph.nodes):
            return report
        context.paired = True
        if settings.blocked:
            report.refuse("all channels", "N:M blocks of weights must stay together")
            return report
        graph.infer_shapes()
        linears = [n for n in place(graph, settings).linears if 2 * settings.top_for(n.name) > PAIR_LIMIT]
        for stream in permutable_streams(graph):
            if stream.refusal:
                report.refuse(next(iter(stream.sources)).label, stream.refusal)
                continue
            moved = _best_order(stream, [n for n in stream.sinks if n in linears], self.least_gain)
            if moved is not None:
                _permute(graph, stream, moved)
                _carry(context, stream, moved)
                report.rewrites += 1
        graph.cleanup()
        return report


def _best_order(stream: ChannelStream, readers: list[Node], least_gain: float) -> Array | None:
    """For each slot the slot whose channel it takes; None where no order is better by `least_gain`."""
    cost = np.zeros((stream.size, stream.size))
    partner = np.full(stream.size, -1)
    for node in readers:
        numbers = stream.sinks[node]
        if numbers.size % 2 or np.unique(numbers).size != numbers.size:
            continue  # pairs straddle taps, or are made of one channel's places
        left, right = numbers[0::2], numbers[1::2]
        for a, b in ((left, right), (right, left)):
            if np.any((partner[a] >= 0) & (partner[a] != b)):
                return None  # two readers pair them differently
            partner[a] = b
        cost[np.ix_(numbers, numbers)] += pair_costs(_rows(node))
    moved = np.arange(stream.size)
    before = after = 0.0
    for slots in _paired_slots(partner, slot_classes(stream)):
        part = cost[np.ix_(slots, slots)]
        order = match_pairs(part)
        moved[slots] = slots[order]
        before += matching_cost(part, np.arange(slots.size))
        after += matching_cost(part, order)
    return moved if after < (1 - least_gain) * before else None


def _paired_slots(partner: Array, classes: Array) -> Iterator[Array]:
    """For each class its slots whose partners are in it too, partners side by side."""
    slots = np.arange(partner.size)
    inside = (partner >= 0) & (classes[partner] == classes)
    firsts = slots[inside & (slots < partner)]
    for number in np.unique(classes[firsts]):
        own = firsts[classes[firsts] == number]
        yield np.stack([own, partner[own]], axis=1).reshape(-1)


def _rows(node: Node) -> Array:
    """Weights of a Conv or Gemm as [outputs, taps, inputs]."""
    constant = node.constant(1)
    assert constant is not None
    weight = constant.array()
    if node.op == "Gemm":
        return (weight if node.attr("transB", 0) else weight.T)[:, None, :]
    return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1, weight.shape[1])


def _permute(graph: Graph, stream: ChannelStream, moved: Array) -> None:
    """Write the new order into all weights, biases and constants. A Conv may be a sink and a source of one stream."""
    for node, numbers in stream.sinks.items():
        linear = linear_at(graph, node.outputs[0])
        assert linear is not None
        axis = 0 if node.op == "Gemm" and not node.attr("transB", 0) else 1
        write(graph, linear, weight_of(linear).take(places(numbers, moved), axis=axis), None)
    for node, numbers in [*stream.sources.items(), *stream.depthwise.items()]:
        linear = linear_at(graph, node.outputs[0])
        assert linear is not None
        order, bias = places(numbers, moved), bias_of(linear) if node.input(2) is not None else None
        write(graph, linear, weight_of(linear).take(order, axis=0), None if bias is None else bias[order])
    for (node, index), numbers in stream.constants.items():
        old = node.constant(index)
        assert old is not None
        values = old.array()
        node.inputs[index] = graph.constant(old.name, values.reshape(-1)[places(numbers, moved)].reshape(values.shape))


def _carry(context: Context, stream: ChannelStream, moved: Array) -> None:
    """Let the extremes of each channel follow."""
    for tensor, numbers in stream.channels.items():
        observer = context.observers.get(tensor.name)
        if observer is not None and observer.lows is not None and observer.highs is not None:
            order = places(numbers, moved)
            if observer.lows.size == order.size:
                observer.lows, observer.highs = observer.lows[order], observer.highs[order]
