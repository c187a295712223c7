"""The division of softmax after the product with V: context / row sum, in integers.

    attention = sum_j e_j v_j / sum_j e_j

With e in u8 the sums of e_j v_j are one integer MatMul; [queries, width] of them are divided, not [queries, keys], and no
probability is rounded to 8 bits. The quotient is a weighted mean of v, so it keeps v's range; m is how much finer its scale is:

    y = floor( context * m / sum + 1/2 ),  scale Sv / m

A row sum of 0 (everything masked) gives 0. Division truncates, so it is done on context * m + sum * k >= 0, k = 255 m + 1.

**Wide**, where the number of keys is not known: both sums are first divided by the least j that brings the row sum to 255
`longest` (j = 1 up to that many keys), which costs less than m / 255 of a step in longer rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto

from qcompile.kernels._protocol import Array, Float64, Kernel, function, within

_LARGEST = 255  # of e, and of |v - its zero point|
_MAX_LONGEST = 2**13


@dataclass(frozen=True)
class INormalise(Kernel):
    """int32 [..., d] of the int32 sums of e v [..., d] and of e [..., 1]; e in u8, |v| <= 255.

    scale: that of v. longest: keys a row has at most. m is the largest power of two that leaves room: 32 for 512 keys.
    any_length: rows may have more keys than that.
    """

    scale: float
    longest: int = 512
    any_length: bool = False

    source: ClassVar[str] = "arithmetic"
    domain: ClassVar[str] = (
        "|context| <= 255 sum, 0 <= sum <= 255 longest, longest <= 8192; any length: sum <= 2^23 (32,896 keys); any scale"
    )
    TOLERANCE: ClassVar[float] = 0.5  # steps of the output

    def __post_init__(self) -> None:
        within("normalisation: longest row", self.longest, 1, _MAX_LONGEST, "the product has no room for more in int32")
        within("normalisation: scale of v", self.scale, 2.0**-100, 2.0**100, "check the calibration")

    @property
    def name(self) -> str:
        """INormalise, INormaliseWide."""
        return "INormaliseWide" if self.any_length else "INormalise"

    @property
    def multiplier(self) -> int:
        """m: 255 longest (2 * 255 m + 2) < 2^31."""
        room = (2**31 // (_LARGEST * self.longest) - 2) // (2 * _LARGEST)
        return 1 << (room.bit_length() - 1)  # room >= 2 at 8192 keys

    @property
    def offset(self) -> int:
        """k: makes what is divided positive."""
        return _LARGEST * self.multiplier + 1

    @property
    def output_scale(self) -> float:
        """Sv / m."""
        return self.scale / self.multiplier

    @property
    def tolerance(self) -> float:
        """Half a step, and what float64 rounds. Divided by j, both sums lose less than 1, at a row sum of room / 2 or more."""
        lost = 2 * (_LARGEST + 1) * self.multiplier / self.room if self.any_length else 0.0
        return (self.TOLERANCE + lost) * self.output_scale * (1 + 1e-9)

    @property
    def room(self) -> int:
        """The largest row sum that is divided as it is."""
        return _LARGEST * self.longest

    def attributes(self) -> dict[str, int]:
        """multiplier and offset; room where any length is taken."""
        found = {"multiplier": self.multiplier, "offset": self.offset}
        return {**found, "room": self.room} if self.any_length else found

    def reference(self, *inputs: Array) -> Array:
        """int32 [..., d] of the sums [..., d] and the row sums [..., 1]."""
        context, total = inputs[0].astype(np.int64), np.maximum(inputs[1].astype(np.int64), 1)
        if self.any_length:
            j = total // self.room + 1
            context, total = np.sign(context) * (np.abs(context) // j), -(-total // j)
        return np.asarray((2 * context * self.multiplier + total) // (2 * total)).astype(np.int32)

    def lower(self) -> FunctionProto:
        """The same function for all."""
        # product + total * offset + half lies in [total, total (2 * 255 m + 1) + total/2], below 2^31 by the choice of m.
        # floor((2 c m + s) / 2s) = floor((c m + s div 2) / s): for odd s the two differ by 1/2 in a numerator that is whole.
        # Wide: total < j room, so its share, rounded up, is at most room; |context| / j <= 255 total / j.
        start = """total_any = Max (sum, one)
            j_less = Div (total_any, room_)
            j = Add (j_less, one)
            total_up = Add (total_any, j_less)
            total = Div (total_up, j)
            inside = Div (context, j)"""
        plain = """total = Max (sum, one)
            inside = Identity (context)"""
        text = f"""{self.name} <{", ".join(self.attributes())}> (context, sum) => (y) {{
            one = Div (offset_, offset_)
            two = Add (one, one)
            {start if self.any_length else plain}
            half = Div (total, two)
            lift = Mul (total, offset_)
            base = Add (lift, half)
            product = Mul (inside, multiplier_)
            lifted = Add (product, base)
            quotient = Div (lifted, total)
            y = Sub (quotient, offset_)
        }}"""
        return function(text, dict.fromkeys(self.attributes(), TensorProto.INT32))

    def oracle(self, *inputs: Array) -> Float64:
        """The quotient times the scale of v; 0 where the sum is."""
        context, total = inputs[0].astype(np.float64), inputs[1].astype(np.float64)
        return np.asarray(context / np.where(total == 0, 1, total) * self.scale)
