"""Lean i-LayerNorm and RMSNorm: the fewest operators that are right for any row, where 2^11 steps a row are precise enough.

The formula is that of `ilayernorm`; this is what is cheaper. All values are int32, d values a row, `div` truncating:

    f = A div max(high - low, least),  A = 2^31 - 1
    e = ((x - low) f) div unit                   in 0..D: every row has the same height      RMSNorm: e = (x f) div unit, |e| <= D
    w = e - round(sum e / d)                                                                 RMSNorm: w = e
    v = sum w^2 + (E div max(high - low, least))^2 < 2^31,      E = sqrt(d epsilon) in input steps, times A / unit
    s = r + v div r,  r = roots[v div 2^18]      one step of Newton's iteration without its halving: s = 2 sqrt v
    y = (w G) div s + B,                         G = round(2 sqrt d gamma / Sy), B = round(beta / Sy)

- e is floored, not rounded: that moves all of a row alike on average, and the mean takes it out again.
- D is the largest for which the squares fit: d (D^2 + 1)/4 + 2^28 < 2^31 (RMSNorm: d D^2 + 2^28), 2^13 at most. It must be 2^11
  (RMSNorm 2^10) at least, so d <= 1790: longer rows take the other kernels.
- `least` keeps the second square within 2^28; no row below that height is told from a flat one by more than epsilon lets it.
- A row without variance is w = 0, so y = B; the least root is 362, so nothing is divided by 0.
- int32: nothing is clipped, as |w| <= D, |w G| < 2^31 and |y| < 2^31 by construction; the quotient is truncated, which costs a
  step where rounding costs half: take a step half as fine. 8 bits: the quotient has `fractions` times finer steps, half a step is
  in B, and the floor of the clipped sum is the rounded value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, isqrt, sqrt
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from qcompile.kernels._protocol import Array, function, within
from qcompile.kernels.ilayernorm import ILayerNorm, IRmsNorm, _Norm, _truncated

_A = 2**31 - 1
_EPSILON_ROOT = 2**14  # what epsilon adds to v: 2^28 at most
_ROOM = _A - _EPSILON_ROOT**2
_MOST_REACH = 2**13
_ROOT_SHIFT = 18
_ROOTS = np.rint(np.sqrt((np.arange(2 ** (31 - _ROOT_SHIFT)) + 0.5) * 2.0**_ROOT_SHIFT)).astype(np.int32)
_MOST_BETA = 2**29
_LEAST_FRACTIONS, _MOST_FRACTIONS = 8, 128
INPUT_BITS = 30
_KINDS = ("int32", "uint8", "int8")

# high - low <= 2^30, f >= 1, (x - low) f <= A, 0 <= e <= A div unit <= D.
_LAYER = """
    high = ReduceMax <keepdims = 1> (x, axis)
    low = ReduceMin <keepdims = 1> (x, axis)
    height = Sub (high, low)
    above = Sub (x, low)
    taller = Clip (height, least_)
    f = Div (most, taller)
    raised = Mul (above, f)
    e = Div (raised, unit_)
    total = MatMul (e, ones)
    total_up = Add (total, half_)
    mean = Div (total_up, d_)
    w = Sub (e, mean)
"""
_RMS = """
    size = Abs (x)
    height = ReduceMax <keepdims = 1> (size, axis)
    taller = Clip (height, least_)
    f = Div (most, taller)
    raised = Mul (x, f)
    w = Div (raised, unit_)
"""
# |w| <= D; squares and p^2 as the head of the file says; v div 2^18 <= 8191; s >= 362; |w G| < 2^31.
_TAIL = """
    square = Mul (w, w)
    squares = MatMul (square, ones)
    p = Div (epsilon_, taller)
    p_square = Mul (p, p)
    v = Add (squares, p_square)
    place = Div (v, root_step)
    r = Gather <axis = 0> (roots, place)
    ratio = Div (v, r)
    s = Add (r, ratio)
    product = Mul (w, gamma)
    quotient = Div (product, s)
"""
_INT32 = "y = Add (quotient, beta)"
# 0 <= inside < 2^16
_BYTE = """
    none = Constant <value = int32 {{0}}> ()
    moved = Add (quotient, beta)
    inside = Clip (moved, none, top_)
    steps = Div (inside, fractions_)
    {lowest}
    y = Cast <to : int = @to> ({steps})
