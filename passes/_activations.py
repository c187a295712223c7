"""Activations as exporters write them out, as patterns, and `find_silu` for what no operator names below opset 24.

SiLU         x * sigmoid(alpha x)              Elfwing, Uchibe and Doya 2017; with alpha: Hendrycks and Gimpel 2016
HardSigmoid  min(max(x + 3, 0), 6) / 6         Howard et al. 2019 (MobileNetV3), section 5.2
HardSwish    x * HardSigmoid(x)                the same
Mish         x * tanh(log(1 + exp(x)))         Misra 2019, eq. 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose

from onnx import TensorProto

from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.passes._pattern import Match, Pattern, chains, either, nodes_of, number, op, var

_X = var("x")
_SIXTH = number(1 / 6)


def _relu6(p: Pattern) -> Pattern:
    return either(
        op("Clip", p, number(0.0), number(6.0)), op("Min", either(op("Relu", p), op("Max", p, number(0.0))), number(6.0))
    )


def _divided_by_6(p: Pattern) -> Pattern:
    return either(op("Div", p, number(6.0)), op("Mul", p, _SIXTH))


_STEPS = _relu6(op("Add", _X, number(3.0)))
_HALF = op("Add", _divided_by_6(_X), number(0.5))
_WRITTEN_OUT = either(_divided_by_6(_STEPS), op("Clip", _HALF, number(0.0), number(1.0)))
HARD_SIGMOID: tuple[Pattern, ...] = (_WRITTEN_OUT,)
HARD_SWISH: tuple[Pattern, ...] = (
    op("Mul", _X, either(op("HardSigmoid", _X), _WRITTEN_OUT)),
    _divided_by_6(op("Mul", _X, _STEPS)),
    op("Mul", _divided_by_6(_X), _STEPS),
)
MISH: tuple[Pattern, ...] = (op("Mul", _X, op("Tanh", op("Softplus", _X))),)
MISH_BY_LOG: tuple[Pattern, ...] = (op("Mul", _X, op("Tanh", op("Log", op("Add", op("Exp", _X), number(1.0))))),)
SILU: tuple[Pattern, ...] = (
    op("Mul", _X, op("Sigmoid", _X)),
    op("Mul", _X, op("Sigmoid", op("Mul", _X, number("alpha")))),
    op("Div", _X, op("Add", op("Exp", op("Neg", _X)), number(1.0))),
)


@dataclass(frozen=True)
class Silu:
    """output = x * sigmoid(alpha * x), float32, and the nodes that compute it, last first."""

    x: Tensor
    alpha: float
    output: Value
    steps: tuple[Node, ...]


def find_silu(graph: Graph) -> Iterator[Silu]:
    """Every SiLU that is written out in `graph` and whose steps nothing else reads, last first."""
    for found, output in chains(graph, SILU):
        if found.tensors["x"].elem_type == TensorProto.FLOAT:
            yield Silu(found.tensors["x"], found.numbers.get("alpha", 1.0), output, found.steps)


def is_sixth(found: Match) -> bool:
    """Whether every HardSigmoid of the chain is x / 6 + 1/2."""
    return all(
        isclose(n.attr("alpha", 0.2), 1 / 6, rel_tol=2e-4) and n.attr("beta", 0.5) == 0.5 for n in nodes_of(found, "HardSigmoid")
    )
