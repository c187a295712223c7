"""Which nodes of two models are the same one: along the graph from the inputs on, then by name.

A node is matched where it reads the counterpart of a matched tensor at the same place and has the same operator; quantisation may
stand in between in one model and not in the other. What is left is matched by a common, unique name and operator.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.graph import Graph, Node, Tensor, Value

QUANTISING = ("QuantizeLinear", "DequantizeLinear")


class Matching:
    """`nodes`: node of `first` -> node of `second`; `tensors`: the same of what they compute, graph inputs included."""

    def __init__(self, first: Graph, second: Graph) -> None:
        first.sort()
        second.sort()
        self.nodes: dict[Node, Node] = {}
        self.tensors: dict[Tensor, Tensor] = {}
        self._taken: set[Node] = set()
        by_name = {v.name: v for v in second.inputs}
        for index, value in enumerate(first.inputs):
            other = by_name.get(value.name, second.inputs[index] if index < len(second.inputs) else None)
            if other is not None:
                self.tensors[value] = other
        named = _unique_names(second)
        for node in first.nodes:
            other_node = self._along(node) or self._named(node, named)
            if other_node is not None:
                self._match(node, other_node)

    def _along(self, node: Node) -> Node | None:
        """The node that reads the counterpart of an input of `node`, at the same place, directly or behind Q and DQ."""
        for index, tensor in enumerate(node.inputs):
            for source in _without_quantisation(tensor):
                if source not in self.tensors:
                    continue
                for deep in (False, True):
                    for reader, place in _readers(self.tensors[source], deep):
                        if reader.op == node.op and place == index and reader not in self._taken:
                            return reader
        return None

    def _named(self, node: Node, named: dict[str, Node]) -> Node | None:
        other = named.get(node.name)
        return other if other is not None and other.op == node.op and other not in self._taken else None

    def _match(self, node: Node, other: Node) -> None:
        """Match the two, their outputs, and what computes their inputs from constants alone (weights behind DequantizeLinear)."""
        self.nodes[node] = other
        self._taken.add(other)
        for ours, theirs in zip(node.outputs, other.outputs, strict=False):
            self.tensors[ours] = theirs
        for ours_in, theirs_in in zip(node.inputs, other.inputs, strict=False):
            before, there = ours_in.producer, theirs_in.producer
            if before is not None and there is not None and before not in self.nodes and there not in self._taken:
                constant = not any(isinstance(t, Value) and t.name for t in before.inputs)
                if constant and before.op == there.op:
                    self._match(before, there)


def _unique_names(graph: Graph) -> dict[str, Node]:
    found: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.name:
            found[node.name] = None if node.name in found else node
    return {name: node for name, node in found.items() if node is not None}


def _without_quantisation(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, then what is before the quantisation that it comes from."""
    yield tensor
    node = tensor.producer
    while node is not None and node.op in QUANTISING:
        yield node.inputs[0]
        node = node.inputs[0].producer


def _readers(tensor: Tensor, deep: bool) -> Iterator[tuple[Node, int]]:
    """(node, place) of each reader, with `deep` only those behind Q and DQ."""
    for node in tensor.consumers:
        if not deep:
            yield from ((node, i) for i, t in enumerate(node.inputs) if t is tensor)
        elif node.op in QUANTISING and node.inputs[0] is tensor:
            yield from _readers(node.outputs[0], False)
            yield from _readers(node.outputs[0], True)
