"""The arithmetic of exact rescaling, in numpy and nothing else.

A linear operator ends in `round_half_even(acc * M) + zero_point`, saturated to 8 bits, with the float32
multiplier `M = fl(fl(Sx*Sw)/Sy)`. Where `M = b / 2^c` with `1 <= b < 2^24` and `c <= 16` the float32 arithmetic of a
runtime and the integer arithmetic here give the same integer for every int32 accumulator:
if `|acc*b| < 2^24` the float product is exact; else `|acc*b| / 2^c >= 2^8`, the output saturates whatever the low
bits are, and float rounding, being monotone, cannot bring it back below 2^8.

Sums and products of two activations avoid ties instead: with ratios `p/q` of one odd `q` the exact result is at least
`1/(2q)` away from every tie, so any rounding mode and any order of float operations give the same integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.errors import ModelError

Array: TypeAlias = npt.NDArray[Any]
Float32: TypeAlias = npt.NDArray[np.float32]
Int64: TypeAlias = npt.NDArray[np.int64]

MAX_NUMERATOR = 1 << 24
MAX_SHIFT = 16
MAX_DENOMINATOR = 1023
# Float32 rounds to a relative 2^-24 at most; "4 ulp" is taken at its smallest, relative to the value.
_UNIT = 2.0**-24
_RATIO_TOLERANCE = 4 * _UNIT


def linear_multiplier(input_scale: Any, weight_scale: Any, output_scale: Any) -> Float32:
    """`M = fl(fl(Sx*Sw)/Sy)`: one float32 per output channel (0-d for scalars), rounded as a runtime rounds it."""
    x, w, y = (np.asarray(s, np.float32) for s in (input_scale, weight_scale, output_scale))
    with np.errstate(all="ignore"):  # a zero or absurd scale gives inf or nan, which `is_exact_dyadic` refuses
        return np.asarray(np.divide(np.multiply(x, w, dtype=np.float32), y, dtype=np.float32))


def pool_multiplier(input_scale: Any, output_scale: Any, count: int) -> Float32:
    """`M = fl(Sx/fl(Sy*count))`, the multiplier of a global average pool over `count` positions."""
    x, y = np.asarray(input_scale, np.float32), np.asarray(output_scale, np.float32)
    with np.errstate(all="ignore"):
        return np.asarray(np.divide(x, np.multiply(y, np.float32(count), dtype=np.float32), dtype=np.float32))


def as_dyadic(multiplier: Any) -> tuple[Int64, Int64]:
    """The exact decomposition `M = b / 2^c` with the smallest `c >= 0`; `b` and `c` have M's shape.

    Every positive finite float32 below 2^62 has one; whether a rescale with it is exact, `is_exact_dyadic` says.
    Raises ModelError for a multiplier that is not positive, not finite, or too large for int64.
    """
    values = np.asarray(multiplier, np.float32).astype(np.float64)
    if not bool(np.all(np.isfinite(values) & (values > 0) & (values < 2.0**62))):
        raise ModelError("a rescale multiplier is zero, negative, not finite or beyond 2^62: check the scales")
    mantissa, exponent = np.frexp(values)
    integer = np.ldexp(mantissa, 24).astype(np.int64)  # exact: a float32 has at most 24 significant bits
    trailing = np.frexp((integer & -integer).astype(np.float64))[1].astype(np.int64) - 1
    power = exponent.astype(np.int64) - 24 + trailing
    b = (integer >> trailing) << np.maximum(power, 0)  # < 2^62, as M is
    return np.asarray(b, np.int64), np.asarray(np.maximum(-power, 0), np.int64)


def is_exact_dyadic(multiplier: Any) -> npt.NDArray[np.bool_]:
    """For each M whether it is `b / 2^c` with `1 <= b < 2^24`, `c <= 16`; M's shape (0-d for a scalar)."""
    values = np.asarray(multiplier, np.float32).astype(np.float64)
    scaled = np.ldexp(values, MAX_SHIFT)  # exact in float64
    with np.errstate(invalid="ignore"):
        # M < 2^24 with at most 24 significant bits: if M * 2^16 is an integer, the smallest-c numerator is < 2^24.
        return np.asarray(np.isfinite(values) & (values > 0) & (values < MAX_NUMERATOR) & (scaled == np.rint(scaled)))


def along_axis(vector: Any, rank: int, axis: int | None) -> Array:
    """A scalar as it is (0-d); a 1-d vector reshaped so that it broadcasts along `axis` of a tensor of `rank`."""
    array = np.asarray(vector)
    if array.ndim == 0 or axis is None:
        return array.reshape(()) if array.size == 1 else array
    shape = [1] * rank
    shape[axis % rank] = array.size
    return array.reshape(shape)


def round_shift(value: Array, shift: Any) -> Int64:
    """`round_half_even(value / 2^shift)` of int64 values; `shift >= 0` broadcasts. Needs `|value| < 2^61`.

    The value is doubled first so that `shift == 0` needs no case of its own: 2|value| + 2^shift < 2^63.
    """
    shift = np.asarray(shift, np.int64)
    # its own memory, of the shape that value and shift broadcast to
    doubled = np.asarray(np.left_shift(value, np.ones_like(shift)))
    odd = np.right_shift(doubled, shift + 1) & 1
    doubled += np.left_shift(np.int64(1), shift) - 1
    doubled += odd
    return np.asarray(np.right_shift(doubled, shift + 1, out=doubled))


