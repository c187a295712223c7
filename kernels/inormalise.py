"""The division of softmax after the product with V: context / row sum, in integers.

    attention = sum_j e_j v_j / sum_j e_j

With e in u8 the sums of e_j v_j are one integer MatMul; [queries, width] of them are divided, not [queries, keys], and no
probability is rounded to 8 bits. The quotient is a weighted mean of v, so it keeps v's range; m is how much finer its scale is:

    y = context * m / sum, truncated towards 0,  scale Sv / m

A row sum of 0 (everything masked) gives 0. What truncation loses, less than Sv / m, is far below a step of 8 bits.

**Wide**, where the number of keys is not known: j = sum div room + 1, which is 1 up to `longest` keys, multiplies the row by
m div j instead, and the row sum by (m div j) / m, rounded: that costs m / longest of a step in longer rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto

from qcompile.kernels._protocol import Array, Float64, Kernel, function, within

_LARGEST = 255  # of e, and of |v - its zero point|
_MAX_LONGEST = 2**13
_MOST_MULTIPLIER = 2**7


@dataclass(frozen=True)
class INormalise(Kernel):
    """int32 [..., d] of the int32 sums of e v [..., d] and of e [..., 1]; e in u8, |v| <= 255.

    scale: that of v. longest: keys a row has at most. m is the largest power of two that leaves room: 64 for 512 keys.
    any_length: rows may have more keys than that.
    """

    scale: float
    longest: int = 512
    any_length: bool = False

    source: ClassVar[str] = "arithmetic"
    domain: ClassVar[str] = (
        "|context| <= 255 sum, 0 <= sum <= 255 longest, longest <= 8192; "
        "any length: sum < 255 longest m (32,768 keys for 512); any scale"
    )
    TOLERANCE: ClassVar[float] = 1.0  # steps of the output

    def __post_init__(self) -> None:
        within("normalisation: longest row", self.longest, 1, _MAX_LONGEST, "the product has no room for more in int32")
        within("normalisation: scale of v", self.scale, 2.0**-100, 2.0**100, "check the calibration")

    @property
    def name(self) -> str:
        """INormalise, INormaliseWide."""
        return "INormaliseWide" if self.any_length else "INormalise"

    @property
    def multiplier(self) -> int:
        """m: 255 * 255 longest * m < 2^31, and at most 2^7."""
        found = _MOST_MULTIPLIER
        while _LARGEST * self.room * found >= 2**31:
            found //= 2
        return found

    @property
    def output_scale(self) -> float:
        """Sv / m."""
        return self.scale / self.multiplier

    @property
    def tolerance(self) -> float:
        """A step, and what float64 rounds. Wide: the row sum, scaled to room / 2 - 1 at least, is rounded."""
        lost = _LARGEST * self.multiplier / (self.room - 2) if self.any_length else 0.0
        return (self.TOLERANCE + lost) * self.output_scale * (1 + 1e-9)

    @property
    def room(self) -> int:
        """The largest row sum that is divided as it is."""
        return _LARGEST * self.longest

    def attributes(self) -> dict[str, int]:
        """multiplier; room where any length is taken."""
        found = {"multiplier": self.multiplier}
        return {**found, "room": self.room} if self.any_length else found

    def reference(self, *inputs: Array) -> Array:
        """int32 [..., d] of the sums [..., d] and the row sums [..., 1]."""
        context, total = inputs[0].astype(np.int64), np.maximum(inputs[1].astype(np.int64), 1)
        by: Array | int = self.multiplier
        if self.any_length:
            by = self.multiplier // (total // self.room + 1)
            total = (total * by + self.multiplier // 2) // self.multiplier
        return np.asarray(np.sign(context) * (np.abs(context) * by // total)).astype(np.int32)

    def lower(self) -> FunctionProto:
        """The same function for all."""
        # |context| * m <= 255 sum * m < 2^31 by the choice of m. Wide: sum < j room, so |context| * (m div j) < 255 room * m, and
        # sum * (m div j) + m/2 is below that. j <= m for sum < m room, so m div j >= 1 and the scaled sum is at least 1.
        # A single number against [.., 1] is slow in onnxruntime: hence Clip, and rows laid flat.
        start = """shape = Shape (total_any)
            flat = Flatten <axis = 0> (total_any)
            j_less = Div (flat, room_)
            j = Add (j_less, one)
            by_flat = Div (multiplier_, j)
            two = Add (one, one)
            half = Div (multiplier_, two)
            scaled = Mul (flat, by_flat)
            scaled_up = Add (scaled, half)
            total_flat = Div (scaled_up, multiplier_)
            by = Reshape <allowzero = 1> (by_flat, shape)
            total = Reshape <allowzero = 1> (total_flat, shape)"""
        plain = """by = Identity (multiplier_)
            total = Identity (total_any)"""
        text = f"""{self.name} <{", ".join(self.attributes())}> (context, sum) => (y) {{
            one = Constant <value = int32 {{1}}> ()
            total_any = Clip (sum, one)
            {start if self.any_length else plain}
            product = Mul (context, by)
            y = Div (product, total)
        }}"""
        return function(text, dict.fromkeys(self.attributes(), TensorProto.INT32))

    def oracle(self, *inputs: Array) -> Float64:
        """The quotient times the scale of v; 0 where the sum is."""
        context, total = inputs[0].astype(np.float64), inputs[1].astype(np.float64)
        return np.asarray(context / np.where(total == 0, 1, total) * self.scale)
