"""LayerNormalization and RMSNormalization as exporters write them out, as patterns.

    LayerNorm   (x - E[x]) / sqrt(E[(x - E[x])^2] + epsilon) * gamma + beta         Ba, Kiros and Hinton 2016
    RMSNorm      x         / sqrt(E[x^2] + epsilon) * gamma                         Zhang and Sennrich 2019, eq. 4

The root is Sqrt or Pow(.5) with Div, or Reciprocal, 1 / Sqrt, or Pow(-.5) with Mul; the square Pow(2) or a product; gamma may
stand before or behind the division or beside the root, or be missing, and so may beta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._match import ints_of
from qcompile.passes._pattern import NOT_FLOAT, Match, Pattern, chains, const, either, nodes_of, number, op, var

AXIS = "not along the last axis"
EPSILON = "epsilon is not a positive number"
CHANNELS = "a constant is not one number a channel"
SIZE = "the size of the last axis is unknown"

_X, _GAMMA, _BETA = var("x"), const("gamma"), const("beta")


def _square(p: Pattern) -> Pattern:
    return either(op("Mul", p, p), op("Pow", p, number(2.0)))


def _root(p: Pattern) -> Pattern:
    return either(op("Sqrt", p), op("Pow", p, number(0.5)))


def _inverse_root(p: Pattern) -> Pattern:
    return either(op("Reciprocal", _root(p)), op("Div", number(1.0), _root(p)), op("Pow", p, number(-0.5)))


def _normalised(p: Pattern, power: Pattern) -> Pattern:
    return either(op("Div", p, _root(power)), op("Mul", p, _inverse_root(power)))


def _scaled(p: Pattern, power: Pattern) -> Pattern:
    """With gamma, wherever it stands."""
    return either(
        op("Mul", _normalised(p, power), _GAMMA),
        _normalised(op("Mul", p, _GAMMA), power),
        op("Mul", p, op("Mul", _inverse_root(power), _GAMMA)),
        op("Div", p, op("Div", _root(power), _GAMMA)),
    )


def _power(p: Pattern) -> Pattern:
    return op("Add", op("ReduceMean", _square(p)), number("epsilon"))


_MEAN = op("ReduceMean", _X)
_CENTRED = op("Sub", _X, _MEAN)
_VARIANCE = _power(_CENTRED)
_FACTOR = op("Mul", _inverse_root(_VARIANCE), _GAMMA)
LAYER_NORM: tuple[Pattern, ...] = (
    op("Add", _scaled(_CENTRED, _VARIANCE), _BETA),
    op("Add", op("Mul", _X, _FACTOR), op("Sub", _BETA, op("Mul", _MEAN, _FACTOR))),
    _scaled(_CENTRED, _VARIANCE),
    op("Add", _normalised(_CENTRED, _VARIANCE), _BETA),
    _normalised(_CENTRED, _VARIANCE),
)
RMS_NORM: tuple[Pattern, ...] = (_scaled(_X, _power(_X)), _normalised(_X, _power(_X)))


@dataclass(frozen=True)
class Normalisation:
    """x float32 [..., N], gamma and beta float32 [N] (ones and None where the chain has none), output and nodes of the chain."""

    x: Tensor
    gamma: Array
    beta: Array | None
    epsilon: float
    output: Value
    steps: tuple[Node, ...]


def read_norm(found: Match, output: Value) -> Normalisation | str:
    """What a chain of LAYER_NORM or RMS_NORM computes, or the reason for refusing it."""
    x, epsilon = found.tensors["x"], found.numbers["epsilon"]
    if x.elem_type != TensorProto.FLOAT:
        return NOT_FLOAT
    if not all(_last_axis(m) for m in nodes_of(found, "ReduceMean")):
        return AXIS
    if not 0 < epsilon < np.inf:
        return EPSILON
    constants = [c for k in ("gamma", "beta") if isinstance(c := found.tensors.get(k), Const)]
    size = x.dims[-1] if x.dims else None
    if not isinstance(size, int):
        size = next((c.dims[-1] for c in constants if c.dims and c.dims[-1] > 1), None)
    if size is None:
        return SIZE
    rank = len(x.dims) if x.dims is not None else 1
    if any(not _by_channel(c, size, rank) for c in constants):
        return CHANNELS
    gamma, beta = (_vector(found.tensors.get(k), size) for k in ("gamma", "beta"))
    return Normalisation(x, np.ones(size, np.float32) if gamma is None else gamma, beta, epsilon, output, found.steps)


def find_rms_norms(graph: Graph) -> Iterator[Normalisation]:
    """Every RMSNorm that is written out in `graph`: below opset 23 there is no operator to name it by."""
    for found, output in chains(graph, RMS_NORM):
        norm = read_norm(found, output)
        if not isinstance(norm, str):
            yield norm


def _last_axis(mean: Node) -> bool:
    axes, dims = ints_of(mean, "axes", 1), mean.inputs[0].dims
    if axes is None or len(axes) != 1 or not mean.attr("keepdims", 1):
        return False
    return axes[0] == -1 or (dims is not None and axes[0] == len(dims) - 1)


def _by_channel(constant: Const, size: int, rank: int) -> bool:
    """Whether it broadcasts along the last axis alone and adds no dimension."""
    dims = constant.dims
    return len(dims) <= rank and all(d == 1 for d in dims[:-1]) and (not dims or dims[-1] in (1, size))


def _vector(constant: Tensor | None, size: int) -> Array | None:
    if not isinstance(constant, Const):
        return None
    return np.ascontiguousarray(np.broadcast_to(constant.array().reshape(-1).astype(np.float32), (size,)))
