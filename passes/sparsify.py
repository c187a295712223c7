"""Weights that become zero (`--sparsity`), float -> float: N of every M along the input channels, or a share of a layer.

    W x + b   ->   V x + b',   V zero where the criterion says so

The walk runs the dense model beside the one that is sparse so far. With criterion `obs` each layer's V is chosen for the inputs
that really reach it, to give the dense model's outputs: weights are first regressed on those inputs (`qcompile.compensation`),
then the mask and the least-squares refit on it follow (`qcompile.obs`), then the bias takes the mean error. The other criteria
only set weights to zero, as their papers do. Quantisation comes behind: rounding holds every zero at the integer 0.

Left dense, the reason counted (`_sparse_layers`): the first layer and the last (unless it holds a fifth of all weights),
depthwise and small ones, channels that do not divide into blocks of M, weights read by two nodes, what `--exclude` names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import add

import numpy as np

from qcompile import compensation
from qcompile.compensation import compensate, pair_moments
from qcompile.context import Context
from qcompile.criteria import CRITERIA, Criterion
from qcompile.errors import ModelError
from qcompile.graph import Array, Graph, Node
from qcompile.moments import input_covariance, input_moment, input_power
from qcompile.obs import prune
from qcompile.passes._linear import bias_of, write
from qcompile.passes._sparse_layers import SparseLayer, sparse_layers
from qcompile.ranges import Thinned
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.rounding import WIDEST
from qcompile.sparsity import Mask, Rule, Share, SparseRecord, keep_mask, parse_sparsity
from qcompile.walk import Stream, linear_mean, mean_of

_SAMPLE_BYTES = 64 << 20
_SAMPLES = {"fast": 64, "default": 128, "best": 256}
_MOST = 0.95  # of one layer's weights, however little they cost: a layer without weights would cut the model in two
_WIDE = "reduction too wide for a second moment in memory: zeros by its diagonal, nothing refitted"


@dataclass(frozen=True)
class Sparsify:
    """Set weights to zero and refit the others."""

    damping: float = 0.01
    name: str = "sparsify"
    # Magnitude alone may leave little but noise of a net: that is what is reported, and no fault of a pass.
    keeps: Promise = field(default_factory=lambda: Lossy(-60.0, asked_for=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a layer. Raises ModelError where every layer stays dense."""
        report = Report()
        if context.settings.sparsity is None or context.sparse is not None:
            return report
        rule = parse_sparsity(context.settings.sparsity)
        graph.infer_shapes()
        graph.sort()
        layers = sparse_layers(graph, context, rule, report)
        if not layers:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in report.skipped.most_common(3))
            raise ModelError(f"--sparsity {rule}: no layer can be made sparse ({reasons or 'no Conv, Gemm or MatMul'})")
        criterion = CRITERIA[context.settings.criterion]
        samples = _samples(context) if criterion.needs_data else []
        walk = _Sparsifier(graph, context, criterion, samples, self.damping, report)
        spread = isinstance(rule, Share) and context.settings.sparsity_scope == "global"
        rules = _spread(rule.zeros, walk.costs(layers)) if spread else [rule] * len(layers)
        context.sparse = walk.run(layers, rules)
        report.rewrites = len(context.sparse)
        graph.cleanup()
        return report


def _spread(share: float, costs: list[Array]) -> list[Rule]:
    """Each layer's own share of zeros, where all those weights go that cost least wherever they are; `_MOST` of any layer."""
    every = np.concatenate([c.reshape(-1) for c in costs])
    threshold = np.partition(every, max(0, round(share * every.size) - 1))[max(0, round(share * every.size) - 1)]
    return [Share(min(_MOST, float((c <= threshold).mean()))) for c in costs]


def _samples(context: Context) -> list[dict[str, Array]]:
    thinned = Thinned(budget_bytes=_SAMPLE_BYTES, most=_SAMPLES[context.settings.effort])
    for _ in thinned.passing(context.calibration()):
        pass
    return thinned.kept


