"""i-GELU: GELU of integers by a polynomial of degree 2 in place of erf.

Source: Kim, Gholami, Yao, Mahoney, Keutzer, "I-BERT: Integer-only BERT Quantization", 2021, equations 6-8.

    GELU(x) = x/2 (1 + erf(x / sqrt2))
    erf(u) ~ sgn(u) [ a (min(|u|, -b) + b)^2 + 1 ],  a = -0.2888, b = -1.769       error of GELU at most 1.815e-2 in float64

On integers q with scale S, u = q Se, Se = S/sqrt2:  B ~ 1.769 / Se,  C ~ 1 / (0.2888 Se^2):

    1 + erf = (C + sgn(q) (C - (min(|q|, B) - B)^2)) / C          y = q * that numerator,  in steps of S / (2C)

The step is S/(2C) with the rounded C: so y is exactly 0 below -1.769 sqrt2 = -2.5, and exactly x above 2.5.

How B and C are rounded matters on coarse scales: floored as in the paper they cost 3.3e-2 at S = .1. Of B's two neighbours, each
with C from S and with C from B, the pair with the smallest largest error is taken: 1.90e-2 at most for S <= .1 (nearest integers:
2.08e-2).

Fine, for S below .0037: the numerator would carry y beyond int32; it is divided by a power of two first. The tanh form of GELU
(Hendrycks and Gimpel 2016, equation 2) is within 4.8e-4 of the other and maps here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, floor, log2, sqrt
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto

from qcompile.kernels._functions import gelu, gelu_tanh
from qcompile.kernels._protocol import Array, Float64, Kernel, function, within

_A, _B = 0.2888, 1.769
_FINEST, _COARSEST = 2.0**-13, 0.1 * (1 + 2.0**-24)  # the float32 nearest to .1 is a little above it
_REACH = 8.0  # the output saturates at a larger x than this
_INT32_MAX = 2**31 - 1
_CHOICE_FROM = 0.01  # below, any rounding is within 1.85e-2; step is 1 above


@dataclass(frozen=True)
class IGelu(Kernel):
    """GELU of int32 (the zero point subtracted before) as int32 with `output_scale`; inputs above `highest` are taken as that."""

    scale: float
    tanh: bool = False  # the oracle alone: which of the two forms is approximated
    b: int = field(init=False, repr=False, compare=False)
    c: int = field(init=False, repr=False, compare=False)
    step: int = field(init=False, repr=False, compare=False)

    source: ClassVar[str] = "I-BERT (2021), equations 6-8"
    domain: ClassVar[str] = "int32, any; scale 2^-13..0.1; saturates above x = 8 or more"
    TOLERANCE: ClassVar[float] = 2.0e-2

    def __post_init__(self) -> None:
        within("i-GELU: input scale", self.scale, _FINEST, _COARSEST, "use a table, or another scale")
        # (min(|q|, B) - B)^2 <= B^2 < C, so the numerator lies in [0, 2C]; B^2/C = .904 before rounding.
        step = _step(self.scale)
        b, c = _rounded(self.scale, step)
        assert b**2 < c and 2 * c <= _INT32_MAX
        for name, value in (("step", step), ("b", b), ("c", c)):
            object.__setattr__(self, name, value)
        assert self.b <= self.highest and self.highest * self.scale >= _REACH

    @property
    def name(self) -> str:
        """IGelu, or IGeluFine where the numerator is divided by a power of two."""
        return "IGelu" if self.step == 1 else "IGeluFine"

    @property
    def output_scale(self) -> float:
        """S / (2C / step)."""
        return self.scale / (2 * self.c // self.step)

    @property
    def highest(self) -> int:
        """The largest q that the product has room for; larger ones are taken as this."""
        return _INT32_MAX // (2 * self.c // self.step)

    def attributes(self) -> dict[str, int]:
        """b, c and highest; step where it is not 1."""
        found = {"b": self.b, "c": self.c, "highest": self.highest}
        return found if self.step == 1 else {**found, "step": self.step}

    def reference(self, *inputs: Array) -> Array:
        """int32 of int32, in the formula of the module."""
        q = np.clip(inputs[0].astype(np.int64), -self.b, self.highest)
        numerator = self.c + np.sign(q) * (self.c - (np.minimum(np.abs(q), self.b) - self.b) ** 2)
        return np.asarray(q * (numerator // self.step)).astype(np.int32)

    def lower(self) -> FunctionProto:
        """One function for each name."""
        # |q| <= max(B, highest), so Abs cannot wrap. 0 <= square <= B^2 < C, so 0 <= numerator <= 2C < 2^31.
        # |q| * factor <= highest * (2C / step) < 2^31, as B <= highest.
        divided = "factor = Identity (numerator)" if self.step == 1 else "factor = Div (numerator, step_)"
        text = f"""{self.name} <{", ".join(self.attributes())}> (x) => (y) {{
            low = Neg (b_)
            q = Clip (x, low, highest_)
            size = Abs (q)
            near = Min (size, b_)
            rest = Sub (near, b_)
            square = Mul (rest, rest)
            erf = Sub (c_, square)
            sign = Sign (q)
            signed = Mul (sign, erf)
            numerator = Add (signed, c_)
            {divided}
            y = Mul (q, factor)
        }}"""
        return function(text, dict.fromkeys(self.attributes(), TensorProto.INT32))

    def oracle(self, *inputs: Array) -> Float64:
        """GELU in float64, of x up to `highest`."""
        x = np.minimum(inputs[0].astype(np.float64), self.highest) * self.scale
        return gelu_tanh(x) if self.tanh else gelu(x)


def _step(scale: float) -> int:
    """The least power of two with numerator / step * (8/S + 1) < 2^31; 1 in 1000 is left for the rounding of C."""
    numerator = 4 / (_A * scale**2)
    return 1 << max(0, ceil(log2(numerator * (_REACH / scale + 1) * 1.001 / 2**31)))


def _rounded(scale: float, step: int) -> tuple[int, int]:
    """B and C, C a multiple of `step`; on coarse scales the pair of neighbours with the smallest largest error."""
    b, c = _B * sqrt(2) / scale, 2 / (_A * scale**2)
    if scale < _CHOICE_FROM:
        return round(b), round(c / step) * step
    pairs = [(whole, candidate) for whole in (floor(b), ceil(b)) for candidate in (round(c), round(whole**2 / (_A * _B**2)))]
    return min(pairs, key=lambda pair: _largest_error(scale, *pair))


def _largest_error(scale: float, b: int, c: int) -> float:
    """Against GELU, over the q of the polynomial and one more at either end: beyond it is 0 or x."""
    q = np.arange(-b - 1, b + 2, dtype=np.int64)
    numerator = c + np.sign(q) * (c - (np.minimum(np.abs(q), b) - b) ** 2)
    return float(np.abs(q * numerator * (scale / (2 * c)) - gelu(np.asarray(q * scale, np.float64))).max())


def polynomial_gelu(x: Float64) -> Float64:
    """i-GELU in float64: what the integers approach as their scale goes to 0."""
    u = x / sqrt(2)
    return np.asarray(x / 2 * (1 + np.sign(u) * (1 - _A * (np.minimum(np.abs(u), _B) - _B) ** 2)))
