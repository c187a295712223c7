"""What flows along the edges of a Q/DQ graph while the interpreter runs it.

A tensor is a plain numpy array, a `Quantised` value (integers with a scale: what DequantizeLinear gives), or a
`Pending` result (an exact integer accumulator that waits for its QuantizeLinear). Nothing becomes float until
something other than QuantizeLinear asks for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from qcompile.dyadic import (
    Array,
    Float32,
    Int64,
    add_requantize,
    along_axis,
    as_dyadic,
    is_exact_dyadic,
    linear_multiplier,
    mul_requantize,
    pool_multiplier,
    product_ratio,
    requantize,
    sum_ratio,
)
from qcompile.errors import DataError, ModelError

INT8 = (np.dtype(np.int8), np.dtype(np.uint8))
INTEGERS = (*INT8, np.dtype(np.int16), np.dtype(np.uint16), np.dtype(np.int32))


@dataclass(frozen=True)
class QuantParams:
    """Scale, zero point and integer type of a quantised tensor; per axis when `axis` is not None."""

    scale: Float32
    zero_point: Array
    dtype: np.dtype[Any]
    axis: int | None = None

    @property
    def low(self) -> int:
        """Least integer of the type."""
        return int(np.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        """Greatest integer of the type."""
        return int(np.iinfo(self.dtype).max)

    def shaped(self, rank: int) -> tuple[Float32, Int64]:
        """Scale and zero point, broadcastable to a tensor of `rank`."""
        return along_axis(self.scale, rank, self.axis), along_axis(self.zero_point.astype(np.int64), rank, self.axis)

    def same_grid(self, other: QuantParams) -> bool:
        """Whether both hold per-tensor parameters with the same scale, zero point and type."""
        return (
            self.axis is None
            and other.axis is None
            and self.dtype == other.dtype
            and bool(self.scale == other.scale)
            and bool(self.zero_point == other.zero_point)
        )

    def quantize(self, x: Array) -> Array:
        """QuantizeLinear of floats: float32 division, half to even, zero point added, saturated."""
        scale, zero_point = self.shaped(x.ndim)
        with np.errstate(over="ignore"):
            scaled = np.asarray(x, np.float32) / scale
        if np.isnan(scaled).any():
            raise DataError("NaN reaches a QuantizeLinear: its integer is undefined")
        # Saturated before it becomes an integer: the bounds are small integers, exact in float64.
        rounded = np.clip(np.rint(scaled.astype(np.float64)), self.low - zero_point, self.high - zero_point)
        return np.asarray((rounded.astype(np.int64) + zero_point).astype(self.dtype))


@dataclass(frozen=True)
class Quantised:
    """Integers with their parameters: the value `(data - zero_point) * scale`, not computed."""

    data: Array
    params: QuantParams

    def centred(self) -> Array:
        """`data - zero_point`: int32 for 8- and 16-bit data, int64 for int32 data."""
        wide = np.int64 if self.data.dtype.itemsize > 2 else np.int32
        zero_point = self.params.shaped(self.data.ndim)[1]
        return np.asarray(self.data.astype(wide) - zero_point.astype(wide))

    def to_float(self) -> Array:
        """DequantizeLinear in float32."""
        scale = self.params.shaped(self.data.ndim)[0]
        return np.asarray(self.centred().astype(np.float32) * scale)


@dataclass(frozen=True)
class Pending(ABC):
    """An exact result whose rescale waits for a QuantizeLinear; `low`/`high` are bounds of Relu/Clip behind it."""

    node: str
    op: str
    low: np.float32 | None
    high: np.float32 | None

    def clip(self, low: np.float32 | None, high: np.float32 | None) -> Pending:
        """This value behind one more Relu or Clip (the later one wins where both bind, as in the graph)."""

        def bound(value: np.float32 | None) -> np.float32 | None:
            if value is None:
                return None
            value = value if low is None else max(value, low)
            return value if high is None else min(value, high)

        return replace(
            self,
            low=low if self.low is None else bound(self.low),
            high=high if self.high is None else bound(self.high),
        )

    def to_float(self) -> Array:
        """The value in float32, as a float consumer sees it."""
        value = self._float()
        if self.low is not None:
            value = np.maximum(value, self.low)
        if self.high is not None:
            value = np.minimum(value, self.high)
        return value

    def requantize(self, params: QuantParams, strict: bool) -> tuple[Array, bool]:
        """The integers of a QuantizeLinear with `params`, and whether they are exact on every machine.

        Raises ModelError, naming the node, where the rescale is not exact and `strict` is set.
        """
        exact, values = self._rescale(params)
        if not exact and strict:
            raise ModelError(f"node {self.node} ({self.op}): {self._why(params)}; `strict=False` rounds in float32")
        for bound, limit in ((self.low, np.maximum), (self.high, np.minimum)):
            if bound is not None:  # rounding is monotone: Q(clip(x)) = clip(Q(x)) between Q(low) and Q(high)
                edge = params.quantize(np.full((1,) * values.ndim, bound, np.float32))
                values = limit(values, edge.astype(np.int64))
        return np.clip(values, params.low, params.high).astype(params.dtype), exact

    @abstractmethod
    def _float(self) -> Array: ...

    @abstractmethod
    def _rescale(self, params: QuantParams) -> tuple[bool, Int64]: ...

    @abstractmethod
    def _why(self, params: QuantParams) -> str: ...


@dataclass(frozen=True)
class Linear(Pending):
    """Accumulator of Conv, Gemm or MatMul: the value `acc * scale`, `scale = fl(Sx*Sw)` broadcastable to `acc`."""

    acc: Int64
    scale: Float32

    def _float(self) -> Array:
        return np.asarray(self.acc.astype(np.float32) * self.scale)

    def _multiplier(self, params: QuantParams) -> Float32:
        return linear_multiplier(self.scale, np.float32(1), params.shaped(self.acc.ndim)[0])

    def _rescale(self, params: QuantParams) -> tuple[bool, Int64]:
        return _rescale_by(self.acc, self._multiplier(params), params)

    def _why(self, params: QuantParams) -> str:
        return why_not_dyadic(self._multiplier(params))


@dataclass(frozen=True)
class Pooled(Pending):
    """Sum over `count` positions of a quantised tensor: the value `acc * scale / count`."""

    acc: Int64
    scale: Float32
    count: int

    def _float(self) -> Array:
        return np.asarray(self.acc.astype(np.float32) * self.scale / np.float32(self.count))

    def _rescale(self, params: QuantParams) -> tuple[bool, Int64]:
        return _rescale_by(self.acc, pool_multiplier(self.scale, params.scale, self.count), params)

    def _why(self, params: QuantParams) -> str:
        return why_not_dyadic(pool_multiplier(self.scale, params.scale, self.count))


@dataclass(frozen=True)
class Pair(Pending):
    """Two 8-bit tensors under Add or Mul (`op`), both per tensor."""

    a: Quantised
    b: Quantised

    def _float(self) -> Array:
        a, b = self.a.to_float(), self.b.to_float()
        return np.asarray(a + b if self.op == "Add" else a * b)

    def _rescale(self, params: QuantParams) -> tuple[bool, Int64]:
        a, b = self.a.centred(), self.b.centred()
        sa, sb, zero_point = self.a.params.scale, self.b.params.scale, int(params.zero_point)
        add = self.op == "Add"
        ratio = (sum_ratio if add else product_ratio)(sa, sb, params.scale) if params.dtype in INT8 else None
        if ratio is not None:
            q, p = ratio
            if add:
                return True, add_requantize(a, b, p[0], p[1], q, zero_point)
            return True, mul_requantize(a, b, p[0], q, zero_point)
        one = np.float32(1)
        if add:
            value = a.astype(np.float32) * linear_multiplier(sa, one, params.scale)
            value = value + b.astype(np.float32) * linear_multiplier(sb, one, params.scale)
        else:
            value = (a * b).astype(np.float32) * linear_multiplier(sa, sb, params.scale)
        return False, _saturate(value, params)

    def _why(self, params: QuantParams) -> str:
        return why_not_tie_free(self.op, self.a.params.scale, self.b.params.scale, params.scale)


Value: TypeAlias = Array | Quantised | Pending


def why_not_tie_free(op: str, a_scale: Any, b_scale: Any, output_scale: Any) -> str:
    """One clause that says why an Add or Mul may round differently on different machines."""
    one = np.float32(1)
    scales = [(a_scale, one), (b_scale, one)] if op == "Add" else [(a_scale, b_scale)]
    ratios = ", ".join(f"{float(linear_multiplier(a, b, output_scale)):.9g}" for a, b in scales)
    return f"scale ratio {ratios} is not p/q with one odd q <= 1023, so sums can tie"


def why_not_dyadic(multiplier: Float32) -> str:
    """One clause that says which multipliers are not b/2^c."""
    flat = np.ravel(multiplier)
    bad = np.flatnonzero(~is_exact_dyadic(flat))
    first = int(bad[0])
    return (
        f"{bad.size} of {flat.size} rescale multipliers are not b/2^c with b < 2^24, c <= 16 "
        f"(first: channel {first}, {float(flat[first])!r})"
    )


def _rescale_by(acc: Int64, multiplier: Float32, params: QuantParams) -> tuple[bool, Int64]:
    """Exact integers where every multiplier is dyadic, else the float32 arithmetic of the runtime."""
    # The proof in dyadic.py needs an 8-bit output: wider ones do not saturate at 2^8.
    if params.dtype in INT8 and bool(is_exact_dyadic(multiplier).all()):
        b, c = as_dyadic(multiplier)
        return True, requantize(acc, b, c, params.shaped(acc.ndim)[1], params.low, params.high)
    return False, _saturate(acc.astype(np.float32) * multiplier, params)


def _saturate(value: Array, params: QuantParams) -> Int64:
    zero_point = params.shaped(value.ndim)[1]
    rounded = np.rint(value.astype(np.float64))
    clipped = np.clip(rounded, params.low - zero_point, params.high - zero_point)
    return np.asarray(clipped.astype(np.int64) + zero_point)
