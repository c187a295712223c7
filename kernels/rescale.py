"""Dyadic rescale: an int32 accumulator times b/2^c, rounded half to even, plus a zero point, saturated to 8, 16 or 32 bits.

Source: the multipliers b/2^c are those of Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", 2021, section 3; rounding
half to even makes them equal to the fused operators of onnxruntime (docs/dyadic.md).

    y = saturate( round_half_even(acc * b / 2^c) + zero_point ),      1 <= b < 2^24,  0 <= c <= 31

In 32 bits, with w = 8, 16 or 31 bits of reach (an output of w bits is saturated wherever |acc * b / 2^c| >= 2^w, as the zero
point is one of its values). **Clip first**: beyond L = ceil(2^(c+w) / b) the output does not change, and |acc * b| <= L * b <
2^(c+w) + b. Then

- Direct, c + w <= 30: a b beyond 2^(c+w) saturates as 2^(c+w) does (all but acc = 0), so it is cut to that. Adding K * 2^c with
  the even K = 2^(w+1) makes p = acc * b + K * 2^c + 2^(c-1) - 1 positive and below 2^32. `(p + ((p >> c) & 1)) >> c` rounds it:
  only at a tie does the added bit reach bit c, and there bit c of p is that of the floor. Then K is subtracted. An even K keeps
  the parity, so ties go to even. What does not depend on acc is computed from b, c and the ends: once, as it is constant.
- Wide, all else: the magnitude, as rounding half to even is odd: |acc| * b in two limbs of 32 bits from four products of 16,
  shifted across both, rounded by the bits that fall out and the parity of the rest, and the sign put back.

c = 0 is run as (2b, 1). The fused form is onnxruntime's QGemm with an empty product: zeros x zeros + acc, in float32, exact for
8 bits and c <= 16 (docs/dyadic.md has the proof): six times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from qcompile.dyadic import Int64, round_shift
from qcompile.kernels._protocol import OPSET, Array, Float64, function, within
from qcompile.kernels._saturate import Rescale

_MOST_NUMERATOR = (1 << 24) - 1
_MOST_SHIFT = 31
_MOST_FUSED_SHIFT = 16
_DIRECT_BITS = 30
_REACH = {"uint8": 8, "int8": 8, "uint16": 16, "int16": 16, "int32": 31}

# span = 2^w - 1; end = 2^(c+w) <= 2^30, twice that is `raise` without below = 2^(c-1) - 1. b <= 2^(c+w) and b <= 2^25, so
# |product| < end + b < 2^31 and raised <= 3 * 2^30 + 2^25 + 2^21 < 2^32, computed modulo 2^32 in uint32: exact. Its bit c,
# moved to the highest place and back, is `odd`; signed < 2^(w+2).
_DIRECT = """
    one = Constant <value = uint32 {1}> ()
    one_i = Constant <value = int32 {1}> ()
    highest_bit = Constant <value = uint32 {31}> ()
    span = Sub (high_, low_)
    reach = Add (span, one_i)
    k = Add (reach, reach)
    unit = BitShift <direction = "LEFT"> (one, c)
    unit_i = Cast <to = 6> (unit)
    end = Mul (unit_i, reach)
    end_b = Add (end, b)
    up = Sub (end_b, one_i)
    limit = Div (up, b)
    floor = Neg (limit)
    end_u = Cast <to = 12> (end)
    lift = Add (end_u, end_u)
    half = BitShift <direction = "RIGHT"> (unit, one)
    below = Sub (half, one)
    raise = Add (lift, below)
    to_highest = Sub (highest_bit, c)
    back = Sub (zero, k)
    near_low = Max (x, floor)
    near = Min (near_low, limit)
    product = Mul (near, b)
    product_u = Cast <to = 12> (product)
    raised = Add (product_u, raise)
    top = BitShift <direction = "LEFT"> (raised, to_highest)
    odd = BitShift <direction = "RIGHT"> (top, highest_bit)
    even = Add (raised, odd)
    shifted = BitShift <direction = "RIGHT"> (even, c)
    signed = Cast <to = 6> (shifted)
    moved = Add (signed, back)
