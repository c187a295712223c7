"""Short names for what the compiler added: on a small model long ones are a tenth of the file."""

from __future__ import annotations

from collections.abc import Iterator, Set

from qcompile.graph import Const, Graph, Tensor, Value

_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Cast", "Clip")


def names_of(graph: Graph) -> frozenset[str]:
    """Every tensor and node name of `graph`: those that its users know."""
    tensors: list[Tensor] = [*graph.values(), *graph.constants.values()]
    return frozenset([*(t.name for t in tensors), *(n.name for n in graph.nodes)])


def shorten_names(graph: Graph, known: Set[str]) -> None:
    """Rename tensors whose names are not `known` to `q0`, `q1` ... in graph order; Q, DQ, Cast and Clip nodes lose theirs.

    Tensors and nodes of the original model keep their names, so that reports and profiles still speak its language.
    """
    graph.sort()
    fresh = _fresh(known)
    ordered: dict[Tensor, None] = {}
    for node in graph.nodes:
        ordered.update(dict.fromkeys(t for t in [*node.inputs, *node.outputs] if t.name))
    ends: set[Tensor] = {*graph.inputs, *graph.outputs}
    for tensor in ordered:
        if tensor.name not in known and tensor not in ends:
            tensor.name = next(fresh)
            if isinstance(tensor, Value):
                tensor.info = None
    graph.constants = {c.name: c for c in graph.constants.values() if isinstance(c, Const)}
    for node in graph.nodes:
        if node.op in _PLUMBING and node.name not in known:
            node.name = ""


def _fresh(known: Set[str]) -> Iterator[str]:
    count = 0
    while True:
        name = f"q{count}"
        if name not in known:
            yield name
        count += 1