def requantize(acc: Array, b: Any, c: Any, zero_point: Any, low: int, high: int, axis: int | None = None) -> Int64:
    """`clip(round_half_even(acc*b / 2^c) + zero_point, low, high)` in int64.

    `acc` is any integer tensor; `b`, `c` and `zero_point` are scalars, tensors that broadcast, or, with `axis`
    given, vectors along that axis. For an int32 `acc` and b < 2^24 the product is below 2^55; anything else is
    checked to stay below 2^61. Raises ModelError where it would not, or where c is outside 0..60.
    """
    rank = np.ndim(acc)
    b, c, zero_point = (along_axis(np.asarray(v, np.int64), rank, axis) for v in (b, c, zero_point))
    if acc.size == 0:
        return np.zeros(np.shape(acc), np.int64)
    largest = max(abs(int(acc.min())), abs(int(acc.max()))) * int(np.abs(b).max())
    if largest >= 1 << 61 or int(c.min()) < 0 or int(c.max()) > 60:
        raise ModelError(f"a rescale leaves int64: |acc*b| up to {largest}, c up to {int(c.max())}")
    out = round_shift(np.multiply(acc, b, dtype=np.int64), c)
    return np.asarray(np.clip(out + zero_point, low, high))


def tie_free_ratio(ratios: Sequence[Any]) -> tuple[int, list[int]] | None:
    """One odd `q <= 1023` and integers `p` with every ratio equal to `p/q` within 4 ulp, or None.

    One ratio means a product (`Sa*Sb/Sc`), several a sum (`Sa/Sc`, `Sb/Sc`). The smallest q is returned for which the
    error that float arithmetic can make stays below `1/(2q)`, the distance of the exact result to the next tie:
    without that last test a large ratio with a large q could still be rounded either way.
    """
    r = np.asarray([float(np.float32(x)) for x in ratios], np.float64)
    if r.size == 0 or not bool(np.all(np.isfinite(r) & (r > 0))):
        return None
    q = np.arange(1, MAX_DENOMINATOR + 1, 2, dtype=np.float64)[:, None]
    p = np.rint(r * q)
    error = np.abs(r - p / q)
    # What float arithmetic can be off by. Product: only results up to 2^8 matter, larger ones saturate. Sum: operands
    # up to 255, and up to nine roundings (a runtime may fold the zero points into a constant first).
    product_error = 257 * (error / r + 3 * _UNIT).sum(1)
    sum_error = 255 * error.sum(1) + _UNIT * (6 * 255 * r.sum() + 3 * 256)
    bound = product_error if r.size == 1 else sum_error
    fits = (p >= 1).all(1) & (error <= _RATIO_TOLERANCE * r).all(1) & (bound * 2 * q[:, 0] < 1)
    hits = np.flatnonzero(fits)
    if hits.size == 0:
        return None
    row = int(hits[0])
    return int(q[row, 0]), [int(v) for v in p[row]]


def sum_ratio(a_scale: Any, b_scale: Any, output_scale: Any) -> tuple[int, list[int]] | None:
    """`tie_free_ratio` of an addition: (q, [pa, pb]) of fl(Sa/Sc) and fl(Sb/Sc)."""
    one = np.float32(1)
    return tie_free_ratio([linear_multiplier(s, one, output_scale) for s in (a_scale, b_scale)])


def product_ratio(a_scale: Any, b_scale: Any, output_scale: Any) -> tuple[int, list[int]] | None:
    """`tie_free_ratio` of a multiplication: (q, [p]) of fl(fl(Sa*Sb)/Sc)."""
    return tie_free_ratio([linear_multiplier(a_scale, b_scale, output_scale)])


def add_requantize(a: Array, b: Array, pa: int, pb: int, q: int, zero_point: int) -> Int64:
    """`round((a*pa + b*pb) / q) + zero_point`, not saturated; `a` and `b` have their zero points subtracted.

    q is odd, so there are no ties: `floor((2(a*pa + b*pb) + q) / (2q))`. With |a|, |b| < 2^16 and the ratios of
    float32 scales that pass `tie_free_ratio` (p < 2^24 * 1023) everything stays below 2^52.
    """
    total = np.multiply(a, pa, dtype=np.int64) + np.multiply(b, pb, dtype=np.int64)
    return np.asarray((2 * total + q) // (2 * q) + zero_point)


def mul_requantize(a: Array, b: Array, p: int, q: int, zero_point: int) -> Int64:
    """`round(a*b*p / q) + zero_point`, not saturated; `a` and `b` have their zero points subtracted, q is odd.

    With |a|, |b| <= 2^8 the product is at most 2^16; a p beyond 2^24 is cut to 2^24, as every nonzero product
    saturates 8 bits there already (2^24 / 1023 > 2^13).
    """
    total = np.multiply(np.multiply(a, b, dtype=np.int64), min(p, MAX_NUMERATOR), dtype=np.int64)
    return np.asarray((2 * total + q) // (2 * q) + zero_point)
