"""Division by counts: the mean of the tokens that a mask keeps, in integers.

    y = round(a / n),  n = max(n, 1),  halves away from zero

A sum of masked values divided by how many there were: y keeps the step of the sum. Nothing to count gives the sum as it is (0).
Division truncates, so the quotient of |a| + n div 2 is taken, and the sign put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import FunctionProto

from qcompile.kernels._protocol import Array, Float64, Kernel, function, within


@dataclass(frozen=True)
class IDivide(Kernel):
    """int32 of int32 sums a [...] and int32 counts n that broadcast to them."""

    scale: float

    most: ClassVar[int] = 2**30
    source: ClassVar[str] = "arithmetic"
    domain: ClassVar[str] = "|a| <= 2^30, n <= 2^30 (n < 1 counts as 1); any scale"
    TOLERANCE: ClassVar[float] = 0.5  # steps of the output

    def __post_init__(self) -> None:
        within("division: scale", self.scale, 2.0**-100, 2.0**100, "check the calibration")

    @property
    def name(self) -> str:
        """IDivide."""
        return "IDivide"

    @property
    def output_scale(self) -> float:
        """That of the sums."""
        return self.scale

    @property
    def tolerance(self) -> float:
        """Half a step, and what float64 rounds."""
        return self.TOLERANCE * self.scale * (1 + 1e-9)

    def reference(self, *inputs: Array) -> Array:
        """int32 of the sums and the counts."""
        a, n = inputs[0].astype(np.int64), np.maximum(inputs[1].astype(np.int64), 1)
        return np.asarray(np.sign(a) * ((np.abs(a) + n // 2) // n)).astype(np.int32)

    def lower(self) -> FunctionProto:
        """The same function for all."""
        # |a| + n div 2 <= 2^30 + 2^29 < 2^31.
        text = """IDivide (a, n) => (y) {
            one = Constant <value = int32 {1}> ()
            two = Constant <value = int32 {2}> ()
            count = Max (n, one)
            half = Div (count, two)
            size = Abs (a)
            up = Add (size, half)
            ratio = Div (up, count)
            sign = Sign (a)
            y = Mul (sign, ratio)
        }"""
        return function(text)

    def oracle(self, *inputs: Array) -> Float64:
        """The quotient times the scale."""
        return np.asarray(inputs[0].astype(np.float64) / np.maximum(inputs[1].astype(np.float64), 1) * self.scale)
