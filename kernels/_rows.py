"""How far each score of a row lies below the row's largest one: the first step of every integer softmax, for any int32 row."""

from __future__ import annotations

import numpy as np

from qcompile.kernels._protocol import Array

_AXIS = "axis = Constant <value_ints = [-1]> ()"

# Every value stays in int32: floor >= -2^31 because of the Max, and near lies in [floor, top], as x <= top and
# floor <= top. If top >= -2^31 + limit, floor = top - limit; else floor = -2^31 and top - floor < limit. So
# 0 <= top - near <= limit in both cases, and it equals min(top - x, limit).
_DISTANCE = """
    lowest_wide = Constant <value_int = -2147483648> ()
    lowest = Cast <to = 6> (lowest_wide)
    least = Add (lowest, limit_)
    {seen}
    top = ReduceMax <keepdims = 1> (seen, axis)
    safe = Max (top, least)
    floor = Sub (safe, limit_)
    near = Max (seen, floor)
    {distance}
"""
_PLAIN = {"seen": "seen = Identity (x)", "distance": "distance = Sub (top, near)"}
# A masked score is the lowest int32 for ReduceMax, and `limit` for what follows: exactly 0 also where the whole row is masked
# or lies at the lower end of int32. Bounds are made on the small mask, so that Min and Max do it (a third of Where's time).
_MASKED = {
    "seen": """highest_wide = Constant <value_int = 2147483647> ()
    highest = Cast <to = 6> (highest_wide)
    zero = Sub (limit_, limit_)
    bound = Where (keep, highest, lowest)
    away = Where (keep, zero, limit_)
    seen = Min (x, bound)""",
    "distance": """kept = Sub (top, near)
    distance = Max (kept, away)""",
}


# For |x| <= 2^28 and limit <= 2^28: one sum hides what is masked. Kept: seen = x, so if any is, top >= -2^28. Masked: seen is
# within 2^28 of -2^30, so below >= 2^29 where one is kept, and >= -2^29 + 2^30 - 2^28 = 2^28 where none is: >= limit in both, and
# at most 2^28 + 2^30 + 2^28 < 2^31.
_NEAR = f"""{_AXIS}
    hidden = Constant <value = int32 {{-1073741824}}> ()
    lowest = Constant <value = int32 {{-536870912}}> ()
    zero = Sub (limit_, limit_)
    away = Where (keep, zero, hidden)
    seen = Add (x, away)
    highest = ReduceMax <keepdims = 1> (seen, axis)
    top = Clip (highest, lowest)
    below = Sub (top, seen)
    distance = Min (below, limit_)
"""
NEAR_BOUND = 2**28


def near_text() -> str:
    """What `distance_text(True)` gives, where |x| and the limit are at most NEAR_BOUND."""
    return _NEAR


def distance_text(masked: bool) -> str:
    """The lines that make `distance` (int32, 0..limit) and `axis` of `x`, `limit_` and, where `masked`, bool `keep`."""
    return f"{_AXIS}\n{_DISTANCE.format(**(_MASKED if masked else _PLAIN))}"


def distance(scores: Array, keep: Array | None, limit: int) -> Array:
    """`min(max of the row - x, limit)` in int64; `limit` where `keep` is False. The maximum is that of the kept scores."""
    wide = scores.astype(np.int64)
    if keep is None:
        return np.asarray(np.minimum(wide.max(-1, keepdims=True) - wide, limit))
    kept = np.where(keep, wide, np.iinfo(np.int64).min // 2)
    return np.asarray(np.where(keep, np.minimum(kept.max(-1, keepdims=True) - kept, limit), limit))


def exponentials(scores: Array, keep: Array | None, scale: float) -> Array:
    """Float64 exp((x - max of the row) * scale): 1 at the maximum, 0 where masked, a wholly masked row all 0."""
    wide = scores.astype(np.float64)
    if keep is None:
        return np.asarray(np.exp((wide - wide.max(-1, keepdims=True)) * scale))
    kept = np.where(keep, wide, -np.inf)
    top = kept.max(-1, keepdims=True)
    return np.asarray(np.where(keep, np.exp((kept - np.where(np.isinf(top), 0, top)) * scale), 0))
