"""Bias correction in closed form: what rounding the weights adds to the mean output, taken out of the int32 bias.

    bias <- bias + (W - s q) E[x]        Nagel et al. 2019, section 4.2.1

E[x] is known in closed form where x comes from BatchNormalizations through Relu, Clip and Add (`qcompile.expected`), else it is
the mean over the synthetic inputs. The shift that rounded activations add is left alone: synthetic inputs would mismeasure it.
With data this is the business of `refine_layers`; an imported model, whose integers are given, comes here with its data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.expected import Expected, expected_values
from qcompile.graph import Array, Graph, Node, Value
from qcompile.passes._stored import stored_integers
from qcompile.passes.integer_bias import check_accumulator
from qcompile.plan import LinearSite
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.walk import Stream, linear_mean, mean_of


@dataclass(frozen=True)
class CorrectMeans:
    """Moves int32 biases; in the place of `refine_layers` without calibration data, and for an imported model with them."""

    name: str = "correct_means"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a layer whose bias moved. Needs int32 biases and `context.samples`; runs once."""
        report = Report()
        plan, original = context.plan, context.float_graph
        fires = context.synthetic if context.imported is None else bool(context.samples) and not context.synthetic
        if not fires or not context.settings.bias_correction or plan is None or original is None or plan.refined:
            return report
        plan.refined = True
        expected = expected_values(original, context.batch_norms)
        by_name = {n.name: n for n in original.nodes}
        stream = Stream(original, context.samples)
        for site in plan.linears:
            if context.progress is not None:
                context.progress("correcting means")
            node = by_name[site.node.name]
            source = node.inputs[0]
            assert isinstance(source, Value)
            means = _means(mean_of(stream.values(source)), expected.get(source.name))
            report.rewrites += _correct(site, node, means, context.activations.high - context.activations.low)
        return report


def _means(synthetic: list[tuple[Array, int]], known: Expected | None) -> list[tuple[Array, int]]:
    """The input's mean by shape: from statistics the same at all positions of a channel, else what the synthetic inputs gave."""
    if known is None:
        return synthetic
    mean = known.statistics.mean
    means = []
    for synthesised, count in synthetic:
        # Channels that pad_channels added behind the statistics' own hold zeros.
        full = np.pad(mean.reshape(-1), (0, max(0, synthesised.shape[1] - mean.size)))
        means.append((np.broadcast_to(full.reshape(1, -1, *[1] * (synthesised.ndim - 2)), synthesised.shape), count))
    return means


def _correct(site: LinearSite, original: Node, means: list[tuple[Array, int]], span: int) -> bool:
    weight = original.constant(1)
    assert weight is not None and site.weight_scale is not None
    values = weight.array()
    shape = [1] * values.ndim
    shape[site.axis] = -1
    rounded = stored_integers(site.node, 1).array().astype(np.float32) * site.weight_scale.reshape(shape)
    step = site.source.scale.astype(np.float64) * site.weight_scale.astype(np.float64)
    shift = np.rint(linear_mean(original, values - rounded, means) / step).astype(np.int64)
    bias = stored_integers(site.node, 2)
    corrected = bias.array().astype(np.int64) + shift
    check_accumulator(site, corrected, span)
    bias.assign(corrected.astype(np.int32))
    return bool(shift.any())
