"""Quantisation parameters: activation scales from ranges, weight scales on the dyadic grid, rounding under the pair rule.

Everything here is numpy on plain arrays; no graph. A weight matrix is `[channels, K]` in the kernel's K order
(convolution: kh, kw, channel of the group), one scale a channel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

SHIFT = 16  # c of every linear multiplier b/2^c: the largest for which float32 rescaling is proven exact
WEIGHT_MAX = 127  # -128 is never used: ARM kernels without dot products overflow on it
PAIR_LIMIT = 128  # 255 * 128 = 32640 < 2^15: no u8 x s8 pair sum can saturate an int16
_LEAST_B = 1
_BLOCK_VALUES = 1 << 22  # weights searched at a time
_LARGEST_B = 2**24 - 1


@dataclass(frozen=True)
class ActivationType:
    """Integer type of activations: bounds and numpy dtype; `symmetric` fixes the zero point at 0."""

    low: int
    high: int
    dtype: type[np.uint8] | type[np.int8]
    symmetric: bool

    def narrowed(self, bits: int) -> ActivationType:
        """The same type with the 2^bits integers nearest to its own zero: 0 to 2^bits - 1, or -2^(bits-1) to 2^(bits-1) - 1."""
        if bits == 8:
            return self
        return replace(self, low=self.low >> 8 - bits, high=self.high >> 8 - bits)


ACTIVATIONS: dict[str, ActivationType] = {
    "any": ActivationType(0, 255, np.uint8, False),
    "wasm": ActivationType(0, 255, np.uint8, False),
    "vnni": ActivationType(0, 255, np.uint8, False),
    "arm": ActivationType(-128, 127, np.int8, False),
    "tensorrt": ActivationType(-128, 127, np.int8, True),
}


def activation_params(low: float, high: float, kind: ActivationType) -> tuple[np.float32, int]:
    """(scale, zero_point) that map [low, high], widened to hold 0, onto the integer range; 0.0 is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    if kind.symmetric:
        bound = max(-low, high)
        scale = np.float32(bound / kind.high) if bound > 0 else np.float32(1.0)
        return _normal(scale), 0
    if high == low:
        return np.float32(1.0), kind.low if high == 0 else 0
    scale = _normal(np.float32((high - low) / (kind.high - kind.low)))
    zero_point = int(np.clip(np.rint(kind.low - low / float(scale)), kind.low, kind.high))
    return scale, zero_point


def _normal(scale: np.float32) -> np.float32:
    """Never below 2^-60: products of three scales stay normal float32 numbers."""
    normal: np.float32 = np.float32(max(float(scale), 2.0**-60))
    return normal


def exact_weight_scale(b: npt.NDArray[np.int64], input_scale: np.float32, output_scale: np.float32) -> npt.NDArray[np.float32]:
    """Sw with fl(fl(Sx*Sw)/Sy) == b / 2^16 to the last bit, NaN where no float32 near the quotient gives it. Any shape."""
    with np.errstate(over="ignore"):  # an absurd scale becomes inf, which equals no target
        target = (b.astype(np.float64) / 2.0**SHIFT).astype(np.float32)
        start = (b.astype(np.float64) / 2.0**SHIFT * float(output_scale) / float(input_scale)).astype(np.float32)
        found = np.full(b.shape, np.nan, np.float32)
        candidate_up, candidate_down = start.copy(), start.copy()
        for step in range(3):
            for candidate in (candidate_up, candidate_down) if step else (start,):
                exact = (np.float32(input_scale) * candidate) / np.float32(output_scale) == target
                found = np.where(np.isnan(found) & exact, candidate, found)
            candidate_up = np.nextafter(candidate_up, np.float32(np.inf))
            candidate_down = np.nextafter(candidate_down, np.float32(0))
    return found


