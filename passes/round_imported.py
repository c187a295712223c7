"""Weights of an imported model: its own integers, on the scale whose multiplier is the nearest b/2^16.

    M = Sx * Sw / Sy,  b = round(M * 2^16)      kept where |b / (M 2^16) - 1| < 2^-9, with the final Sx and Sy

The integers of a channel stand; its scale moves by that part at most. What the passes before did to the weights (a folded
BatchNormalization, factors) is one number a channel: Sw is found again from the present weights, a negative one turns the
integers' signs. A channel is rounded anew, and the reason counted, where that fails, where b/2^16 is too far off, where an
integer is -128 or beyond the width asked for, where `--target any` forbids a pair of weights (their sum would saturate on
machines without VNNI), or where the int32 accumulator could overflow. Then the scale of least squared error is taken, the
source's among them. Where b/2^16 alone is too far off, the source's integers compete too: up to 0.8 % or so they lie nearer than
integers that were rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Array, Graph
from qcompile.imported import KEPT, Imported, StoredWeight
from qcompile.passes.round_weights import replace_weight, weight_matrix, weight_tensor
from qcompile.plan import LinearSite
from qcompile.qparams import (
    PAIR_LIMIT,
    SHIFT,
    FloatArray,
    exact_weight_scale,
    grid_scales,
    least_scales,
    quantise_weight,
    round_pairs,
)
from qcompile.rewrite import Lossy, Promise, Report

_MADE = "weights that a pass made, not the source"
_SAME = 1e-6  # of a channel's largest weight: what float32 products lose
_OTHER_LAYOUT = "another pass changed the layout of the weights"
_CHANGED = "its weights are not integers times one scale"
_TOO_WIDE = "an integer is -128 or too wide"
_PAIR = "pairs of weights that saturate on some machines (--target any)"
_ACCUMULATOR = "the int32 accumulator could overflow"
_GRID = "its multiplier is not within 2^-9 of b/2^16"


@dataclass(frozen=True)
class RoundImported:
    """Write the stored integers where the dyadic grid allows, else round again."""

    name: str = "round_imported"
    keeps: Promise = field(default_factory=lambda: Lossy(-30.0))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a weight tensor. Counts channels in `context.imported`."""
        report, imported, plan = Report(), context.imported, context.plan
        if imported is None or plan is None:
            return report
        made = 0
        for site in plan.linears:
            if site.weight_scale is not None:
                continue
            stored = imported.weights.get(site.node.name)
            if stored is None:
                made += 1
                continue
            _round(graph, context, imported, site, stored)
            report.rewrites += 1
        if made:
            imported.changed[_MADE] = made  # the same again where the pass runs again
        if report.rewrites:
            _count_scales(context, imported)
        graph.cleanup()
        return report


def _count_scales(context: Context, imported: Imported) -> None:
    for place, mark in imported.classes:
        if place.scale == mark.scale and place.zero_point - context.activations.low == mark.zero:
            imported.scales_kept += 1
        else:
            imported.scales_moved += 1
            imported.largest_move = max(imported.largest_move, abs(float(place.scale) / float(mark.scale) - 1))


@dataclass
class _Channels:
    """The channels of one site: float weights [channels, K], integers, scales; `reason` "" where the integers stand."""

    weights: FloatArray
    integers: FloatArray
    scale: FloatArray
    reason: npt.NDArray[np.object_]

    def refuse(self, where: Array, reason: str) -> None:
        """Give `reason` to the channels of boolean `where` that have none."""
        self.reason[where & (self.reason == "")] = reason


def _round(graph: Graph, context: Context, imported: Imported, site: LinearSite, stored: StoredWeight) -> None:
    node, settings = site.node, context.settings
    weight, bias = node.constant(1), node.constant(2)
    assert weight is not None and bias is not None
    tensor = weight.array()
    channels = _channels(np.asarray(weight_matrix(tensor, node.op, site.axis), np.float64), stored)
    top, paired = settings.top_for(node.name), settings.pair_rule and not site.depthwise
    span = context.activations.high - context.activations.low
    biases = bias.array()
    channels.refuse(np.abs(channels.integers).max(axis=1, initial=0.0) > top, _TOO_WIDE)
    if paired:
        channels.refuse(_breaks_pairs(channels.integers), _PAIR)
    least = least_scales(channels.weights, biases, float(site.source.scale), span)
    dead = ~channels.integers.any(axis=1)
    channels.refuse(~dead & (channels.scale < least), _ACCUMULATOR)
    result_scale = site.grid_scale
    scales = _grid(channels, site.source.scale, result_scale)
    integers = channels.integers.copy()
    again = np.flatnonzero((channels.reason != "") | dead)
    if again.size:
        limits = _Limits(site.source.scale, result_scale, top, paired, span)
        try:
            integers[again], scales[again] = _again(channels, again, biases, least, limits)
        except ValueError as error:
            raise PassError(f"node '{node.label}': {error}; leave it float with --exclude '{node.label}'") from error
    stays = (integers == channels.integers).all(axis=1)
    far = stays & (channels.reason != "")
    channels.reason[stays] = ""
    imported.channels_kept += int(stays.sum())
    imported.channels_far += int(far.sum())
    imported.channels_rounded += int((~stays).sum())
    imported.reasons.update(str(r) for r in channels.reason if r)
    site.weight_scale, site.method = scales, "imported"
    values = weight_tensor(integers.astype(np.int8), tensor.shape, node.op, site.axis)
    site.stored = replace_weight(graph, node, values, scales, site.axis)