"""
_LOWEST = """lowest = Constant <value = int32 {-128}> ()
    placed = Add (steps, lowest)"""


@dataclass(frozen=True)
class _Lean(_Norm):
    """What both share; the fields are those of the kernels in `ilayernorm`. Raises ValueError outside the domain."""

    domain: ClassVar[str] = (
        "|x| <= 2^29, any row; D >= 2^11 (RMSNorm 2^10), so d <= 1790; int32 and 8 bits; "
        "2 sqrt(d) |gamma| D < 2^31 output scales (8 bits: 2^28), |gamma| <= 12,386 for d = 384; "
        "|beta| <= 2^29 output scales (8 bits: 2^22); sqrt(d epsilon) A / unit < 2^31 input scales"
    )
    shared: ClassVar[frozenset[str]] = frozenset({"ones", "roots"})
    _least_reach: ClassVar[int]
    _error: ClassVar[float]  # of one w, in steps of e

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in _KINDS:
            raise ValueError(f"{self.stem}: output type {self.dtype!r}: it must be one of {', '.join(_KINDS)}")
        within(f"{self.stem}: input bits", self.input_bits, 1, INPUT_BITS, "the height of a row must fit int32")
        within(f"{self.stem}: steps in a row", self.reach, self._least_reach, _MOST_REACH, "the row is too long for this form")
        least = 1 if self.dtype == "int32" else _LEAST_FRACTIONS
        what = f"{self.stem}: gamma / output scale, times 2 D sqrt d"
        within(what, self._steepest * least, 0, _A - self.reach, "take a larger output scale")
        most = _MOST_BETA if self.dtype == "int32" else _MOST_BETA // _MOST_FRACTIONS
        peak = max((abs(value) for value in self.beta), default=0.0) / self.y_scale
        within(f"{self.stem}: beta / output scale", peak, 0, most, "take a larger output scale")
        within(f"{self.stem}: sqrt(d epsilon) in its steps", self._epsilon_steps, 0, _A - 1, "take a larger input scale")

    # --- constants --------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """The least with A div unit <= D."""
        return _A // (self.reach + 1) + 1

    @property
    def fractions(self) -> int:
        """Steps of the quotient in one of the output: the largest power of two up to 128 for which w G fits; 1 for int32."""
        if self.dtype == "int32":
            return 1
        found = _MOST_FRACTIONS
        while found * self._steepest > _A - self.reach:
            found //= 2
        return found

    @property
    def _steepest(self) -> float:
        """The largest |w G| for one fraction."""
        return max(abs(value) for value in self.gamma) / self.y_scale * 2 * sqrt(self.d) * self.reach

    @property
    def _epsilon_root(self) -> float:
        """P: sqrt(d epsilon) in input scales."""
        return sqrt(self.d * self.epsilon) / self.scale

    @property
    def _epsilon_steps(self) -> float:
        return self._epsilon_root * _A / self.unit

    @cached_property
    def _channels(self) -> dict[str, Array]:
        gain = np.asarray(self.gamma, np.float64) / self.y_scale * self.fractions
        beta = np.asarray(self.beta or np.zeros(self.d), np.float64) / self.y_scale + self.y_zero_point
        if self.dtype != "int32":
            beta = (beta - np.iinfo(self.dtype).min + 0.5) * self.fractions
        return {"gamma": np.rint(2 * sqrt(self.d) * gain).astype(np.int32), "beta": np.rint(beta).astype(np.int32)}

    # --- the protocol -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """ILayerNormLean, IRmsNormLean for int32; U8, S8; Plain where int32 has no beta and no zero point to add."""
        if self.dtype == "int32":
            return self.stem if self._channels["beta"].any() else f"{self.stem}Plain"
        return f"{self.stem}{'U8' if self.dtype == 'uint8' else 'S8'}"

    @property
    def _height(self) -> int:
        """Steps of e that a row has at least, unless epsilon is most of v: f max(height, least) > A - 2^input_bits."""
        return int(self.reach * (1 - 2.0 ** (self.input_bits - 31))) - 1

    @property
    def _least_square(self) -> float:
        """The least v of a row that is not flat."""
        raise NotImplementedError

    @property
    def _noise(self) -> float:
        """The largest norm of the errors of a row's w."""
        raise NotImplementedError

    @property
    def tolerance(self) -> float:
        """For the worst row there is; docs/kernels-layernorm.md derives it. Typical rows are within two steps."""
        root, gain = sqrt(self.d), max(abs(value) for value in self.gamma) / self.y_scale
        limits = np.iinfo(self.dtype)
        offset = max((abs(value) for value in self.beta), default=0.0) / self.y_scale
        spread = min(gain * root, float(limits.max) - float(limits.min) + offset)  # |y - beta| that is not saturated
        norm = sqrt(self._least_square)
        of_norm = (self._noise + 1.5 + self._epsilon_root / self.unit) / norm
        # s is above 2 sqrt v by what the step of Newton leaves, below it by the floor
        indices = np.arange(int(self._least_square) >> _ROOT_SHIFT, len(_ROOTS))
        ends = np.sqrt(np.maximum(np.stack([indices, indices + 1]) * 2.0**_ROOT_SHIFT, self._least_square))
        newton = float(((_ROOTS[indices] + ends**2 / _ROOTS[indices]) / (2 * ends)).max()) - 1
        sharp = (1 - min(of_norm, 0.9)) * (1 - 1 / (2 * norm))
        steps = gain * root * self._error / norm / sharp + spread * (1 / sharp - 1 + (1 + of_norm) * newton)
        rounded = 0.5 if self.dtype != "int32" else 0.0
        return self.y_scale * (rounded + (1 + 0.5 + 0.3) / self.fractions + steps)

    def attributes(self) -> dict[str, int]:
        """The constants of the formula that are one number."""
        epsilon = round(self._epsilon_steps)
        found = {"unit": self.unit, "least": max(1, ceil(epsilon / _EPSILON_ROOT)), "epsilon": epsilon}
        if self.dtype != "int32":
            limits = np.iinfo(self.dtype)
            top = (int(limits.max) - int(limits.min) + 1) * self.fractions - 1
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
            found.update({"fractions": self.fractions, "top": top, "to": kind})
        return found

    def constants(self) -> dict[str, Array]:
        """G and B, one a channel; the column of ones that sums a row; square roots."""
        channels = dict(self._channels)
        if self.name.endswith("Plain"):
            del channels["beta"]
        return {**channels, "ones": np.ones((self.d, 1), np.int32), "roots": _ROOTS}

    def reference(self, *inputs: Array) -> Array:
        """The formula in int64. Raises ValueError for rows of another length, and for values beyond `input_bits`."""
        x = self._row(inputs[0])
        made, channels = self.attributes(), self._channels
        w, taller = self._equalised(x)[:2]
        p = made["epsilon"] // taller
        v = (w * w).sum(-1, keepdims=True) + p * p
        r = _ROOTS[v >> _ROOT_SHIFT].astype(np.int64)
        moved = _truncated(w * channels["gamma"], r + v // r) + channels["beta"]
        if self.dtype != "int32":
            moved = np.clip(moved, 0, made["top"]) // self.fractions + np.iinfo(self.dtype).min
        return np.asarray(moved).astype(self.dtype)

    def lower(self) -> FunctionProto:
        """One function for each name."""
        end = _INT32 if self.dtype == "int32" else _BYTE.format(steps="steps", lowest="")
        if self.name.endswith("Plain"):
            end = "y = Identity (quotient)"
        elif self.dtype == "int8":
            end = _BYTE.format(steps="placed", lowest=_LOWEST)
        text = f"""{self.name} <{", ".join(self.attributes())}> (x, {", ".join(self.constants())}) => (y) {{
            axis = Constant <value_ints = [-1]> ()
            most = Constant <value = int32 {{{_A}}}> ()
            root_step = Constant <value = int32 {{{1 << _ROOT_SHIFT}}}> ()
            {self._head()} {_TAIL} {end}
        }}"""
        return function(text, {a: TensorProto.INT32 for a in self.attributes() if a != "to"})


@dataclass(frozen=True)
class ILayerNormLean(_Lean, ILayerNorm):
    """LayerNormalization over the last axis, of int32."""

    stem: ClassVar[str] = "ILayerNormLean"
    _least_reach: ClassVar[int] = 2**11
    _error: ClassVar[float] = 1.5  # the floors of a row are within 1 of each other, and the mean is rounded

    @property
    def reach(self) -> int:
        """D: d (D^2 + 1)/4 <= room. (Sum of squares about the mean: d D^2/4 at most, Popoviciu; d/4 as the mean is rounded.)"""
        return min(isqrt(max(0, 4 * _ROOM // self.d - 1)), _MOST_REACH)

    @property
    def _least_square(self) -> float:
        return self._height**2 / 2  # the lowest and the highest value

    @property
    def _noise(self) -> float:
        return sqrt(self.d / 2)  # floors within 1 of each other: variance 1/4 at most; the mean: 1/4

    def _equalised(self, x: Array) -> tuple[Array, Array, Array | int]:
        high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
        taller = np.maximum(high - low, self.attributes()["least"])
        e = (x - low) * (_A // taller) // self.unit
        return e - (e.sum(-1, keepdims=True) + self.d // 2) // self.d, taller, 1

    def _head(self) -> str:
        return _LAYER

    def attributes(self) -> dict[str, int]:
        """Those of both, d and half of it."""
        return {**super().attributes(), "d": self.d, "half": self.d // 2}


@dataclass(frozen=True)
class IRmsNormLean(_Lean, IRmsNorm):
    """RMSNorm over the last axis, of int32."""

    stem: ClassVar[str] = "IRmsNormLean"
    _least_reach: ClassVar[int] = 2**10
    _error: ClassVar[float] = 1.0

    @property
    def reach(self) -> int:
        """D: d D^2 <= room."""
        return min(isqrt(_ROOM // self.d), _MOST_REACH)

    @property
    def _least_square(self) -> float:
        return float(self._height**2)

    @property
    def _noise(self) -> float:
        return sqrt(self.d)

    def _equalised(self, x: Array) -> tuple[Array, Array, Array | int]:
        taller = np.maximum(np.abs(x).max(-1, keepdims=True), self.attributes()["least"])
        return _truncated(x * (_A // taller), self.unit), taller, 1

    def _head(self) -> str:
        return _RMS
