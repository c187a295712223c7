"""i-exp and i-Softmax: softmax of integer scores by a polynomial of degree 2 and shifts.

Source: Kim, Gholami, Yao, Mahoney, Keutzer, "I-BERT: Integer-only BERT Quantization", 2021, equations 10-13.

    x - max = -z ln2 + p,  z a whole number, p in (-ln2, 0]        exp(x - max) = exp(p) / 2^z                (10, 11)
    exp(p) ~ L(p) = 0.3585 (p + 1.353)^2 + 0.344                   error at most 2.13e-3 in float64           (12, 13)

On integers q with scale S the constants are ln2 = round(ln 2 / S), b = round(1.353 / S), c = round(0.344 / (0.3585 S^2)).
The paper takes the floor, which costs ten times the error (2.4e-2) at S = 2e-3. One step of the value is 0.3585 S^2; only
ratios to the value at the maximum are used, so that step falls out.

Three forms by scale; the name of the function says which. Plain, 4e-5 <= S <= 2e-3: as above. Coarse, up to 1: distances times
2^k first, which adds no error. Fine, down to 2^-26: distances divided by 2^k first (its error, one step of 2^-13 at most, is
within the tolerance).

Masked positions (`keep` False) give exactly 0. A row with nothing kept is all 0, where float softmax would be NaN or uniform.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, log, log2
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto

from qcompile.kernels._protocol import Array, Float64, Kernel, function, within
from qcompile.kernels._rows import distance, distance_text, exponentials

_A, _B, _C = 0.3585, 1.353, 0.344
_FINEST, _COARSEST = 2.0**-26, 1.0
_PLAIN_LOW, _PLAIN_HIGH = 4e-5, 2e-3
_FINE_TARGET, _COARSE_TARGET = -13, -12  # log2 of the largest scale after the change
_SUM_BITS = 30
_MAX_LONGEST = 4096
_LEVELS_BITS = 8
_WIDE_LEVELS_BITS = 14

# z <= 31 and p in (-ln2, 0], so b + p in (0, b] and (b + p)^2 + c <= b^2 + c = the value at the maximum, which `_Polynomial`
# checks to be below 2^31. z * ln2 <= distance < 2^31.
VALUE = """
    z = Div (t, ln2_)
    whole = Mul (z, ln2_)
    p = Sub (whole, t)
    shifted = Add (p, b_)
    square = Mul (shifted, shifted)
    value = Add (square, c_)
    value_u = Cast <to = 12> (value)