def _channels(weights: FloatArray, stored: StoredWeight) -> _Channels:
    """Find each channel's scale again, by least squares, and check that its weights are its integers times it."""
    reason = np.full(weights.shape[0], "", dtype=object)
    if stored.values.shape != weights.shape:
        reason[:] = _OTHER_LAYOUT
        return _Channels(weights, np.zeros_like(weights), np.zeros(weights.shape[0]), reason)
    integers = stored.values.astype(np.float64)
    energy = np.einsum("ck,ck->c", integers, integers)
    scale = np.einsum("ck,ck->c", weights, integers) / np.maximum(energy, 1.0)
    turned = scale < 0
    integers[turned] *= -1
    scale = np.abs(scale)
    largest = np.abs(weights).max(axis=1, initial=0.0)
    off = np.abs(weights - integers * scale[:, None]).max(axis=1, initial=0.0)
    channels = _Channels(weights, integers, scale, reason)
    channels.refuse(off > _SAME * largest, _CHANGED)
    return channels


def _breaks_pairs(integers: FloatArray) -> npt.NDArray[np.bool_]:
    even = integers.shape[1] // 2 * 2
    return np.asarray((np.abs(integers[:, 0:even:2] + integers[:, 1:even:2]) > PAIR_LIMIT).any(axis=1))


def _grid(channels: _Channels, source: np.float32, result: np.float32 | None) -> npt.NDArray[np.float32]:
    """The exact scale nearest to each kept channel's, its own where no rescale follows; refuses those without one within 2^-9."""
    if result is None:
        return channels.scale.astype(np.float32)
    raw = channels.scale * float(source) / float(result) * 2.0**SHIFT
    nearest = np.rint(raw)
    found = np.full(raw.shape, np.nan, np.float32)
    reach = KEPT * raw
    for offset in (0, *(sign * d for d in range(1, 9) for sign in (1, -1))):  # one b in six has no float32 scale
        b = nearest + offset
        open_ = np.isnan(found) & (np.abs(b - raw) < reach) & (b >= 1) & (b < 2**24)
        if open_.any():
            found[open_] = exact_weight_scale(b[open_].astype(np.int64), source, result)
    dead = ~channels.integers.any(axis=1)
    channels.refuse(np.isnan(found) & ~dead, _GRID)
    return found


@dataclass(frozen=True)
class _Limits:
    """Final scales of one site's input and output (None: float), the largest integer, the pair rule, and 255."""

    source: np.float32
    result: np.float32 | None
    top: int
    paired: bool
    span: int


def _again(
    channels: _Channels, rows: npt.NDArray[np.intp], bias: Array, least: FloatArray, limits: _Limits
) -> tuple[FloatArray, npt.NDArray[np.float32]]:
    """Integers and scales of `rows` by least squared error: a search over scales, and what the source's own scale gives."""
    weights, top = channels.weights[rows], limits.top
    searched = quantise_weight(
        weights,
        limits.source,
        limits.result,
        pair_rule=limits.paired,
        bias=bias[rows],
        top=top,
        activation_top=limits.span,
    )
    integers, scales = searched.values.astype(np.float64), searched.scale.copy()
    wanted = np.where(channels.scale[rows] > 0, channels.scale[rows], scales)
    own = grid_scales(np.maximum(wanted, least[rows]), limits.source, limits.result)
    target = weights / own[:, None].astype(np.float64)
    nearest = round_pairs(target, top=top) if limits.paired else np.clip(np.rint(target), -top, top)
    only_grid = channels.reason[rows] == _GRID
    nearest[only_grid] = channels.integers[rows][only_grid]
    error = [np.square(weights - q * s[:, None].astype(np.float64)).sum(axis=1) for q, s in ((integers, scales), (nearest, own))]
    closer = error[1] <= error[0]
    integers[closer], scales[closer] = nearest[closer], own[closer]
    return integers, scales
