"""Elementwise functions in float64: the oracles of kernels, and what tables are made of, by ONNX operator name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from qcompile.kernels._protocol import Float64

Function = Callable[..., Float64]

_erf = np.frompyfunc(math.erf, 1, 1)  # numpy has none


def erf(x: Float64) -> Float64:
    """The error function."""
    return np.asarray(_erf(x), np.float64)


def gelu(x: Float64) -> Float64:
    """x/2 (1 + erf(x / sqrt2)), Hendrycks and Gimpel 2016."""
    return np.asarray(x / 2 * (1 + erf(x / math.sqrt(2))))


def gelu_tanh(x: Float64) -> Float64:
    """x/2 (1 + tanh(sqrt(2/pi) (x + .044715 x^3))), the same paper."""
    return np.asarray(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def sigmoid(x: Float64) -> Float64:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray((1 + np.tanh(x / 2)) / 2)


def hard_sigmoid(x: Float64, alpha: float = 0.2, beta: float = 0.5) -> Float64:
    """max(0, min(1, alpha x + beta))."""
    return np.asarray(np.clip(alpha * x + beta, 0, 1))


def leaky_relu(x: Float64, alpha: float = 0.01) -> Float64:
    """x, alpha x where negative."""
    return np.asarray(np.where(x < 0, alpha * x, x))


def elu(x: Float64, alpha: float = 1.0) -> Float64:
    """x, alpha (exp(x) - 1) where negative."""
    return np.asarray(np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x))


def softplus(x: Float64) -> Float64:
    """log(1 + exp(x)) without overflow."""
    return np.asarray(np.logaddexp(x, 0))


#: By ONNX's operator names, with the names of their attributes; `Silu` is what most exporters spell x * Sigmoid(x).
FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "Abs": np.abs,
        "Cos": np.cos,
        "Elu": elu,
        "Erf": erf,
        "Exp": np.exp,
        "Gelu": gelu,
        "GeluTanh": gelu_tanh,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": lambda x: np.asarray(x * hard_sigmoid(x, 1 / 6, 0.5)),
        "LeakyRelu": leaky_relu,
        "Log": np.log,
        "Mish": lambda x: np.asarray(x * np.tanh(softplus(x))),
        "Neg": np.negative,
        "Reciprocal": np.reciprocal,
        "Sigmoid": sigmoid,
        "Silu": lambda x: np.asarray(x * sigmoid(x)),
        "Sin": np.sin,
        "Softplus": softplus,
        "Softsign": lambda x: np.asarray(x / (1 + np.abs(x))),
        "Sqrt": np.sqrt,
        "Tanh": np.tanh,
    }
)


def named(name: str, **attributes: float) -> Function:
    """The function of that name with its attributes set. Raises ValueError where there is none of that name."""
    if name not in FUNCTIONS:
        raise ValueError(f"table: no function is called {name}; there are {', '.join(FUNCTIONS)}")
    return partial(FUNCTIONS[name], **attributes)
