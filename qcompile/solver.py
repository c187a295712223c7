"""Activation scales that make every rescale exact: tie-free ratios at each Add, a dyadic ratio at each pool.

An Add wants Sa/Sc = pa/q and Sb/Sc = pb/q with one odd q: the sum (a*pa + b*pb)/q is then never halfway between integers, and
every machine rounds it alike. Scales are solved from the last Add back to the first; each operand takes the p nearest to its
calibrated scale. Where Adds meet again in a cycle that no q closes, the whole component shares one scale. A pool's result
follows its source: fl(Sx / fl(Sy * area)) = b / 2^16; a product's of two activations its operands: fl(fl(Sa * Sb) / Sc) is
b / 2^16 for MatMul, p / q with q odd for Mul. A linear node asks nothing: its weights' scales give way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from qcompile.dyadic import MAX_NUMERATOR, product_ratio, sum_ratio
from qcompile.plan import AddSite, Plan, PoolSite, ProductSite, ScaleClass
from qcompile.qparams import SHIFT, ActivationType, activation_params

_ODD = 255
_LARGEST_ODD = 1023
_ENOUGH = 64  # p at or above this: the scale is at most 0.8 % from the calibrated one
_SEARCHED = 4096  # neighbouring b that are tried for a pool
LARGEST_RATIO = 15  # p/q below 16 keeps the dyadic shadow b = round(2^20 p/q) below 2^24


def solve(plan: Plan, kind: ActivationType, *, close: bool = False) -> None:
    """Set scale and zero_point of every class of `plan`, in place.

    close: stay as near to the present ranges as any q allows (an imported model's weights were made for its scales).
    """
    shared: list[set[ScaleClass]] = []
    while True:
        scales = _try(plan, kind, shared, close)
        if isinstance(scales, dict):
            break
        shared.append(_component(plan.adds, scales))
    for place in plan.classes:
        place.scale = scales[place]
        place.zero_point = _zero_point(place, kind)
    for pool in plan.pools:  # in graph order: a pool may feed another
        pool.result.scale = _pool_scale(pool, kind)
        pool.result.zero_point = _zero_point(pool.result, kind)
    for product in plan.products:
        product.result.scale = _product_scale(product, kind)
        product.result.zero_point = _zero_point(product.result, kind)


def _try(
    plan: Plan, kind: ActivationType, shared: Sequence[set[ScaleClass]], close: bool
) -> dict[ScaleClass, np.float32] | AddSite:
    """All scales, or the Add whose ratios no odd q gives."""
    scales: dict[ScaleClass, np.float32] = {}
    for group in shared:
        one = np.float32(max(float(_desired(c, kind)) for c in group))
        scales.update(dict.fromkeys(group, one))
    for add in reversed(plan.adds):
        result = scales.setdefault(add.result, _desired(add.result, kind))
        operands = list(dict.fromkeys((add.left, add.right)))
        known = [float(scales[o]) / float(result) for o in operands if o in scales]
        free = [o for o in operands if o not in scales]
        wanted = [float(_desired(o, kind)) / float(result) for o in free]
        if any(r > LARGEST_RATIO for r in wanted):
            # An operand 15 times coarser than the sum: the sum's range was clipped away; widen it by sharing.
            return add
        odds = _odds(known, wanted)
        for q in _closest(known, wanted, odds) if close and wanted else odds:
            trial = {o: _on_ratio(result, r * q, q, o) for o, r in zip(free, wanted, strict=True)}
            left, right = (trial.get(o, scales.get(o)) for o in (add.left, add.right))
            if sum_ratio(left, right, result) is not None:
                scales.update(trial)
                break
        else:
            return add
    for place in plan.classes:
        scales.setdefault(place, _desired(place, kind))
    return scales


def _on_ratio(result: np.float32, p: float, q: int, operand: ScaleClass) -> np.float32:
    """The operand's scale, result * p / q with p rounded: down where a folded Clip bounds it from above."""
    whole = max(1, math.floor(p) if operand.ceiling is not None else round(p))
    scale: np.float32 = np.float32(float(result) * whole / q)
    return scale


def _odds(known: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """Odd q <= 1023 that all `known` ratios are multiples of 1/q for, the best first: fine enough for the `wanted` ones."""
    least = min(wanted, default=1.0)
    finest = _finest([*known, *wanted])
    if not known:
        start = min(_ODD if least * _ODD >= _ENOUGH else _LARGEST_ODD, finest)
        return [q for q in (start - 1 + start % 2, 63, 15, 3) if 1 <= q <= start]
    if max(known) > LARGEST_RATIO:
        return []
    odds = np.arange(1, _LARGEST_ODD + 1, 2, dtype=np.int64)
    ratio = np.asarray(known)[:, None] * odds
    error = np.abs(ratio - np.rint(ratio))
    # Float32 scales carry half an ulp each: 2 ulp of the ratio in all.
    fits = odds[((error <= 2 * 2.0**-24 * ratio) & (np.rint(ratio) >= 1)).all(axis=0)]
    good = [int(q) for q in fits if (not wanted or least * q >= _ENOUGH) and q <= finest]
    return good + [int(q) for q in fits[::-1] if int(q) not in good]


def _closest(known: Sequence[float], wanted: Sequence[float], odds: Sequence[int]) -> list[int]:
    """The q that move the `wanted` ratios least, first; among `odds` where `known` ratios leave no others."""
    candidates = list(odds) if known else list(range(3, min(_LARGEST_ODD, _finest(wanted)) + 1, 2)) or list(odds)
    ratio = np.asarray(wanted)[:, None] * np.asarray(candidates)
    moved = np.abs(np.maximum(np.rint(ratio), 1) / ratio - 1).max(axis=0, initial=0.0)
    return [candidates[i] for i in np.argsort(moved, kind="stable")]


def _finest(ratios: Sequence[float]) -> int:
    """The finest q at which nine float32 roundings of a sum stay below 1/(2q) (see `dyadic.tie_free_ratio`), with some room."""
    return int(0.9 * 2.0**23 / (1785 * sum(ratios) + 768))


def _component(adds: Sequence[AddSite], start: AddSite) -> set[ScaleClass]:
    """All classes tied to `start` through Adds."""
    found = {start.left, start.right, start.result}
    while True:
        more = {c for a in adds if {a.left, a.right, a.result} & found for c in (a.left, a.right, a.result)}
        if more <= found:
            return found
        found |= more


def _desired(place: ScaleClass, kind: ActivationType) -> np.float32:
    kind = place.kind(kind)
    scale, zero_point = activation_params(place.low, place.high, kind)
    if place.ceiling is not None and math.isfinite(place.ceiling):
        # A folded Clip holds only while the largest integer stays within half a step of its bound.
        scale = np.float32(min(float(scale), place.ceiling / (kind.high - 0.5 - zero_point)))
    return scale


def reaches_past(place: ScaleClass, kind: ActivationType) -> bool:
    """Whether the largest integer stands for half a step or more above the Clip that was folded into the range.

    So it is where the class had to take a wider scale from its neighbours; the bound then needs a Clip on integers.
    """
    if place.ceiling is None or not math.isfinite(place.ceiling):
        return False
    return (place.kind(kind).high - place.zero_point) * float(place.scale) > place.ceiling + 0.5001 * float(place.scale)


def _zero_point(place: ScaleClass, kind: ActivationType) -> int:
    if kind.symmetric:
        return 0
    kind, low = place.kind(kind), min(place.low, 0.0)
    return int(np.clip(np.rint(kind.low - low / float(place.scale)), kind.low, kind.high))


def _pool_scale(pool: PoolSite, kind: ActivationType) -> np.float32:
    """Sy nearest to the calibrated one with fl(Sx / fl(Sy * area)) exactly b / 2^16."""
    source, area = pool.source.scale, np.float32(pool.area)
    wanted = float(_desired(pool.result, kind))
    nearest = min(max(1, round(float(source) / (wanted * pool.area) * 2.0**SHIFT)), MAX_NUMERATOR - 1)
    # One b or so in two is reached by a neighbour: the search ends after a few.
    for offset in chain([0], *((-d, d) for d in range(1, _SEARCHED))):
        b = nearest + offset
        if not 1 <= b < MAX_NUMERATOR:
            continue
        target = np.float32(b / 2.0**SHIFT)
        middle: np.float32 = np.float32(float(source) * 2.0**SHIFT / (b * pool.area))
        for candidate in (middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))):
            if source / (candidate * area) == target:
                return candidate
    raise ValueError(
        f"pool '{pool.node.label}': no float32 output scale is dyadic for input scale {source} over {area} positions"
    )


