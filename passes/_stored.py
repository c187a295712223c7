"""The constants of a linear node's quantised inputs, as they stand in the Q/DQ graph."""

from __future__ import annotations

from qcompile.errors import PassError
from qcompile.graph import Const, Node


def stored_integers(node: Node, index: int) -> Const:
    """The integers that the DequantizeLinear at input `index` reads. Raises PassError where there is no such constant."""
    return _behind(node, index, 0)


def stored_scale(node: Node, index: int) -> Const:
    """The scale of the DequantizeLinear at input `index`. Raises PassError where there is no such constant."""
    return _behind(node, index, 1)


def _behind(node: Node, index: int, place: int) -> Const:
    producer = node.inputs[index].producer
    constant = producer.constant(place) if producer is not None else None
    if constant is None:
        raise PassError(f"node '{node.label}': input {index} is not a dequantised constant")
    return constant
