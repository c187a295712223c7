"""Names GELU: a chain around Erf or Tanh becomes one Gelu (opset 20).

1. x/2 * (1 + erf(x / sqrt 2))                                -> Gelu(x)                       Hendrycks and Gimpel 2016, eq. 1
2. x/2 * (1 + tanh(sqrt(2 / pi) (x + .044715 x^3)))           -> Gelu(x, approximate = tanh)   the same, eq. 2

Recognised by the algebra, not by the order of nodes: what Erf or Tanh reads must be that polynomial in some tensor x, and what
is computed from their output e by Add, Sub, Mul, Div and Pow with numbers must be the polynomial .5 x + .5 x e, whichever way it
is written: (x * (e + 1)) * .5, x * (e * .5 + .5), (.5 x) e + .5 x ...

onnxruntime fuses two orders of form 1 itself and gains nothing by this (MiniLM, vit_mnist: ratio 1.00); it knows no other
order and none of form 2. Measured with onnxruntime 1.32 on one thread, [128, 1536], ms: the orders it knows .081, the others
.138-.162, form 2 .186-.207; Gelu .079, with tanh .075. Every other runtime sees one operator, and integer kernels
find it by name.

It must not fire below opset 20, on other types than float32, where the constants differ by more than 2e-4, or where a step in
between is read elsewhere too or is an output of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isclose, pi, sqrt

from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.passes._match import is_op, scalar_of, single_consumer, visit
from qcompile.rewrite import Close, Promise, Report

Polynomial = dict[tuple[int, int], float]  # {(power of x, power of e): coefficient}
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow")
_INNER: dict[str, Polynomial] = {
    "Erf": {(1, 0): 1 / sqrt(2)},
    "Tanh": {(1, 0): sqrt(2 / pi), (3, 0): 0.044715 * sqrt(2 / pi)},
}
_GELU: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_TOLERANCE = 2e-4  # constants of half-precision models are this far off
_DEPTH = 8  # the longest chain known has six nodes on either side


@dataclass(frozen=True)
class FuseGelu:
    """Replace the arithmetic of GELU by the operator."""

    name: str = "fuse_gelu"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a GELU."""
        graph.infer_shapes()
        return visit(graph, ("Erf", "Tanh"), _fuse)


def _fuse(graph: Graph, node: Node) -> str | None:
    """None where rewritten, an empty text where Erf or Tanh is part of something else, else the reason for leaving it."""
    x = _argument(node)
    if x is None:
        return ""
    chain = _chain(graph, node, x)
    if chain is None:
        return "a step of it is read elsewhere, or its constants are not those of GELU"
    if (graph.opset() or 0) < 20:
        return "opset below 20 has no Gelu"
    if x.elem_type != TensorProto.FLOAT:
        return "not float32"
    output, approximate = chain[-1].outputs[0], "none" if node.op == "Erf" else "tanh"
    name = chain[-1].name
    for step in chain:
        graph.remove(step)
    graph.node("Gelu", [x], [output], name=name or None, approximate=approximate)
    return None


def _argument(node: Node) -> Value | None:
    """The x of which `node` reads the polynomial that its kind of GELU has."""
    for candidate in _operands(node.inputs[0], _DEPTH):
        if _equal(_polynomial(node.inputs[0], candidate, None, _DEPTH), _INNER[node.op]):
            return candidate
    return None


def _operands(tensor: Tensor, depth: int) -> Iterator[Value]:
    """Every tensor that arithmetic below `tensor` reads."""
    node = tensor.producer
    if depth == 0 or node is None or not is_op(node, *_ARITHMETIC):
        return
    for operand in node.inputs:
        if isinstance(operand, Value):
            yield operand
            yield from _operands(operand, depth - 1)


def _chain(graph: Graph, node: Node, x: Value) -> list[Node] | None:
    """`node` and the steps behind it that only serve GELU, up to the one that computes it; None where none does."""
    steps = [node]
    while len(steps) <= _DEPTH:
        follower = _follower(graph, steps[-1].outputs[0], steps)
        if follower is None:
            return None
        steps.append(follower)
        if _equal(_polynomial(follower.outputs[0], x, node.outputs[0], _DEPTH), _GELU):
            return steps
    return None


def _follower(graph: Graph, tensor: Value, steps: list[Node]) -> Node | None:
    follower = single_consumer(graph, tensor)
    return follower if is_op(follower, *_ARITHMETIC) and follower not in steps else None


def _polynomial(tensor: Tensor | None, x: Value, e: Value | None, depth: int) -> Polynomial | None:
    """`tensor` as a polynomial in `x` and `e`, None where it is something else."""
    if tensor is x:
        return {(1, 0): 1.0}
    if tensor is not None and tensor is e:
        return {(0, 1): 1.0}
    number = scalar_of(tensor)
    if number is not None:
        return {(0, 0): number}
    node = tensor.producer if tensor is not None else None
    if node is None or depth == 0 or not is_op(node, *_ARITHMETIC):
        return None
    left, right = (_polynomial(node.input(i), x, e, depth - 1) for i in (0, 1))
    if left is None or right is None:
        return None
    return _combined(node.op, left, right)


def _combined(op: str, left: Polynomial, right: Polynomial) -> Polynomial | None:
    if op in ("Add", "Sub"):
        sign = 1 if op == "Add" else -1
        return {k: left.get(k, 0.0) + sign * right.get(k, 0.0) for k in left.keys() | right.keys()}
    number = right.get((0, 0), 0.0) if set(right) == {(0, 0)} else None
    if op == "Div":
        return {k: v / number for k, v in left.items()} if number else None
    if op == "Pow":
        if number not in (2.0, 3.0):
            return None
        square = _product(left, left)
        return square if number == 2.0 else _product(square, left)
    return _product(left, right)


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for (a, b), v in left.items():
        for (c, d), w in right.items():
            result[(a + c, b + d)] = result.get((a + c, b + d), 0.0) + v * w
    return result


def _equal(found: Polynomial | None, wanted: Polynomial) -> bool:
    if found is None:
        return False
    powers = found.keys() | wanted.keys()
    return all(isclose(found.get(k, 0.0), wanted.get(k, 0.0), rel_tol=_TOLERANCE, abs_tol=1e-9) for k in powers)