class _Sparsifier:
    """One walk: layer after layer."""

    def __init__(
        self,
        graph: Graph,
        context: Context,
        criterion: Criterion,
        samples: list[dict[str, Array]],
        damping: float,
        report: Report,
    ) -> None:
        self.graph, self.context, self.criterion = graph, context, criterion
        self.damping, self.report, self.samples = damping, report, samples
        dense = graph.copy()
        self.originals = {n.outputs[0].name: n for n in dense.nodes}
        self.worlds = (Stream(dense, samples), Stream(graph, samples)) if samples else None

    def costs(self, layers: list[SparseLayer]) -> list[Array]:
        """What the loss of each weight costs its layer's output in the dense model, as a share of that output's energy.

        Magnitude: w^2 itself.
        """
        found = []
        dense = Stream(self.graph.copy(), self.samples) if self.samples else None
        for layer in layers:
            power = None
            if dense is not None:
                node = next(n for n in dense.graph.nodes if n.outputs[0].name == layer.node.outputs[0].name)
                values = dense.values(node.inputs[0])
                power = input_power(node, layer.weight.dims, values, len(values), self.context.settings.seed)
            cost = self.criterion.scores(layer.matrix(), power)
            found.append(cost if power is None else cost / max(float(cost.sum()), 1e-300))
        return found

    def run(self, layers: list[SparseLayer], rules: list[Rule]) -> list[SparseRecord]:
        """Make `layers` sparse, each by its rule."""
        return [self._layer(layer, rule) for layer, rule in zip(layers, rules, strict=True)]

    def _layer(self, layer: SparseLayer, rule: Rule) -> SparseRecord:
        if self.context.progress is not None:
            self.context.progress("sparsifying layers")
        weight, ratio = layer.matrix(), None
        if self.worlds is None:
            mask = self._mask(weight, None, rule)
            layer.weight.assign(layer.tensor(weight * mask))
        else:
            original = self.originals[layer.node.outputs[0].name]
            source = original.inputs[0]
            exact, noisy = self.worlds[0].values(source), self.worlds[1].values(layer.source)
            mask, ratio = self._with_data(layer, original, weight, exact, noisy, rule)
        return SparseRecord(layer.node.label, layer.node.op, mask.size, int(mask.size - mask.sum()), ratio)

    def _with_data(
        self, layer: SparseLayer, original: Node, weight: Array, exact: list[Array], noisy: list[Array], rule: Rule
    ) -> tuple[Mask, float | None]:
        node, dims, seed = layer.node, layer.weight.dims, self.context.settings.seed
        if not self.criterion.refits or weight.shape[2] > WIDEST:
            if self.criterion.refits:
                self.report.refuse(node.label, _WIDE)
            power = input_power(node, dims, noisy, len(noisy), seed)
            mask = self._mask(weight, power, rule)
            layer.weight.assign(layer.tensor(weight * mask))
            return mask, _diagonal_db(weight, mask, power)
        target, moment = self._target(layer, weight, exact, noisy)
        pruned, mask = prune(target, moment, rule, self.damping)
        layer.weight.assign(layer.tensor(pruned))
        # What is exactly zero in float64 is so in float32; a kept weight that underflows is a zero more.
        if layer.linear is not None:
            bias = bias_of(layer.linear)
            assert bias is not None
            before = linear_mean(original, original.inputs[1].array(), mean_of(exact))
            after = linear_mean(node, layer.weight.array(), mean_of(noisy))
            write(self.graph, layer.linear, layer.weight.array().astype(np.float64), bias + before - after)
        noise = _energy(pruned - target, moment)
        signal = _energy(target, moment)
        return mask, float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None

    def _target(self, layer: SparseLayer, weight: Array, exact: list[Array], noisy: list[Array]) -> tuple[Array, Array]:
        """The weights to come near to, and the second moment of what they multiply (about its mean where a bias takes that)."""
        node, dims, seed, count = layer.node, layer.weight.dims, self.context.settings.seed, len(noisy)
        if layer.linear is None or bias_of(layer.linear) is None:
            return weight, input_moment(node, dims, noisy, count, seed)
        if weight.shape[2] > compensation.WIDEST:
            return weight, input_covariance(node, dims, noisy, count, seed)
        folds = pair_moments(node, dims, exact, noisy, count, seed)
        return compensate(weight, folds)[0], reduce(add, folds).covariances()[1]

    def _mask(self, weight: Array, power: Array | None, rule: Rule) -> Mask:
        by_row = self.criterion.by_row and isinstance(rule, Share)
        return keep_mask(self.criterion.scores(weight, power), rule, by_row=by_row)


def _energy(weight: Array, moment: Array) -> float:
    """E|W x|^2 over all rows."""
    return float(np.einsum("gck,gck->", weight @ moment, weight))


def _diagonal_db(weight: Array, mask: Mask, power: Array) -> float | None:
    """The same ratio where inputs are taken for independent."""
    energy = np.square(weight) * power[:, None, :]
    signal, noise = float(energy.sum()), float(energy[~mask].sum())
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else None
