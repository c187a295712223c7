"""The float64 function that a node computes, for tables and for ranges."""

from __future__ import annotations

from qcompile.graph import Node
from qcompile.kernels._functions import FUNCTIONS, Function, named

#: Attributes of ONNX operators that their functions take.
_ATTRIBUTES = {"Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}
_NAMES = {"Swish": "Silu"}


def function_of(node: Node) -> Function | None:
    """The function of one tensor, attributes set; None where none is known."""
    name = _NAMES.get(node.op, node.op)
    if node.op == "Gelu" and node.attr("approximate", "none") == "tanh":
        name = "GeluTanh"
    if name not in FUNCTIONS or (node.op == "Swish" and node.attr("alpha", 1.0) != 1.0):
        return None
    given = {key: float(node.attr(key)) for key in _ATTRIBUTES.get(node.op, ()) if node.attr(key) is not None}
    return named(name, **given)