"""
_FORMS = {
    "": "t = Identity (distance)",
    "Coarse": "t = Mul (distance, step_)",
    "Fine": "t = Div (distance, step_)",
}


@dataclass(frozen=True)
class _Polynomial:
    """The integers of i-exp for one scale of the scores: form, step = 2^k, round(ln2/S), round(b/S), round(c/(a S^2))."""

    form: str
    step: int
    ln2: int
    b: int
    c: int

    @classmethod
    def of(cls, scale: float) -> _Polynomial:
        """For scores with this scale; raises ValueError outside the domain."""
        within("i-exp: scale of the scores", scale, _FINEST, _COARSEST, "rescale the scores first")
        form, power = "", 0
        if scale > _PLAIN_HIGH:
            form, power = "Coarse", ceil(log2(scale)) - _COARSE_TARGET
            inner = scale * 2.0**-power
        elif scale < _PLAIN_LOW:
            form, power = "Fine", _FINE_TARGET - ceil(log2(scale))
            inner = scale * 2.0**power
        else:
            inner = scale
        made = cls(form, 1 << power, round(log(2) / inner), round(_B / inner), round(_C / (_A * inner * inner)))
        # b^2 + c = 2.79 / S^2 < 2^31 for S > 3.61e-5
        assert made.top < 2**31
        return made

    @property
    def top(self) -> int:
        """The value at the maximum of a row, the largest there is."""
        return self.b * self.b + self.c

    def limit(self, halvings: int) -> int:
        """The least distance that is at least `halvings` times ln2.

        Coarse: times step it is below halvings * ln2 + step, and step <= 2^12 < 2 ln2 (ln2 >= 2839 there), so z <= halvings + 1.
        Fine: at most 22 * 11357 * 2^13 < 2^31.
        """
        whole = halvings * self.ln2
        return whole * self.step if self.form == "Fine" else -(-whole // self.step) if self.form == "Coarse" else whole

    def halved(self, distances: Array) -> tuple[Array, Array]:
        """(value, z) in int64: exp(-distance) is value / top / 2^z."""
        t = distances // self.step if self.form == "Fine" else distances * self.step
        z = t // self.ln2
        return (z * self.ln2 - t + self.b) ** 2 + self.c, z


@dataclass(frozen=True)
class _OfScores(Kernel):
    """What i-exp and i-Softmax share: int32 scores [..., keys], `keep` bool that broadcasts to them where masked."""

    scale: float
    masked: bool = False
    polynomial: _Polynomial = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "polynomial", _Polynomial.of(self.scale))

    @property
    def _inputs(self) -> str:
        return "x, keep" if self.masked else "x"

    def _prefix(self) -> str:
        return distance_text(self.masked) + _FORMS[self.polynomial.form] + VALUE

    def _name(self, stem: str) -> str:
        return f"I{'Masked' if self.masked else ''}{stem}{self.polynomial.form}"

    def _attributes(self, halvings: int) -> dict[str, int]:
        made = self.polynomial
        step = {} if made.form == "" else {"step": made.step}
        return {**step, "limit": made.limit(halvings), "ln2": made.ln2, "b": made.b, "c": made.c}


@dataclass(frozen=True)
class IExp(_OfScores):
    """exp(x - max of the row) as u8, 255 at the maximum: to be multiplied with V first, then divided by its own row sum.

    value * m / 2^(19 + z) with m = round(255 * 2^19 / (top >> guard)), rounded half up.
    """

    source: ClassVar[str] = "I-BERT (2021), equations 10-13"
    domain: ClassVar[str] = "int32 scores, any; scale 2^-26..1"
    TOLERANCE: ClassVar[float] = 2.1e-3 + 0.5 / 255  # i-exp, and half a step

    @property
    def name(self) -> str:
        """IExp, IMaskedExp, and the form."""
        return self._name("Exp")

    @property
    def output_scale(self) -> float:
        """1/255."""
        return 1 / 255

    # At z = 9 half a step is not reached: 255/512 < .5, so there and at every larger distance the output is 0.
    _HALVINGS: ClassVar[int] = 9
    _SHIFT: ClassVar[int] = 19

    @property
    def _guard(self) -> int:
        return self.polynomial.top.bit_length() - 16  # >= 0: top > 2^19

    @property
    def _factor(self) -> int:
        # top >> guard lies in [2^15, 2^16), so the factor in [2040, 4080]. At the maximum the product is within 2^15 of
        # 255 * 2^19: it rounds to 255, and never above.
        return round((255 << self._SHIFT) / (self.polynomial.top >> self._guard))

    def attributes(self) -> dict[str, int]:
        """limit, ln2, b, c of the polynomial; guard and factor of the result."""
        return {**self._attributes(self._HALVINGS), "guard": self._guard, "factor": self._factor}

    def reference(self, *inputs: Array) -> Array:
        """u8 [..., keys] of int32 scores [..., keys] and, where masked, bool keep."""
        scores, keep = inputs[0], inputs[1] if self.masked else None
        value, z = self.polynomial.halved(distance(scores, keep, self._attributes(self._HALVINGS)["limit"]))
        product = (value >> self._guard) * self._factor
        return np.asarray(((product >> (z + self._SHIFT - 1)) + 1) >> 1).astype(np.uint8)

    def lower(self) -> FunctionProto:
        """One function for each name."""
        head = f"{self.name} <{', '.join(self.attributes())}> ({self._inputs}) => (y)"
        return self._function(f"{head} {{ {self._prefix()} {self._result('y')} }}")

    def _result(self, output: str) -> str:
        """The lines that make u8 `output` of value_u and z."""
        # product < 2^16 * 2^12 = 2^28; z + 18 <= 28; half = product >> (z + 18) <= 510.
        return f"""
            small = BitShift <direction = "RIGHT"> (value_u, guard_)
            product = Mul (small, factor_)
            shift_wide = Constant <value_int = {self._SHIFT - 1}> ()
            shift_least = Cast <to = 6> (shift_wide)
            shift = Add (z, shift_least)
            shift_u = Cast <to = 12> (shift)
            half = BitShift <direction = "RIGHT"> (product, shift_u)
            one_wide = Constant <value_int = 1> ()
            one = Cast <to = 12> (one_wide)
            up = Add (half, one)
            rounded = BitShift <direction = "RIGHT"> (up, one)
            {output} = Cast <to = 2> (rounded)
        """

    def _function(self, text: str) -> FunctionProto:
        unsigned = {"guard": TensorProto.UINT32, "factor": TensorProto.UINT32}
        return function(text, {name: unsigned.get(name, TensorProto.INT32) for name in self.attributes()})

    def oracle(self, *inputs: Array) -> Float64:
        """exp((x - max) * scale), 0 where masked."""
        return exponentials(inputs[0], inputs[1] if self.masked else None, self.scale)


@dataclass(frozen=True)
class ISoftmax(_OfScores):
    """Softmax over the last axis as u8 with scale 1/levels: e = value >> (z + guard), y = (e * levels + sum/2) div sum, half up.

    longest: keys a row has at most. e has as many bits as leave room for their sum and for e * levels: 22 up to 256 keys.
    levels: 256 as onnxruntime's QLinearSoftmax wants it (a probability of 1 is 255/256), or 255. wide: int32 with up to 2^14
    levels instead, for probabilities that are a result.
    """

    longest: int = 512
    levels: int = 256
    wide: bool = False

    source: ClassVar[str] = "I-BERT (2021), equations 10-13"
    domain: ClassVar[str] = "int32 scores, any; scale 2^-26..1; at most `longest` <= 4096 keys"
    TOLERANCE: ClassVar[float] = 2.0e-3  # without the two terms that `tolerance` adds

    def __post_init__(self) -> None:
        super().__post_init__()
        within("i-Softmax: longest row", self.longest, 1, _MAX_LONGEST, "longer rows leave too few bits for each key")
        most = 2 ** (_WIDE_LEVELS_BITS if self.wide else _LEVELS_BITS)
        within("i-Softmax: levels", self.levels, 1, most, "the output is u8, or int32 where wide")

    @property
    def name(self) -> str:
        """ISoftmax, IMaskedSoftmax, Wide where the output is, and the form."""
        return self._name("SoftmaxWide" if self.wide else "Softmax")

    @property
    def output_scale(self) -> float:
        """1/levels."""
        return 1 / self.levels

    @property
    def tolerance(self) -> float:
        """Twice i-exp's relative error (3.1e-3) at p (1 - p) <= 1/4; half a step; a unit of e for each key."""
        return self.TOLERANCE + 0.5 / self.levels + self.longest * 2.0**self._guard / self.polynomial.top

    @property
    def _bits(self) -> int:
        """Of e: longest * 2^bits <= 2^30, 2^bits * levels <= 2^30."""
        levels = _WIDE_LEVELS_BITS if self.wide else _LEVELS_BITS
        return _SUM_BITS - max(levels, (self.longest - 1).bit_length())

    @property
    def _guard(self) -> int:
        return max(0, self.polynomial.top.bit_length() - self._bits)

    @property
    def _halvings(self) -> int:
        """value >> (z + guard) is 0 from here on: z + guard is the number of bits of top."""
        return self.polynomial.top.bit_length() - self._guard

    def attributes(self) -> dict[str, int]:
        """limit, ln2, b, c of the polynomial; guard and levels of the result."""
        return {**self._attributes(self._halvings), "guard": self._guard, "levels": self.levels}

    def reference(self, *inputs: Array) -> Array:
        """u8 [..., keys] of int32 scores [..., keys] and, where masked, bool keep. Raises ValueError where a row is too long."""
        scores, keep = inputs[0], inputs[1] if self.masked else None
        if scores.shape[-1] > self.longest:
            raise ValueError(f"i-Softmax: a row of {scores.shape[-1]} keys, made for at most {self.longest}: raise `longest`")
        value, z = self.polynomial.halved(distance(scores, keep, self._attributes(self._halvings)["limit"]))
        e = value >> (z + self._guard)
        total = np.maximum(e.sum(-1, keepdims=True), 1)
        ratio = (e * self.levels + total // 2) // total
        return np.asarray(ratio, np.int32) if self.wide else np.asarray(np.minimum(ratio, 255), np.uint8)

    def lower(self) -> FunctionProto:
        """One function for each name."""
        # z + guard <= bits of top + 1 <= 31 (coarse: top < 2^28). e < 2^bits, so sum < 2^30 and e * levels + sum/2 < 2^30 + 2^29.
        end = "y = Identity (ratio)"
        if not self.wide:
            end = """most_wide = Constant <value_int = 255> ()
            most = Cast <to = 6> (most_wide)
            saturated = Min (ratio, most)
            y = Cast <to = 2> (saturated)"""
        text = f"""{self.name} <{", ".join(self.attributes())}> ({self._inputs}) => (y) {{
            {self._prefix()}
            shift = Add (z, guard_)
            shift_u = Cast <to = 12> (shift)
            e_u = BitShift <direction = "RIGHT"> (value_u, shift_u)
            e = Cast <to = 6> (e_u)
            sum = ReduceSum <keepdims = 1> (e, axis)
            one_wide = Constant <value_int = 1> ()
            one = Cast <to = 6> (one_wide)
            two = Add (one, one)
            total = Max (sum, one)
            half = Div (total, two)
            product = Mul (e, levels_)
            up = Add (product, half)
            ratio = Div (up, total)
            {end}
        }}"""
        return function(text, dict.fromkeys(self.attributes(), TensorProto.INT32))

    def oracle(self, *inputs: Array) -> Float64:
        """Softmax in float64, at most 255/levels, 0 where masked and in rows that are wholly masked."""
        e = exponentials(inputs[0], inputs[1] if self.masked else None, self.scale)
        total = e.sum(-1, keepdims=True)
        most = 1.0 if self.wide else 255 / self.levels
        return np.asarray(np.minimum(e / np.where(total == 0, 1, total), most))


def polynomial_exp(x: Float64) -> Float64:
    """i-exp in float64, for x <= 0 (equations 11-13): what the integers approach as their scale goes to 0."""
    z = np.floor(-x / log(2))
    return np.asarray((_A * (x + z * log(2) + _B) ** 2 + _C) * np.exp2(-z))