"""
# below = 2^(c-1) - 1; c >= 1 here. x_u: two's complement; (v ^ ones) + minus negates v where minus = 1. size <= 2^31, b < 2^25
# (2b where c was 0).
# p00 < 2^32, p01 <= 2^16 2^9, p10 <= 2^15 2^16, p11 <= 2^15 2^9; middle < 2^16 + 2^25 + 2^31 < 2^32; the left shift drops what
# `top` has. size * b < 2^(c+w) + b, so whole < 2^31 + 2^24 and top << (32-c) loses nothing; rest < 2^c <= 2^31, rest + odd +
# below < 2^31 + 2^30.
_WIDE = """
    one = Constant <value = uint32 {1}> ()
    less = Sub (c, one)
    half = BitShift <direction = "LEFT"> (one, less)
    below = Sub (half, one)
    sixteen = Constant <value = uint32 {16}> ()
    thirty_one = Constant <value = uint32 {31}> ()
    thirty_two = Constant <value = uint32 {32}> ()
    low_half = Constant <value = uint32 {65535}> ()
    none = Constant <value = uint32 {0}> ()
    largest = Constant <value = uint32 {2147483647}> ()
    x_u = Cast <to = 12> (x)
    minus = BitShift <direction = "RIGHT"> (x_u, thirty_one)
    ones = Sub (none, minus)
    turned = BitwiseXor (x_u, ones)
    magnitude = Add (turned, minus)
    size = Min (magnitude, limit)
    b1 = BitShift <direction = "RIGHT"> (b, sixteen)
    b0 = BitwiseAnd (b, low_half)
    m1 = BitShift <direction = "RIGHT"> (size, sixteen)
    m0 = BitwiseAnd (size, low_half)
    p00 = Mul (m0, b0)
    p01 = Mul (m0, b1)
    p10 = Mul (m1, b0)
    p11 = Mul (m1, b1)
    carried = BitShift <direction = "RIGHT"> (p00, sixteen)
    cross = Add (p01, p10)
    middle = Add (carried, cross)
    upper = BitShift <direction = "RIGHT"> (middle, sixteen)
    top = Add (p11, upper)
    lower = BitShift <direction = "LEFT"> (middle, sixteen)
    last = BitwiseAnd (p00, low_half)
    bottom = Add (lower, last)
    left = Sub (thirty_two, c)
    from_top = BitShift <direction = "LEFT"> (top, left)
    from_bottom = BitShift <direction = "RIGHT"> (bottom, c)
    whole = Add (from_top, from_bottom)
    unit = BitShift <direction = "LEFT"> (one, c)
    mask = Sub (unit, one)
    rest = BitwiseAnd (bottom, mask)
    odd = BitwiseAnd (whole, one)
    rest_more = Add (rest, below)
    biased = Add (rest_more, odd)
    up = BitShift <direction = "RIGHT"> (biased, c)
    rounded = Add (whole, up)
    most = Add (largest, minus)
    saturated = Min (rounded, most)
    turned_back = BitwiseXor (saturated, ones)
    signed_u = Add (turned_back, minus)
    signed = Cast <to = 6> (signed_u)
    moved = Add (signed, zero)
