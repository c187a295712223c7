"""Which channels may change places: streams of channels that any permutation commutes with.

Where scaling needs positively homogeneous nodes (`_streams`), a permutation only needs nodes that work on each channel for
itself: all activations and depthwise Convs too. Slots are the numbers of a `ChannelStream`; pi moves the channel of slot pi[k]
to slot k. Data movement (Pad, Slice, Concat) names channels by their places, so that pi must map every set of slots that some
tensor holds onto itself. `slot_classes` finds the slots that no tensor tells apart.
"""

from __future__ import annotations

import numpy as np

from qcompile.graph import Array, Graph, Node, Value
from qcompile.passes._linear import linear_at
from qcompile.passes._match import is_op
from qcompile.passes._streams import EXCLUDED, READ, ChannelStream, Numbering

GROUPED = "made by a grouped convolution, each from its own inputs"
_ACTIVATIONS = ("Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Selu", "Sigmoid", "Softplus", "Swish", "Tanh")


def permutable_streams(graph: Graph, excluded: frozenset[Node] = frozenset()) -> list[ChannelStream]:
    """All streams that start at a Conv with constant weights, depthwise ones inside; shapes must have been inferred."""
    graph.sort()
    return _Ordering(graph, excluded).streams()


class _Ordering(Numbering):
    def _visit(self, node: Node) -> None:
        source = node.inputs[0] if node.inputs else None
        if is_op(node, "Conv") and isinstance(source, Value) and source in self.found and _is_depthwise(self.graph, node):
            numbers = self.found[source]
            if node in self.excluded:
                self._refuse(numbers, EXCLUDED)
            self.depthwise[node] = self.found[node.outputs[0]] = self.inner[node] = numbers
            return
        super()._visit(node)
        if node in self.sources and node.attr("group", 1) != 1:
            # Its inputs stand in an order of their own, which its outputs must keep.
            self._refuse(self.sources[node], GROUPED)

    def _sink(self, node: Node, read: list[Value]) -> str:
        return READ if node.op == "Conv" and node.attr("group", 1) != 1 else super()._sink(node, read)

    def _carry(self, node: Node, read: list[Value]) -> Array | str:
        if is_op(node, *_ACTIVATIONS) and read == [node.inputs[0]] and node not in self.excluded and not node.captured:
            return self.found[read[0]]
        return super()._carry(node, read)


def _is_depthwise(graph: Graph, node: Node) -> bool:
    """Whether each output channel reads the input channel of its own number alone."""
    linear, weight = linear_at(graph, node.outputs[0]), node.constant(1)
    return linear is not None and weight is not None and 1 < node.attr("group", 1) == weight.dims[0] and weight.dims[1] == 1


def slot_classes(stream: ChannelStream) -> Array:
    """[slots] numbers of the classes within which slots may be permuted."""
    rows = [*stream.channels.values(), *stream.sources.values(), *stream.sinks.values()]
    held = np.zeros((len(rows), stream.size), bool)
    for row, numbers in zip(held, rows, strict=True):
        row[numbers] = True
    return np.asarray(np.unique(held.T, axis=0, return_inverse=True)[1]).reshape(-1)


def places(numbers: Array, moved: Array) -> Array:
    """For each place of a tensor, the place that its channel stood at before `moved`: slot k now holds what slot moved[k] held.

    A slot that stands at several places (a flattened image) keeps their order.
    """
    order = np.argsort(numbers, kind="stable")
    first = np.searchsorted(numbers[order], np.arange(moved.size))
    copy = np.empty(numbers.size, np.int64)
    copy[order] = np.arange(numbers.size) - first[numbers[order]]
    return np.asarray(order[first[moved[numbers]] + copy])