def round_pairs(target: FloatArray, limit: int = PAIR_LIMIT, top: int = WEIGHT_MAX) -> FloatArray:
    """Nearest integers q to `target` [.., K] with |q| <= top and, for each pair of equal sign, |q[2i] + q[2i+1]| <= limit.

    Projection onto the pair constraint: the excess is taken from both in equal parts, the odd unit from the one that
    rounded away furthest. Values are integral; the caller converts to int8.
    """
    q = np.clip(np.rint(target), -top, top)
    even = q.shape[-1] // 2 * 2
    a, b = q[..., 0:even:2], q[..., 1:even:2]
    total = a + b
    over = np.abs(total) > limit
    if not over.any():
        return q
    ta, tb = target[..., 0:even:2][over], target[..., 1:even:2][over]
    sign = np.sign(total[over])
    # Both have one sign (|a|, |b| <= 127 and |a+b| > 128): work on magnitudes. The least-squares point on a + b = limit.
    ta, tb = ta * sign, tb * sign
    qa = np.clip(np.rint(ta - (ta + tb - limit) / 2), limit - top, top)
    q[..., 0:even:2][over] = qa * sign
    q[..., 1:even:2][over] = (limit - qa) * sign
    return q


@dataclass(frozen=True)
class QuantisedWeight:
    """int8 weights `[channels, K]`, float32 scale `[channels]`, and b of each channel's multiplier (None: float output)."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    b: npt.NDArray[np.int64] | None


def quantise_weight(
    weight: Array,
    input_scale: np.float32,
    output_scale: np.float32 | None,
    *,
    pair_rule: bool,
    candidates: int = 24,
    importance: Array | None = None,
    bias: Array | None = None,
    top: int = WEIGHT_MAX,
    activation_top: int = 255,
) -> QuantisedWeight:
    """Choose each channel's scale by squared error, on the dyadic grid where a rescale follows.

    importance: [channels, K] weights of the squared errors, all alike where None.

    weight: [channels, K] float. `top` is the largest magnitude (127; 7 for 4 bits). The accumulator of every channel is kept
    inside int32: |bias|/(Sx*Sw) + activation_top * sum|q| < 2^31, by widening the scale of near-dead channels.
    Channels are taken a few at a time: beside the result, about half a gigabyte is used however large the weight is.
    Raises ValueError naming the channel where no exact scale exists (none was ever seen), or where a weight is NaN or infinite.
    """
    channels, width = weight.shape
    rows = max(1, _BLOCK_VALUES // max(width, 1))
    values = np.zeros(weight.shape, np.int8)
    scales, numerators = np.zeros(channels, np.float32), np.zeros(channels, np.int64)
    for start in range(0, channels, rows):
        part = slice(start, start + rows)
        matrix = np.asarray(weight[part], np.float64)
        if not np.isfinite(matrix).all():
            raise ValueError(f"channel {start + int(np.argmin(np.isfinite(matrix).all(axis=1)))}: a weight is not finite")
        own_bias = None if bias is None else bias[part]
        least = least_scales(matrix, own_bias, float(input_scale), activation_top)
        try:
            values[part], scales[part], numerators[part] = _choose(
                matrix,
                input_scale,
                output_scale,
                least,
                pair_rule,
                candidates,
                None if importance is None else importance[part],
                top,
            )
        except _NoScale as missing:
            raise ValueError(
                f"channel {start + missing.channel}: no float32 weight scale makes {input_scale} * Sw / {output_scale} dyadic"
            ) from missing
    return QuantisedWeight(values, scales, numerators if output_scale is not None else None)


class _NoScale(Exception):
    def __init__(self, channel: int) -> None:
        super().__init__(channel)
        self.channel = channel


def _choose(
    matrix: FloatArray,
    input_scale: np.float32,
    output_scale: np.float32 | None,
    least: FloatArray,
    pair_rule: bool,
    candidates: int,
    importance: Array | None,
    top: int,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Integers, scale and b of each channel of `matrix`, by least (weighted) squared error; `least` bounds the scales below."""
    channels = matrix.shape[0]
    peak = np.abs(matrix).max(axis=1, initial=0.0)
    full = np.maximum(peak / top, least)
    # The pair rule may want a scale up to twice as wide: two equal weights of 127 that share a pair become 64 each. Without it a
    # little above 1 is tried too, for the nearest grid points may all lie below the peak and clip it.
    widest = 2.0 if pair_rule else 1.15
    factors = np.concatenate([np.linspace(widest, 1.02, candidates), np.linspace(1.0, 0.5 if top < 100 else 0.7, candidates)])
    if pair_rule and 2 * top > PAIR_LIMIT:  # |w| <= 64 obeys the rule whatever the signs: never do worse than that
        factors = np.concatenate([factors, [2 * top / PAIR_LIMIT]])
    best_error = np.full(channels, np.inf)
    best_scale = np.zeros(channels, np.float32)
    best_b = np.zeros(channels, np.int64)
    best_q = np.zeros(matrix.shape, np.int8)
    last_b = np.full(channels, -1, np.int64)
    for factor in factors:
        wanted = np.maximum(full * factor, least)
        scale, b = _on_grid(wanted, input_scale, output_scale)
        fresh = b != last_b if output_scale is not None else np.ones(channels, bool)
        last_b = b
        if not fresh.any():
            continue
        rows = np.flatnonzero(fresh)
        target = matrix[rows] / scale[rows, None].astype(np.float64)
        q = round_pairs(target, top=top) if pair_rule else np.clip(np.rint(target), -top, top)
        difference = (target - q) * scale[rows, None]
        error = (
            np.einsum("ck,ck,ck->c", difference, difference, importance[rows])
            if importance is not None
            else np.einsum("ck,ck->c", difference, difference)
        )
        better = rows[error < best_error[rows]]
        chosen = error < best_error[rows]
        best_error[better], best_scale[better], best_b[better] = error[chosen], scale[better], b[better]
        best_q[better] = q[chosen].astype(np.int8)
    return best_q, best_scale, best_b


