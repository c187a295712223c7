"""Dyadic rescale: an int32 accumulator times b/2^c, rounded half to even, plus a zero point, saturated to 8, 16 or 32 bits.

Source: the multipliers b/2^c are those of Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", 2021, section 3; rounding
half to even makes them equal to the fused operators of onnxruntime (docs/dyadic.md).

    y = saturate( round_half_even(acc * b / 2^c) + zero_point ),      1 <= b < 2^24,  0 <= c <= 31

In 32 bits, with w = 8, 16 or 31 bits of reach (an output of w bits is saturated wherever |acc * b / 2^c| >= 2^w, as the zero
point is one of its values):

- Lean, b <= 2^c and c + w <= 30. **Clip first**, to the accumulators that the output tells apart: nothing is left to saturate.
  p = acc * b + (zero point - low) 2^c + 2^(c-1) - 1 is then in 0 .. 2^(c+w), and `(p + ((p >> c) & 1)) >> c` rounds it: only at a
  tie does the added bit reach bit c, and there bit c of p is that of the floor. Where zero point - low is odd the bit is turned
  round. Where no accumulator inside the limits is a tie (an odd multiple of 2^(c-1-t), b = 2^t times an odd number), p >> c is
  all. A bias is part of the limits and of the constant: it costs nothing.
- Steep, b > 2^c: steps of the output are left out, so the end must be clipped too. First |acc| <= L = ceil(2^(c+w) / b), beyond
  which the output does not change; a b beyond 2^(c+w) is cut to that. Then the same with K * 2^c, K = 2^(w+1) (even, so that
  parity stays) in place of the zero point; K is subtracted at the end.
- Wide, all else: the magnitude, as rounding half to even is odd: |acc| * b in two limbs of 32 bits from four products of 16,
  shifted across both, rounded by the bits that fall out and the parity of the rest, and the sign put back.

What does not depend on acc is computed from b, c and the ends: once, as it is constant.

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
from qcompile.kernels._rescale_text import STEEP, WIDE, lean_body
from qcompile.kernels._saturate import Rescale

_MOST_NUMERATOR = (1 << 24) - 1
_MOST_SHIFT = 31
_MOST_FUSED_SHIFT = 16
_LEAN_BITS = 30
MOST_BIAS = 1 << 30
_REACH = {"uint8": 8, "int8": 8, "uint16": 16, "int16": 16, "int32": 31}


@dataclass(frozen=True)
class DyadicRescale(Rescale):
    """y = saturate(round_half_even((x + bias) * b / 2^c) + zero_point) of int32 `x`, per tensor (one b and c) or per channel.

    b, c: one number or one a channel each. axis: of the channels, counted from the end (-1 is the last; -3 the channels of an
    NCHW tensor). bias: none, or one a channel, |bias| <= 2^30, for the lean forms alone (`takes_bias`); the sum is exact.
    dtype: int8, uint8, int16, uint16 or int32 (there the zero point is 0).
    """

    b: tuple[int, ...]
    c: tuple[int, ...]
    zero_point: int = 0
    dtype: str = "uint8"
    axis: int = -1
    bias: tuple[int, ...] = ()

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
        if self.bias:
            if not self.takes_bias:
                raise ValueError("dyadic rescale: a bias: only multipliers up to 1 take it, add it before")
            within("dyadic rescale: bias", max(abs(v) for v in self.bias), 0, MOST_BIAS, "add it before")

    @property
    def least_opset(self) -> int:
        """13; the wide form needs operators on bits."""
        return OPSET if self.name.endswith("Wide") else 13

    @property
    def _lean(self) -> bool:
        b, c = self._multiplier
        return int(c.max()) + _REACH[self.dtype] <= _LEAN_BITS and bool((b <= np.left_shift(np.int64(1), c)).all())

    @property
    def takes_bias(self) -> bool:
        """Whether a bias may be part of it: the multipliers are 1 at most, and 32 bits have room."""
        return self._lean

    @property
    def name(self) -> str:
        """DyadicRescale; Signed for int8 and int16; Odd, Untied by how it rounds; Biased. Else ...Steep, ...Wide."""
        if not self._lean:
            return (
                "DyadicRescaleSteep" if int(self._multiplier[1].max()) + _REACH[self.dtype] <= _LEAN_BITS else "DyadicRescaleWide"
            )
        return f"DyadicRescale{'Signed' if self._signed else ''}{self._rounding}{'Biased' if self.bias else ''}"

    @property
    def _signed(self) -> bool:
        return self._limits.min < 0

    @property
    def _rounding(self) -> str:
        """Untied: no accumulator between the limits lies half-way between two integers; Odd: zero point - low is."""
        b, c = self._multiplier
        unit = np.left_shift(np.int64(1), c)
        odd_part = b // (b & -b)
        first = np.where(b < unit, (unit // 2) * odd_part // np.maximum(b, 1), np.int64(1) << 32)  # the least tie: 2^(c-1-t)
        room = max(int(self._limits.max) - self.zero_point, self.zero_point - int(self._limits.min))
        if bool((first > (room * unit + unit // 2 - 1) // b).all()):
            return "Untied"
        return "Odd" if (self.zero_point - int(self._limits.min)) % 2 else ""

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
        """b, c, the zero point and the bias; the limit L where it needs more than 32 bits to compute."""
        b, c = self._multiplier
        zero = np.asarray(self.zero_point, np.int32)
        if self.name == "DyadicRescaleWide":
            return {"b": b.astype(np.uint32), "c": c.astype(np.uint32), "limit": self._limit.astype(np.uint32), "zero": zero}
        capped = np.minimum(b, np.left_shift(np.int64(1), c + _REACH[self.dtype]))
        found = {"b": capped.astype(np.int32), "c": c.astype(np.uint32), "zero": zero}
        return {**found, "bias": self._vector(self.bias).astype(np.int32)} if self.bias else found

    def _biased(self, x: Array) -> Array:
        return np.asarray(x + self._vector(self.bias)) if self.bias else x

    def reference(self, *inputs: Array) -> Array:
        """The formula in int64: |(acc + bias) * b| < 2^56."""
        product = self._biased(inputs[0].astype(np.int64)) * self._vector(self.b)
        rounded = round_shift(product, self._vector(self.c)) + self.zero_point
        return np.clip(rounded, self._limits.min, self._limits.max).astype(self.dtype)

    def lower(self) -> FunctionProto:
        """One function for each name."""
        meaning = (
            f"round_half_even({'(x + bias)' if self.bias else 'x'} * b / 2^c) + zero, within the type; in int32 and uint32 alone"
        )
        if not self._lean:
            return self._function(WIDE if self.name.endswith("Wide") else STEEP, meaning)
        return self._ended(lean_body(biased=bool(self.bias), rounding=self._rounding, signed=self._signed), meaning)

    def oracle(self, *inputs: Array) -> Float64:
        """acc * b / 2^c, within the range of the output. The product has at most 55 bits, so float64 adds 2^-53 relative."""
        real = self._biased(inputs[0].astype(np.float64)) * self._vector(self.b) / np.exp2(self._vector(self.c))
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
        if self.bias:
            raise ValueError("fused rescale: a bias: add it before")
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