def _product_scale(product: ProductSite, kind: ActivationType) -> np.float32:
    """Sc nearest to the present one with fl(fl(Sa * Sb) / Sc) exactly b / 2^16 (MatMul), or p / q with an odd q (Mul)."""
    both = product.left.scale * product.right.scale
    wanted = float(_desired(product.result, kind))
    if product.node.op == "Mul":
        return _odd_product(product, float(both) / wanted)
    nearest = min(max(1, round(float(both) / wanted * 2.0**SHIFT)), MAX_NUMERATOR - 1)
    for offset in chain([0], *((-d, d) for d in range(1, _SEARCHED))):
        b = nearest + offset
        if not 1 <= b < MAX_NUMERATOR:
            continue
        target = np.float32(b / 2.0**SHIFT)
        middle: np.float32 = np.float32(float(both) * 2.0**SHIFT / b)
        for candidate in (middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))):
            if both / candidate == target:
                return candidate
    raise ValueError(f"product '{product.node.label}': no float32 output scale is dyadic for the product of scales {both}")


def _odd_product(product: ProductSite, wanted: float) -> np.float32:
    """The scale of a Mul's result whose ratio p / q is nearest to `wanted`, as `dyadic.product_ratio` accepts it."""
    left, right = product.left.scale, product.right.scale
    odds = np.arange(1, _LARGEST_ODD + 1, 2)
    wholes = np.maximum(np.rint(wanted * odds), 1)
    for index in np.argsort(np.abs(wholes / odds / wanted - 1), kind="stable"):
        scale: np.float32 = np.float32(float(left) * float(right) * odds[index] / wholes[index])
        if product_ratio(left, right, scale) is not None:
            return scale
    raise ValueError(f"product '{product.node.label}': no float32 output scale is free of ties for scales {left} and {right}")