def least_scales(matrix: FloatArray, bias: Array | None, input_scale: float, activation_top: int) -> FloatArray:
    """The scales [channels] that `matrix` [channels, K] and `bias` [channels] need at least for an int32 accumulator.

    Bias and products together stay below 2^31; 2^30 each leaves room for bias correction.
    """
    floor: FloatArray = np.full(matrix.shape[0], 2.0**-80 / input_scale if input_scale < 1 else 2.0**-80)
    # sum|q| <= K * 127 and 255 * 127 * K < 2^30 for K < 33,000; larger K is bounded through the real sum of |w|.
    floor = np.maximum(floor, activation_top * np.abs(matrix).sum(axis=1) / 2.0**30)
    if bias is not None:
        floor = np.maximum(floor, np.abs(np.asarray(bias, np.float64)) / (input_scale * 2.0**29))
    return floor


def grid_scales(wanted: FloatArray, input_scale: np.float32, output_scale: np.float32 | None) -> npt.NDArray[np.float32]:
    """The float32 scales nearest to `wanted` [channels] whose multiplier is exactly b/2^16; any scale where no rescale follows.

    Raises ValueError where there is none.
    """
    try:
        return _on_grid(wanted, input_scale, output_scale)[0]
    except _NoScale as missing:
        raise ValueError(
            f"channel {missing.channel}: no weight scale makes {input_scale} * Sw / {output_scale} dyadic"
        ) from missing


def _on_grid(
    wanted: FloatArray, input_scale: np.float32, output_scale: np.float32 | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The scales nearest to `wanted` whose multiplier is exactly b/2^16, and b; free scales where no rescale follows."""
    if output_scale is None:
        return wanted.astype(np.float32), np.zeros(wanted.shape, np.int64)
    raw = wanted * float(input_scale) / float(output_scale) * 2.0**SHIFT
    b = np.clip(np.rint(raw), _LEAST_B, _LARGEST_B).astype(np.int64)
    start = b.copy()
    scale = exact_weight_scale(b, input_scale, output_scale)
    # About one b in six has no float32 that reaches it (runs of 80 neighbours were seen): the nearest b that has one is
    # taken, upwards first (where b is small a wider scale is harmless: the channel moves the output by part of a step).
    for offset in (sign * distance for distance in range(1, 256) for sign in (1, -1)):
        missing = np.isnan(scale)
        if not missing.any():
            break
        trial = np.clip(start[missing] + offset, _LEAST_B, _LARGEST_B)
        found = exact_weight_scale(trial, input_scale, output_scale)
        b[missing] = np.where(np.isnan(found), b[missing], trial)
        scale[missing] = found
    if np.isnan(scale).any():
        raise _NoScale(int(np.flatnonzero(np.isnan(scale))[0]))
    return scale, b