"""


@dataclass(frozen=True)
class DyadicRescale(Rescale):
    """y = saturate(round_half_even(x * b / 2^c) + zero_point) of int32 `x`, per tensor (one b and c) or per channel.

    b, c: one number or one a channel each. axis: of the channels, counted from the end (-1 is the last; -3 the channels of an
    NCHW tensor).
    dtype: int8, uint8, int16, uint16 or int32 (there the zero point is 0).
    """

    b: tuple[int, ...]
    c: tuple[int, ...]
    zero_point: int = 0
    dtype: str = "uint8"
    axis: int = -1

    source: ClassVar[str] = "HAWQ-V3 (2021), section 3, with rounding half to even"
    domain: ClassVar[str] = "int32, any; 1 <= b < 2^24, 0 <= c <= 31; 8, 16 or 32 bits"
    TOLERANCE: ClassVar[float] = 0.5  # rounding is the only error

    def __post_init__(self) -> None:
        if self.dtype not in _REACH:
            raise ValueError(f"dyadic rescale: output type {self.dtype!r}: it must be one of {', '.join(_REACH)}")
        if not self.b or not self.c or 1 != len(self.b) != len(self.c) != 1:
            raise ValueError(
                f"dyadic rescale: {len(self.b)} numerators and {len(self.c)} shifts: one of each for all channels or for each"
            )
        for b in self.b:
            within("dyadic rescale: b", b, 1, _MOST_NUMERATOR, "a multiplier is b/2^c with 1 <= b < 2^24")
        for c in self.c:
            within("dyadic rescale: c", c, 0, _MOST_SHIFT, "a multiplier is b/2^c with 0 <= c <= 31")
        zero = (0, 0) if self.dtype == "int32" else (self._limits.min, self._limits.max)
        within(f"dyadic rescale to {self.dtype}: zero point", self.zero_point, *zero, "it must be a value of the output")
        if self.axis >= 0:
            raise ValueError(f"dyadic rescale: axis {self.axis}: count it from the end, -1 is the last")

    @property
    def name(self) -> str:
        """DyadicRescale, or DyadicRescaleWide where the product needs two limbs."""
        return "DyadicRescale" if max(self.c) + _REACH[self.dtype] <= _DIRECT_BITS else "DyadicRescaleWide"

    @property
    def least_opset(self) -> int:
        """13; the wide form needs operators on bits."""
        return 13 if self.name == "DyadicRescale" else OPSET

    @property
    def _output(self) -> tuple[int, str]:
        return self.zero_point, self.dtype

    def _vector(self, numbers: tuple[int, ...] | Int64) -> Int64:
        """Numbers a channel in the shape that broadcasts along `axis`; 0-d where there is one."""
        found = np.asarray(numbers, np.int64)
        return found.reshape(()) if found.size == 1 else found.reshape(-1, *[1] * (-self.axis - 1))

    @property
    def _multiplier(self) -> tuple[Int64, Int64]:
        """b and c with c >= 1: 0 becomes (2b, 1)."""
        b, c = self._vector(self.b), self._vector(self.c)
        doubled = np.where(c == 0, 2 * b, b)
        return np.asarray(doubled), np.maximum(c, 1)

    @property
    def _limit(self) -> Int64:
        """ceil(2^(c+w) / b), at most 2^31: saturation is reached there."""
        b, c = self._multiplier
        reach = np.left_shift(np.int64(1), c + _REACH[self.dtype])  # at most 2^62
        return np.asarray(np.minimum(-(-reach // b), 1 << 31))

    def constants(self) -> dict[str, Array]:
        """b, c and the zero point; the limit L where it needs more than 32 bits to compute."""
        b, c = self._multiplier
        zero = np.asarray(self.zero_point, np.int32)
        if self.name == "DyadicRescaleWide":
            return {"b": b.astype(np.uint32), "c": c.astype(np.uint32), "limit": self._limit.astype(np.uint32), "zero": zero}
        capped = np.minimum(b, np.left_shift(np.int64(1), c + _REACH[self.dtype]))
        return {"b": capped.astype(np.int32), "c": c.astype(np.uint32), "zero": zero}

    def reference(self, *inputs: Array) -> Array:
        """The formula in int64: |acc * b| < 2^55."""
        product = inputs[0].astype(np.int64) * self._vector(self.b)
        rounded = round_shift(product, self._vector(self.c)) + self.zero_point
        return np.clip(rounded, self._limits.min, self._limits.max).astype(self.dtype)

    def lower(self) -> FunctionProto:
        """The direct or the wide form."""
        body = _DIRECT if self.name == "DyadicRescale" else _WIDE
        return self._function(body, "round_half_even(x * b / 2^c) + zero, within the type; in int32 and uint32 alone")

    def oracle(self, *inputs: Array) -> Float64:
        """acc * b / 2^c, within the range of the output. The product has at most 55 bits, so float64 adds 2^-53 relative."""
        real = inputs[0].astype(np.float64) * self._vector(self.b) / np.exp2(self._vector(self.c))
        return np.asarray(np.clip(real, self._limits.min - self.zero_point, self._limits.max - self.zero_point))


@dataclass(frozen=True)
class FusedRescale(DyadicRescale):
    """The same integers from onnxruntime's QGemm: 8 bits, c <= 16, channels on the last axis; a tensor of rank 1 or more.

    The multiplier is the float32 b / 2^c, exact as b < 2^24; it stands in the file as the scale of an operand that is all 0.
    columns: of a matrix [rows, columns]; 0 where the rank or the last dimension is not known: twelve operators instead of three.
    """

    columns: int = 0

    shared: ClassVar[frozenset[str]] = frozenset({"zeros"})
    domain: ClassVar[str] = "int32, any; 1 <= b < 2^24, 0 <= c <= 16; 8 bits; onnxruntime only"

    def __post_init__(self) -> None:
        super().__post_init__()
        if _REACH[self.dtype] != 8:
            raise ValueError(f"fused rescale: output type {self.dtype!r}: QGemm gives int8 or uint8, use DyadicRescale")
        within("fused rescale: c", max(self.c), 0, _MOST_FUSED_SHIFT, "float32 is exact up to 16, use DyadicRescale")
        if self.axis != -1:
            raise ValueError(f"fused rescale: axis {self.axis}: QGemm has its channels last, use DyadicRescale")
        if self.columns and max(len(self.b), len(self.c)) not in (1, self.columns):
            raise ValueError(f"fused rescale: {self.columns} columns: there are multipliers for {max(len(self.b), len(self.c))}")

    @property
    def name(self) -> str:
        """DyadicRescaleFused, DyadicRescaleFusedMatrix; Signed for int8: QGemm's first operand has the type of its result."""
        return f"DyadicRescaleFused{'Matrix' if self.columns else ''}{'' if self.dtype == 'uint8' else 'Signed'}"

    def attributes(self) -> dict[str, int]:
        """None: the type is that of the zero point."""
        return {}

    def constants(self) -> dict[str, Array]:
        """The float32 multiplier and the zero point; for channels the zeros of the operand's zero point too."""
        scale = np.ldexp(self._vector(self.b).astype(np.float32), -self._vector(self.c).astype(np.int32)).astype(np.float32)
        operand_zero = np.zeros(scale.shape, np.int8)
        zeros = {"zeros": np.zeros((1, self.columns), np.int8)} if self.columns else {}
        return {"scale": scale, "operand_zero": operand_zero, **zeros, "zero_point": np.asarray(self.zero_point, self.dtype)}

    def lower(self) -> FunctionProto:
        """QGemm of any [rows, 1] and zeros [1, channels], with the accumulator as its bias: of a matrix its own first column."""
        made = function(self._matrix if self.columns else self._any_rank)
        made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return made

    @property
    def _matrix(self) -> str:
        return f"""{self.name} (acc, {", ".join(self.constants())}) => (y) {{
            first = Constant <value_ints = [0]> ()
            second = Constant <value_ints = [1]> ()
            column = Slice (acc, first, second, second)
            left = Cast <to = {TensorProto.UINT8 if self.dtype == "uint8" else TensorProto.INT8}> (column)
            unit = Constant <value = float {{1}}> ()
            left_zero = Constant <value = {self.dtype} {{0}}> ()
            y = com.microsoft.QGemm (left, unit, left_zero, zeros, scale, operand_zero, acc, unit, zero_point)
        }}"""

    @property
    def _any_rank(self) -> str:
        return f"""{self.name} (acc, {", ".join(self.constants())}) => (y) {{
            shape = Shape (acc)
            bias = Flatten <axis = -1> (acc)
            rows = Shape <start = 0, end = 1> (bias)
            columns = Shape <start = 1, end = 2> (bias)
            single = Constant <value_ints = [1]> ()
            left_shape = Concat <axis = 0> (rows, single)
            right_shape = Concat <axis = 0> (single, columns)
            left = ConstantOfShape <value = {self.dtype}[1] {{0}}> (left_shape)
            right = ConstantOfShape <value = int8[1] {{0}}> (right_shape)
            unit = Constant <value = float {{1}}> ()
            left_zero = Constant <value = {self.dtype} {{0}}> ()
            flat = com.microsoft.QGemm (left, unit, left_zero, right, scale, operand_zero, bias, unit, zero_point)
            y = Reshape <allowzero = 1> (flat, shape)
        }}"""
