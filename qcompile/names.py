"""Short names for what the compiler added: on a small model long ones are a tenth of the file."""

from __future__ import annotations

import string
from collections.abc import Iterator, Set
from itertools import count, product

from onnx import TensorProto

from qcompile.graph import Const, Graph, Tensor, Value

_DIGITS = string.digits + string.ascii_lowercase + string.ascii_uppercase
_SHAPE_BYTES = 128  # of an int64 constant that is a shape, not data
_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Cast", "Clip")


def names_of(graph: Graph) -> frozenset[str]:
    """Every tensor and node name of `graph`: those that its users know."""
    tensors: list[Tensor] = [*graph.values(), *graph.constants.values()]
    return frozenset([*(t.name for t in tensors), *(n.name for n in graph.nodes)])


def shorten_names(graph: Graph, known: Set[str]) -> None:
    """Rename tensors whose names are not `known` to `q0`, `q1` ... in graph order; Q, DQ, Cast and Clip nodes lose theirs.

    Tensors and nodes of the original model keep their names, so that reports and profiles still speak its language; constants
    that hold shapes do not.
    """
    graph.sort()
    fresh = _fresh(known)
    ordered: dict[Tensor, None] = {}
    for node in graph.nodes:
        ordered.update(dict.fromkeys(t for t in [*node.inputs, *node.outputs] if t.name))
    ends: set[Tensor] = {*graph.inputs, *graph.outputs}
    for tensor in ordered:
        if (tensor.name not in known or _is_shape(tensor)) and tensor not in ends:
            tensor.name = next(fresh)
            if isinstance(tensor, Value):
                tensor.info = None
    graph.constants = {c.name: c for c in graph.constants.values() if isinstance(c, Const)}
    for node in graph.nodes:
        if node.op in _PLUMBING and node.name not in known:
            node.name = ""


def _is_shape(tensor: Tensor) -> bool:
    """Whether it is a constant that looks like a shape, a list of axes or the like."""
    return isinstance(tensor, Const) and tensor.elem_type == TensorProto.INT64 and tensor.nbytes <= _SHAPE_BYTES


def _fresh(known: Set[str]) -> Iterator[str]:
    """`q` and one digit of base 62, then two, and so on; names that are taken are left out."""
    for length in count(1):
        yield from (name for digits in product(_DIGITS, repeat=length) if (name := "q" + "".join(digits)) not in known)
