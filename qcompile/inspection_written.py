"""What a rescale is, and those that the integer format writes out: whether b, c and the form are right, from the file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx

from qcompile.dyadic import Float32, Int64
from qcompile.inspection_scales import Scales

Kind: TypeAlias = Literal["linear", "add", "mul", "pool", "other"]

_WRITTEN = ("DyadicRescale", "RatioRescale")  # and what is behind that name, but for these
_NOT_WRITTEN = ("DyadicRescaleFused", "DyadicRescaleWide")
_MOST_WRITTEN = 1 << 25  # b of a written-out rescale: its sums then stay below 2^32


@dataclass(frozen=True, eq=False)
class Rescale:
    """One change of scale in the file.

    linear and pool: `multiplier` M and its exact decomposition `b / 2^c`, per channel or 0-d (None where a scale is not
    stored in the file). add and mul: the ratios `p / q`. other: anything that is computed in float between two quantised
    tensors. `reason` says why it is not exact, and is empty where it is.
    """

    node: str
    op: str
    kind: Kind
    exact: bool
    reason: str = ""
    multiplier: Float32 | None = None
    b: Int64 | None = None
    c: Int64 | None = None
    p: tuple[int, ...] | None = None
    q: int | None = None


def is_written(op: str) -> bool:
    """Whether a function of that name is a rescale in integers alone."""
    return op.startswith(_WRITTEN) and not op.startswith(_NOT_WRITTEN)


def written_out(scales: Scales, call: onnx.NodeProto) -> Rescale:
    """A rescale of the integer format, which states its integers: exact within the bounds in which its body cannot wrap."""
    label = call.name or call.output[0]
    first, second = (scales.constant(name) for name in call.input[1:3])
    if first is None or second is None:
        return Rescale(label, call.op_type, "linear", False, "its integers are not stored in the file")
    top, below = first.astype(np.int64), second.astype(np.int64)
    if call.op_type == "RatioRescale":
        divisor = int(below.reshape(-1)[0])
        fits = divisor % 2 == 1 and 1 <= divisor <= 1023 and bool(((top >= 1) & (top <= 256 * divisor)).all())
        reason = "" if fits else f"p/{divisor} is not a ratio with one odd q <= 1023"
        return Rescale(label, call.op_type, "add", fits, reason, p=tuple(int(p) for p in top.reshape(-1)), q=divisor)
    b, c = (v.reshape(-1) for v in np.broadcast_arrays(top, below))
    ends = {a.name: a.i for a in call.attribute}
    # 2^(c+w), w the bits of the output: from there on it saturates, and so far |x*b| goes before x is clipped.
    reach = np.left_shift(np.int64(ends.get("high", 255) - ends.get("low", 0) + 1), np.clip(c, 0, 31))
    fits = bool(((c >= 1) & (c < 32) & (reach <= 1 << 30) & (b >= 1) & (b <= np.minimum(reach, _MOST_WRITTEN))).all())
    if not call.op_type.startswith("DyadicRescaleSteep"):
        fits = fits and bool((b <= np.left_shift(np.int64(1), np.clip(c, 0, 31))).all())
    reason = "" if fits else f"b = {b.min()}..{b.max()} or c = {c.min()}..{c.max()} is outside what int32 can rescale"
    zero = scales.constant(call.input[3])
    if fits and "Untied" in call.op_type and (zero is None or _has_ties(b, c, int(zero.reshape(-1)[0]), ends)):
        reason = "its body rounds no ties, and its multiplier has some"
        return Rescale(label, call.op_type, "linear", False, reason, b=b, c=c)
    return Rescale(label, call.op_type, "linear", fits, reason, b=b, c=c)


def _has_ties(b: Int64, c: Int64, zero: int, ends: Mapping[str, int]) -> bool:
    """Whether some sum whose result does not saturate lies half-way between two integers: a multiple of the least x with
    x * b = 2^(c-1) (mod 2^c), which is 2^(c-1) over the greatest power of two in b."""
    unit = np.left_shift(np.int64(1), c)
    power = np.gcd(b, unit)
    room = max(ends.get("high", 255) - zero, zero - ends.get("low", 0)) + 0.5
    return bool(((power < unit) & (unit // 2 // power * b < room * unit)).any())
