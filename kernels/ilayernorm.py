"""i-LayerNorm and RMSNorm of integer rows, for any row: each is brought to one size before its squares are summed.

Source: Ba, Kiros, Hinton, "Layer Normalization", 2016, equations 3-4; Zhang, Sennrich, "Root Mean Square Layer Normalization",
2019, equation 4; I-BERT (2021), section 3.6, for the integer square root. Its static scales wrap for rows that calibration has
not seen.

    y = gamma (x - mean) / sqrt(var + epsilon) + beta             RMSNorm: without the mean (and, as a rule, without beta)

Normalisation does not see the size of a row. With d values a row, all in integers, `div` truncating:

    u = x - (max + min) div 2;   t = sum u                        RMSNorm: u = x, t = 0, d = 1 in the next two lines
    f = A div max |d u - t|,  A = 2^29 - 1                        the largest factor that d u - t, the deviation, has room for
    e = (d u - t) f / 2^29 * R, rounded to nearest                so R/2 <= max |e| <= R, whatever the row was
    v = 4^j sum e^2 + (P f)^2                                     P: epsilon in steps of e; 2^j makes the root long enough
    s = round(floor(sqrt v) kappa / (sqrt d 2^j))                 sigma in steps of e, times kappa
    y = floor( (e G + F (s div 32) ) / s ) + B,                   G = round(gamma kappa / Sy), B + F/32 = beta / Sy + 1/2

One division gives y in steps of its own scale, rounded once: the fraction of beta (in 1/32) and the half are inside it. Negative
quotients are kept out by adding a multiple of s. Negative gamma is a negative G. **Wide**: where rows may be wider than 2^W
with d 2^W < A, u is first divided by the least k that brings it to W bits (16 and more, for d <= 8192): nothing is known of the
row beforehand.

A constant row is e = 0, so y = beta; s >= 1 always. 64 bits are used for numbers a row (v and its root) alone, and no 64-bit
Min, Max or Clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import floor, isfinite, isqrt, log2, sqrt
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from qcompile.kernels import _norm_text as text_of
from qcompile.kernels._protocol import Array, Float64, Kernel, function, within
from qcompile.kernels.isqrt import integer_root, root_text

_A = 2**29 - 1
_R_FINE = 2**14
_R_LEAST = 2**11  # of the short form: smaller costs more than 0.1 step of 8 bits
_N = (2**31 - 1) // 10  # |e G| <= N and s <= 4 N: 2 N + 2 s < 2^31
_WIDEST = 2**14
_MOST_GAIN = 2.0**15
_FRACTIONS = 32
_EPSILON_BITS = 24
_RATIO_BITS = 22
_RMS_BITS = 28
_TYPES = ("int8", "uint8", "int16", "uint16", "int32")


@dataclass(frozen=True)
class _Norm(Kernel):
    """What both share: int32 rows [..., d] as rows of `dtype` with `y_scale` and `y_zero_point`.

    scale: of the input, whose zero point is subtracted before (i-LayerNorm does not see it). gamma, beta: real, one a channel;
    no beta is 0.
    input_bits: what is known of the input, |x| <= 2^(input_bits - 1); 32 holds for any.
    """

    scale: float
    gamma: tuple[float, ...]
    y_scale: float
    beta: tuple[float, ...] = ()
    y_zero_point: int = 0
    dtype: str = "int16"
    epsilon: float = 1e-5
    input_bits: int = 32

    stem: ClassVar[str]
    shared: ClassVar[frozenset[str]] = frozenset({"ones"})
    domain: ClassVar[str] = (
        "int32, any row; 1 <= d <= 2^14; |gamma| <= 2^15 output scales, |beta| <= 2^29 of them; "
        "d sqrt(d epsilon) at most 2^40 input scales (RMSNorm: without the first d)"
    )
    TOLERANCE: ClassVar[float] = 0.5  # output steps: rounding. `tolerance` adds what grows with d and gamma

    def __post_init__(self) -> None:
        what = self.stem
        within(f"{what}: row length", self.d, 1, _WIDEST, "longer rows leave too few bits for each value")
        if len(self.beta) not in (0, self.d):
            raise ValueError(f"{what}: {len(self.beta)} values of beta for {self.d} of gamma: give as many, or none")
        if self.dtype not in _TYPES:
            raise ValueError(f"{what}: output type {self.dtype!r}: it must be one of {', '.join(_TYPES)}")
        for scale, which in ((self.scale, "input"), (self.y_scale, "output")):
            if not (isfinite(scale) and scale > 0):
                raise ValueError(f"{what}: {which} scale {scale:g}: it must be positive and finite")
        within(f"{what}: input bits", self.input_bits, 1, 32, "the input is int32")
        limits = np.iinfo(self.dtype)
        within(f"{what}: output zero point", self.y_zero_point, limits.min, limits.max, "it must be a value of the output")
        for value in self.gamma:
            within(f"{what}: gamma / output scale", value / self.y_scale, -_MOST_GAIN, _MOST_GAIN, "take a larger output scale")
        for value in self.beta:
            within(f"{what}: beta / output scale", value / self.y_scale, -(2.0**29), 2.0**29, "take a larger output scale")
        if not (isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"{what}: epsilon {self.epsilon:g}: it must be finite and not negative")
        # P f < 2^30 is needed for the least f, which is 1
        within(f"{what}: sqrt(epsilon) / input scale, in steps", self._epsilon, 0, 2.0**30 - 1, "take a larger input scale")

    # --- constants: each is one number for the whole tensor, or one a channel -------------------------------------

    @property
    def d(self) -> int:
        """Values in a row."""
        return len(self.gamma)

    @property
    def _factor(self) -> int:
        """What u is multiplied by before t is subtracted: d where there is a mean."""
        raise NotImplementedError

    @property
    def _row_bits(self) -> int:
        """W: |u| <= 2^(W-1) leaves every product below 2^31."""
        raise NotImplementedError

    @property
    def _wide(self) -> bool:
        return self.input_bits > self._row_bits

    @property
    def reach(self) -> int:
        """R: 2^14; for 8 bits the largest whose squares add up to less than 2^31, where that is 2^11 or more."""
        short = min(isqrt((2**31 - 1) // self.d), _R_FINE)
        return short if np.iinfo(self.dtype).bits == 8 and short >= _R_LEAST else _R_FINE

    @property
    def _fine(self) -> bool:
        return self.d * self.reach**2 >= 2**31

    @property
    def unit(self) -> int:
        """ceil(2^29 / R): one step of e."""
        return -(-(2**29) // self.reach)

    @property
    def _j(self) -> int:
        """4 to 7: floor(sqrt v) >= 2^17 for any row that is not constant, and d (R 2^j)^2 <= 2^52."""
        return 19 - self.reach.bit_length()

    @property
    def _epsilon(self) -> float:
        """P: sqrt(d epsilon) * 2^j in steps of e, for f = 1."""
        return 2.0**self._j * sqrt(self.d * self.epsilon) * self._factor / (self.scale * self.unit)

    @property
    def kappa(self) -> float:
        """Steps of G for one of gamma / Sy: as many as N leaves room for."""
        most = max(1.0, *(abs(value) / self.y_scale for value in self.gamma))
        return (_N // self.reach) / most

    @property
    def _ratio(self) -> tuple[int, int]:
        """kappa / (sqrt d 2^j) as b / unit, 2^22 <= b <= 2^23. At least 2^-16, at most 2^17, so unit is 2^5 .. 2^38."""
        ratio = self.kappa / (sqrt(self.d) * 2**self._j)
        power = _RATIO_BITS - floor(log2(ratio))
        return round(ratio * 2.0**power), 1 << power

    @cached_property
    def _channels(self) -> dict[str, Array]:
        gamma = np.asarray(self.gamma, np.float64) / self.y_scale
        beta = np.asarray(self.beta or np.zeros(self.d), np.float64) / self.y_scale
        whole = np.floor(beta + 0.5)
        return {
            "gamma": np.rint(gamma * self.kappa).astype(np.int32),
            "fraction": np.rint((beta + 0.5 - whole) * _FRACTIONS).astype(np.int32),
            "beta": (whole + self.y_zero_point).astype(np.int32),
        }

    # --- the protocol -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """ILayerNorm or IRmsNorm; Wide: any int32 row; Fine: squares in two limbs."""
        return f"{self.stem}{'Wide' if self._wide else ''}{'Fine' if self._fine else ''}"

    @property
    def output_scale(self) -> float:
        """As given."""
        return self.y_scale

    @property
    def output_zero_point(self) -> int:
        """As given."""
        return self.y_zero_point

    @property
    def tolerance(self) -> float:
        """For the worst row there is; docs/kernels-layernorm.md derives it. Typical rows are within a step."""
        root, gain = sqrt(self.d), max(abs(value) for value in self.gamma) / self.y_scale
        limits = np.iinfo(self.dtype)
        offset = max((abs(value) for value in self.beta), default=0.0) / self.y_scale
        spread = min(gain * root, float(limits.max) - float(limits.min) + offset)  # |y - beta| that is not saturated
        h = 1 / self.reach + (2.0 ** (2 - self._row_bits) if self._wide else 0)  # of one value, where the largest is 1
        least = self.kappa * self.reach / (2 * root)  # of s
        of_sigma = min(gain * (root + 0.385 * self.d), spread * (1 + root) / 2)
        steps = h * (gain * root + of_sigma) + spread * (2.0**-16 + 0.5 / least) + root * 0.5 / self.kappa
        return self.y_scale * (self.TOLERANCE + 0.5 / _FRACTIONS + _FRACTIONS / least + max(steps, 0.25))

    def attributes(self) -> dict[str, int]:
        """The constants of the formula that are one number."""
        b, unit = self._ratio
        limits = np.iinfo(self.dtype)
        cap = min(2**30 - 1, floor((2.0**30 - 1) / self._epsilon)) if self._epsilon > 0 else 2**30 - 1
        found = {
            "cap": cap,
            "unit": self.unit,
            "reach": self.reach,
            "offset": self.reach * self.unit + self.unit // 2,
            "longer": 4**self._j,
            "epsilon": round(self._epsilon * 2.0**_EPSILON_BITS),
            "ratio": b,
            "ratio_unit": unit,
            "low": int(limits.min),
            "high": int(limits.max),
            "to": helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)),
        }
        return {**found, "room": 1 << (self._row_bits - 1)} if self._wide else found

    def constants(self) -> dict[str, Array]:
        """G, F and B + zero point, one a channel; the column of ones that sums a row."""
        return {**self._channels, "ones": np.ones((self.d, 1), np.int32)}

    def reference(self, *inputs: Array) -> Array:
        """The formula in int64. Raises ValueError for rows of another length, and for values beyond `input_bits`."""
        x = self._row(inputs[0])
        made, channels = self.attributes(), self._channels
        e, f, k = self._equalised(x)
        g = made["epsilon"] * f // ((1 << _EPSILON_BITS) * k)
        root = integer_root((e * e).sum(-1, keepdims=True) * made["longer"] + g * g)
        s = np.clip((root * made["ratio"] + made["ratio_unit"] // 2) // made["ratio_unit"], 1, 4 * _N)
        y = (e * channels["gamma"] + s // _FRACTIONS * channels["fraction"]) // s + channels["beta"]
        return np.asarray(np.clip(y, made["low"], made["high"])).astype(self.dtype)

    def _row(self, given: Array) -> Array:
        """The input in int64, checked."""
        x = given.astype(np.int64)
        if x.shape[-1] != self.d:
            raise ValueError(f"{self.stem}: rows of {x.shape[-1]} values, made for {self.d}")
        most = 1 << (self.input_bits - 1)
        if x.size and max(-int(x.min()), int(x.max())) > most:
            raise ValueError(f"{self.stem}: the input reaches {int(x.min())} .. {int(x.max())}, made for {self.input_bits} bits")
        return x

    def _equalised(self, x: Array) -> tuple[Array, Array, Array | int]:
        """e [..., d], f and k [..., 1], in int64."""
        raise NotImplementedError

    def _rounded(self, deviation: Array, largest: Array) -> tuple[Array, Array]:
        f = np.minimum(_A // largest, self.attributes()["cap"])
        return (deviation * f + self.unit // 2) // self.unit, f

    def lower(self) -> FunctionProto:
        """One function for each name."""
        text = f"""{self.name} <{", ".join(self.attributes())}> (x, {", ".join(self.constants())}) => (y) {{
            {text_of.LITERALS} {text_of.ENDS} {self._head()} {text_of.STEPS}
            {text_of.FINE_SQUARES if self._fine else text_of.SHORT_SQUARES}
            {text_of.WIDE_DIVISOR if self._wide else "divisor = Identity (epsilon_unit)"} {text_of.SIGMA}
            {root_text("v", "root", wide=True)} {text_of.TAIL}
        }}"""
        wide = ("longer", "epsilon", "ratio", "ratio_unit")
        kinds = {a: TensorProto.INT64 if a in wide else TensorProto.INT32 for a in self.attributes() if a != "to"}
        return function(text, kinds)

    def _head(self) -> str:
        """The lines that make f and, before the division, e of x."""
        raise NotImplementedError

    def _normalised(self, x: Float64) -> Float64:
        """The float64 function of real rows `x`, their mean taken off where that belongs to it."""
        limits = np.iinfo(self.dtype)
        sigma = np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        unit = np.divide(x, sigma, out=np.zeros_like(x), where=sigma > 0)  # a constant row, epsilon = 0
        y = unit * np.asarray(self.gamma) + np.asarray(self.beta or 0.0)
        low, high = ((float(end) - self.y_zero_point) * self.y_scale for end in (limits.min, limits.max))
        return np.asarray(np.clip(y, low, high))


def _truncated(a: Array, b: Array | int) -> Array:
    """a div b towards 0, as ONNX's Div."""
    return np.asarray(np.sign(a) * (np.abs(a) // b))


@dataclass(frozen=True)
class ILayerNorm(_Norm):
    """LayerNormalization over the last axis, of int32."""

    stem: ClassVar[str] = "ILayerNorm"
    source: ClassVar[str] = "Layer Normalization (2016), equations 3-4; I-BERT (2021), section 3.6"

    @property
    def _factor(self) -> int:
        return self.d

    @property
    def _row_bits(self) -> int:
        return (_A // self.d).bit_length() - 1  # d 2^W <= A

    def _equalised(self, x: Array) -> tuple[Array, Array, Array | int]:
        high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
        k: Array | int = 1
        if self._wide:
            centre = _truncated(high + low + 1, 2)
            k = np.maximum(high - centre, centre - low - 1) // (1 << (self._row_bits - 1)) + 1
        else:
            centre = _truncated(high + low, 2)
        u = _truncated(x - centre, k)
        deviation = self.d * u - u.sum(-1, keepdims=True)
        e, f = self._rounded(deviation, np.maximum(np.abs(deviation).max(-1, keepdims=True), self.d))
        return e, f, k

    def _head(self) -> str:
        return (
            (text_of.WIDE_CENTRE if self._wide else text_of.CENTRE)
            + text_of.DEVIATION
            + text_of.FACTOR
            + text_of.SCALED_DEVIATION
        )

    def oracle(self, *inputs: Array) -> Float64:
        """LayerNorm in float64, within the range of the output."""
        x = inputs[0].astype(np.float64)
        return self._normalised((x - x.mean(-1, keepdims=True)) * self.scale)


@dataclass(frozen=True)
class IRmsNorm(_Norm):
    """RMSNorm over the last axis, of int32."""

    stem: ClassVar[str] = "IRmsNorm"
    source: ClassVar[str] = "Root Mean Square Layer Normalization (2019), equation 4"

    @property
    def _factor(self) -> int:
        return 1

    @property
    def _row_bits(self) -> int:
        return _RMS_BITS + 1  # |u| <= 2^28 <= A

    def _equalised(self, x: Array) -> tuple[Array, Array, Array | int]:
        high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
        k = np.maximum(high, -1 - low) // (1 << _RMS_BITS) + 1 if self._wide else 1
        u = _truncated(x, k)
        e, f = self._rounded(u, np.maximum(np.abs(u).max(-1, keepdims=True), 1))
        return e, f, k

    def _head(self) -> str:
        return (text_of.WIDE_SIZE if self._wide else text_of.SIZE) + text_of.MAGNITUDE + text_of.FACTOR + text_of.SCALED_MAGNITUDE

    def oracle(self, *inputs: Array) -> Float64:
        """RMSNorm in float64, within the range of the output."""
        return self._normalised(inputs[0].astype(np.float64) * self.scale)
