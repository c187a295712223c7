"""Rescale by a ratio with an odd denominator: there are no ties, so every way of rounding gives the same integer.

    y = saturate( round(x * p / q) + zero_point ),      1 <= p, q odd and 1 <= q <= 1023

The products of two 8-bit tensors end so (docs/dyadic.md). In int32: a p beyond 256 q saturates as 256 q does (all but x = 0), so
it is cut to that. x is first held within +-ceil(256 q / p), beyond which the output does not change; then |2xp| <= 512 q + 2p
<= 1024 q, so 2xp + 1025 q lies in 0 .. 2^22 and a truncating division by 2q is a floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import FunctionProto

from qcompile.kernels._protocol import Array, Float64, within
from qcompile.kernels._saturate import Rescale

_MOST_DENOMINATOR = 1023
_TYPES = ("int8", "uint8")

_BODY = """
    one = Constant <value = int32 {1}> ()
    two = Constant <value = int32 {2}> ()
    reach = Constant <value = int32 {256}> ()
    k = Constant <value = int32 {512}> ()
    steps = Constant <value = int32 {1025}> ()
    end = Mul (q, reach)
    above = Add (end, p)
    up = Sub (above, one)
    limit = Div (up, p)
    least = Neg (limit)
    double_p = Mul (p, two)
    lift = Mul (q, steps)
    double_q = Mul (q, two)
    back = Sub (zero, k)
    near = Clip (x, least, limit)
    product = Mul (near, double_p)
    raised = Add (product, lift)
    rounded = Div (raised, double_q)
    moved = Add (rounded, back)
"""


@dataclass(frozen=True)
class RatioRescale(Rescale):
    """y = saturate(round(x * p / q) + zero_point) of int32 `x`, to int8 or uint8."""

    p: int
    q: int
    zero_point: int = 0
    dtype: str = "uint8"

    source: ClassVar[str] = "arithmetic: k/q is at least 1/(2q) away from every tie"
    domain: ClassVar[str] = "int32, any; p >= 1; q odd, 1 <= q <= 1023; 8 bits"
    TOLERANCE: ClassVar[float] = 0.5  # rounding is the only error

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise ValueError(f"ratio rescale: output type {self.dtype!r}: it must be one of {', '.join(_TYPES)}")
        within("ratio rescale: p", self.p, 1, 2**62, "a ratio is p/q with positive integers")
        within("ratio rescale: q", self.q, 1, _MOST_DENOMINATOR, "a ratio is p/q with one odd q <= 1023")
        if self.q % 2 == 0:
            raise ValueError(f"ratio rescale: q {self.q} is even: ties would be rounded in more than one way")
        limits = self._limits
        within("ratio rescale: zero point", self.zero_point, limits.min, limits.max, "it must be a value of the output")

    @property
    def name(self) -> str:
        """RatioRescale."""
        return "RatioRescale"

    @property
    def least_opset(self) -> int:
        """13."""
        return 13

    @property
    def _output(self) -> tuple[int, str]:
        return self.zero_point, self.dtype

    def constants(self) -> dict[str, Array]:
        """p, q and the zero point."""
        numbers = {"p": min(self.p, 256 * self.q), "q": self.q, "zero": self.zero_point}
        return {name: np.asarray(value, np.int32) for name, value in numbers.items()}

    def reference(self, *inputs: Array) -> Array:
        """The floor of (2xp + q) / 2q in int64: |2xp| < 2^51."""
        product = 2 * inputs[0].astype(np.int64) * min(self.p, 256 * self.q) + self.q
        limits = self._limits
        return np.clip(product // (2 * self.q) + self.zero_point, limits.min, limits.max).astype(self.dtype)

    def lower(self) -> FunctionProto:
        """The same function for all."""
        return self._function(_BODY, "round(x * p / q) + zero, within the type, for odd q; in int32 alone")

    def oracle(self, *inputs: Array) -> Float64:
        """x * p / q, within the range of the output."""
        limits = self._limits
        real = inputs[0].astype(np.float64) * self.p / self.q
        return np.asarray(np.clip(real, limits.min - self.zero_point, limits.max - self.zero_point))
