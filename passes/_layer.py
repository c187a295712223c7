"""One linear node while it is refined: its float original, what really reaches it, and its stored integers, scales and bias."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add

import numpy as np

from qcompile import compensation
from qcompile.compensation import PairMoments, compensate, pair_moments
from qcompile.context import Context
from qcompile.graph import Node, Value
from qcompile.lattice import Grid, round_on_lattice
from qcompile.moments import input_covariance, rows_of, rows_wanted
from qcompile.obs import restrict
from qcompile.passes._stored import stored_integers, stored_scale
from qcompile.passes.integer_bias import check_accumulator
from qcompile.passes.round_weights import weight_matrix, weight_tensor
from qcompile.plan import LinearSite
from qcompile.qparams import WEIGHT_MAX, least_scales
from qcompile.reconstruction import Rows, fit_bias, reconstruct
from qcompile.rounding import nearest
from qcompile.runtime import Array
from qcompile.walk import Stream, dequantise, linear_mean, mean_of

# Scales tried for a layer whose weights are narrow enough that the choice matters, by effort.
_CANDIDATES = {"fast": 0, "default": 8, "best": 32}


class Layer:
    """A `site` of the plan; both worlds are walked up to its input."""

    def __init__(self, site: LinearSite, original: Node, worlds: tuple[Stream, Stream], context: Context) -> None:
        float_world, integer_world = worlds
        self.site = site
        self.context = context
        self.original = original
        self.span = context.activations.high - context.activations.low
        self.top = context.settings.top_for(site.node.name)
        weight, reader, source = original.constant(1), site.node.inputs[0].producer, original.inputs[0]
        assert weight is not None and reader is not None and site.weight_scale is not None and isinstance(source, Value)
        self.weight = weight.array()
        self.scale = site.weight_scale
        self.stored = stored_integers(site.node, 1)
        integers = reader.inputs[0]
        assert isinstance(integers, Value)
        self.integers = integer_world.values(integers)
        self.exact = float_world.values(source)
        self.rows: Rows | None = None
        self.bias: Array | None = None

    @property
    def width(self) -> int:
        """K, the length of the products' reduction."""
        return int(self.weight.size // self.weight.shape[self.site.axis])

    def inputs(self) -> Iterator[Array]:
        """The quantised input of each sample, as float32 values."""
        return (dequantise(x, self.site.source.scale, self.site.source.zero_point) for x in self.integers)

    def learn_rounding(self, damping: float) -> bool:
        """Choose integers and scales for the inputs that reach the layer. Returns whether anything moved."""
        op, axis, settings = self.original.op, self.site.axis, self.context.settings
        matrix = weight_matrix(self.weight, op, axis)
        groups = self.original.attr("group", 1) if op == "Conv" else 1
        weight = matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1])
        steps = self.scale.reshape(weight.shape[:2])
        pair_rule = settings.pair_rule and not self.site.depthwise
        folds = self._folds()
        whole = None if folds is None else reduce(add, folds)
        target, covariance, strength = self._target(weight, folds, whole)
        grid = Grid(
            np.float32(self.site.source.scale),
            self.site.grid_scale,
            pair_rule,
            self.top,
            damping,
            _CANDIDATES[settings.effort] if self.top < WEIGHT_MAX else 0,
        )
        keep = weight != 0 if settings.sparsity is not None else None
        if keep is not None:
            target = restrict(target, covariance, keep, damping)
        integers, scale = round_on_lattice(target, steps, covariance, self._least(target), grid, keep)
        old = weight_matrix(self.stored.array(), op, axis)
        changed = not np.array_equal(integers.reshape(old.shape), old) or not np.array_equal(scale, steps)
        if not changed:
            return False
        self.site.method = "second order, descent" + (", compensated" if np.isfinite(strength) else "")
        if whole is not None and self.context.diagnose:
            plain = nearest(weight, steps, pair_rule, self.top) * steps[:, :, None].astype(np.float64)
            self.site.gain_db = _gain(whole, weight, plain, integers * scale[:, :, None].astype(np.float64))
        self.stored.assign(weight_tensor(integers.reshape(matrix.shape), self.weight.shape, op, axis))
        self._set_scale(scale.reshape(-1))
        return True

    def _target(self, weight: Array, folds: list[PairMoments] | None, whole: PairMoments | None) -> tuple[Array, Array, float]:
        """The weights to round, the covariance of what reaches the layer, and how strongly they were regressed (inf: not).

        whole: the sum of `folds`.
        """
        settings = self.context.settings
        if folds is None or whole is None:
            count = len(self.integers)
            covariance = input_covariance(self.original, self.weight.shape, self.inputs(), count, settings.seed)
            return np.asarray(weight, np.float64), covariance, np.inf
        covariance = whole.covariances()[1]
        target, strength = compensate(weight, folds)
        if settings.effort == "best" and self.top < WEIGHT_MAX:
            self.rows = self._rows(weight)
            target, self.bias, behind = reconstruct(self.rows, weight, target, self._float_bias().reshape(weight.shape[:2]))
            strength = min(strength, behind)
        return target, covariance, strength

    def _folds(self) -> list[PairMoments] | None:
        """Moments of both worlds' inputs; None where the layer is too wide for them."""
        if self.width > compensation.WIDEST:
            return None
        node, shape, context = self.original, self.weight.shape, self.context
        count = len(self.integers)
        return pair_moments(node, shape, self.exact, self.inputs(), count, context.settings.seed, with_exact=context.diagnose)

    def _rows(self, weight: Array) -> Rows:
        """Noisy inputs beside the float outputs, as far as the layer's integers can hold them."""
        node, shape, settings = self.original, self.weight.shape, self.context.settings
        wanted = rows_wanted(node, shape, len(self.integers))
        draws = [np.random.default_rng(settings.seed) for _ in range(2)]
        drawn = (
            [rows_of(node, shape, x, wanted, draw) for x in world]
            for world, draw in zip((self.exact, self.inputs()), draws, strict=True)
        )
        # Every other sample first: the halves that judge each other are then alike, whatever order the data came in.
        exact, noisy = (np.concatenate(rows[::2] + rows[1::2], axis=1) for rows in drawn)
        result = self.site.result
        low, high = -np.inf, np.inf
        if result is not None:
            kind = result.kind(self.context.activations)
            low, high = (float(result.scale) * (end - result.zero_point) for end in (kind.low, kind.high))
        bias = self._float_bias().reshape(weight.shape[0], 1, weight.shape[1])
        wanted_outputs = np.matmul(exact, np.swapaxes(weight, 1, 2).astype(np.float32)) + bias.astype(np.float32)
        return Rows(noisy, np.clip(wanted_outputs, low, high).astype(np.float32), low, high)

    def _float_bias(self) -> Array:
        """The float model's bias [channels]; zeros where it has none."""
        bias = self.original.constant(2)
        channels = self.weight.shape[self.site.axis]
        return np.zeros(channels) if bias is None else np.broadcast_to(bias.array().reshape(-1), (channels,)).astype(np.float64)

    def _least(self, target: Array) -> Array:
        """The scales [groups, channels] below which an accumulator could overflow."""
        rows = target.reshape(-1, target.shape[2])
        return least_scales(rows, self._float_bias(), float(self.site.source.scale), self.span).reshape(target.shape[:2])

    def _set_scale(self, scale: Array) -> None:
        """Let weights and bias stand on `scale` [channels]; the bias is rounded anew."""
        if np.array_equal(scale, self.scale):
            return
        before = np.float32(self.site.source.scale) * self.scale
        self.scale = scale.astype(np.float32)
        self.site.weight_scale = self.scale
        stored_scale(self.site.node, 1).assign(self.scale)
        if self.site.node.constant(2) is not None:  # a target with float biases
            return
        step = np.float32(self.site.source.scale) * self.scale
        bias = stored_integers(self.site.node, 2)
        moved = np.rint(bias.array().astype(np.float64) * before.astype(np.float64) / step.astype(np.float64))
        check_accumulator(self.site, moved, self.span)
        bias.assign(moved.astype(np.int32))
        stored_scale(self.site.node, 2).assign(step)

    def correct_bias(self) -> bool:
        """Move the int32 bias by the difference of the mean outputs, in steps of Sx*Sw."""
        site = self.site
        if self.rows is not None and self.bias is not None:
            return self._fit_bias(self.rows, self.bias)
        wanted = linear_mean(self.original, self.weight, mean_of(self.exact))
        shape = [1] * self.weight.ndim
        shape[site.axis] = -1
        rounded = self.stored.array().astype(np.float32) * self.scale.reshape(shape)
        reached = linear_mean(self.original, rounded, mean_of(self.inputs()))
        step = site.source.scale.astype(np.float64) * self.scale.astype(np.float64)
        plain = site.node.constant(2)
        if plain is not None:  # a target with float biases
            plain.assign((plain.array() + wanted - reached).astype(np.float32))
            return True
        shift = np.rint((wanted - reached) / step).astype(np.int64)
        return self._set_bias(stored_integers(site.node, 2).array().astype(np.int64) + shift)

    def _fit_bias(self, rows: Rows, start: Array) -> bool:
        """The bias that the rounded weights want behind the activation."""
        stored = weight_matrix(self.stored.array(), self.original.op, self.site.axis)
        weight = (stored * self.scale[:, None].astype(np.float64)).reshape(*start.shape, -1)
        bias = fit_bias(rows, weight, start).reshape(-1)
        plain = self.site.node.constant(2)
        if plain is not None:
            plain.assign(bias.astype(np.float32))
            return True
        return self._set_bias(np.rint(bias / (float(self.site.source.scale) * self.scale.astype(np.float64))).astype(np.int64))

    def _set_bias(self, wanted: Array) -> bool:
        bias = stored_integers(self.site.node, 2)
        check_accumulator(self.site, wanted, self.span)
        moved = not np.array_equal(bias.array(), wanted)
        bias.assign(wanted.astype(np.int32))
        return moved


def _gain(moments: PairMoments, weight: Array, before: Array, after: Array) -> float | None:
    """What `after` gains over `before` at the layer's own output, in dB; None where no error is left."""
    old, new = (moments.error(weight, stored) for stored in (before, after))
    return float(10 * np.log10(old / new)) if old > 0 and new > 0 else None
