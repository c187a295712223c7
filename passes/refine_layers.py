"""Layer after layer, on the quantised inputs that really reach it: learned rounding, then bias correction. No scale moves.

    W_int8 <- argmin (W - s q) Cov(x') (W - s q)^T      second-order rounding (GPTQ: Frantar et al. 2022), `qcompile.rounding`
    bias   <- bias + E[W x] - E[s q x']                 bias correction (Nagel et al. 2019, section 4.2)

x comes from the float model, x' from the quantised one with all earlier layers refined; one walk feeds both. The covariance is
centred because the bias takes care of the mean. Rounding is learned with real calibration data only (effort `fast` leaves it
out); bias correction works on the int32 bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Const, Graph, Node, Value
from qcompile.moments import input_covariance
from qcompile.passes.integer_bias import check_accumulator
from qcompile.passes.round_weights import weight_matrix, weight_tensor
from qcompile.plan import LinearSite
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.rounding import rounding_gain_db, second_order_round
from qcompile.runtime import Array
from qcompile.walk import Stream, dequantise, linear_mean, mean_of

_WIDEST = 6144  # K: the covariance, its inverse and factor take 3 * 8 * K^2 bytes, 0.9 GB here
_FEW = 16  # samples for bias correction alone, effort `fast`: means settle long before covariances do


@dataclass(frozen=True)
class RefineLayers:
    """Learned rounding and bias correction of every linear node, by one walk over both models."""

    damping: float = 0.01
    name: str = "refine_layers"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a layer whose weights or bias moved. Needs int32 biases and `context.samples`; runs once."""
        report = Report()
        plan, original, settings = context.plan, context.float_graph, context.settings
        if plan is None or original is None or plan.refined:
            return report
        plan.refined = True
        learn = settings.effort != "fast" and not context.synthetic
        if not context.samples or not (learn or settings.bias_correction):
            return report
        by_name = {n.name: n for n in original.nodes}
        samples = context.samples if settings.effort != "fast" else context.samples[:: -(-len(context.samples) // _FEW)]
        float_world, integer_world = Stream(original, samples), Stream(graph, samples)
        for site in plan.linears:
            if context.progress is not None:
                context.progress("refining layers")
            layer = _Layer(site, by_name[site.node.name], integer_world, context)
            moved = False
            if learn and layer.width > _WIDEST:
                report.refuse(site.node.label, "reduction too wide for a second moment in memory: rounded to nearest")
            elif learn:
                moved = layer.learn_rounding(context, self.damping)
            if settings.bias_correction:
                moved |= layer.correct_bias(float_world)
            report.rewrites += moved
        return report


class _Layer:
    """One linear node, its float original, and the quantised values that it reads (one array a sample)."""

    def __init__(self, site: LinearSite, original: Node, integer_world: Stream, context: Context) -> None:
        self.site = site
        self.span = context.activations.high - context.activations.low
        self.original = original
        weight, reader = original.constant(1), site.node.inputs[0].producer
        assert weight is not None and reader is not None and site.weight_scale is not None
        self.weight = weight.array()
        self.scale = site.weight_scale
        self.stored = _integers(site.node, 1)
        source = reader.inputs[0]
        assert isinstance(source, Value)
        self.inputs = integer_world.values(source)

    @property
    def width(self) -> int:
        """K, the length of the products' reduction."""
        return int(self.weight.size // self.weight.shape[self.site.axis])

    def _input(self, integers: Array) -> Array:
        return dequantise(integers, self.site.source.scale, self.site.source.zero_point)

    def learn_rounding(self, context: Context, damping: float) -> bool:
        """Round the weights again, by second order; never worse than before on the layer's own covariance."""
        op, axis = self.original.op, self.site.axis
        samples = (self._input(x) for x in self.inputs)
        covariance = input_covariance(self.original, self.weight.shape, samples, len(self.inputs), context.settings.seed)
        groups = covariance.shape[0]
        matrix = weight_matrix(self.weight, op, axis)
        start = weight_matrix(self.stored.array(), op, axis)
        shape = (groups, matrix.shape[0] // groups, matrix.shape[1])
        rounded = second_order_round(
            matrix.reshape(shape),
            self.scale.reshape(shape[:2]),
            covariance,
            start.reshape(shape),
            pair_rule=context.settings.target == "any" and not self.site.depthwise,
            damping=damping,
            top=context.settings.top_for(self.site.node.name),
        ).reshape(matrix.shape)
        if np.array_equal(rounded, start):
            return False
        self.site.method = "second order"
        if context.diagnose:
            old, new = (q.reshape(shape) for q in (start, rounded))
            self.site.gain_db = rounding_gain_db(matrix.reshape(shape), self.scale.reshape(shape[:2]), covariance, old, new)
        self.stored.assign(weight_tensor(rounded, self.weight.shape, op, axis))
        return True

    def correct_bias(self, float_world: Stream) -> bool:
        """Move the int32 bias by the difference of the mean outputs, in steps of Sx*Sw."""
        site, source = self.site, self.original.inputs[0]
        assert isinstance(source, Value)
        wanted = linear_mean(self.original, self.weight, mean_of(float_world.values(source)))
        shape = [1] * self.weight.ndim
        shape[site.axis] = -1
        rounded = self.stored.array().astype(np.float32) * self.scale.reshape(shape)
        reached = linear_mean(self.original, rounded, mean_of(self._input(x) for x in self.inputs))
        step = site.source.scale.astype(np.float64) * self.scale.astype(np.float64)
        plain = site.node.constant(2)
        if plain is not None:  # a target with float biases
            plain.assign((plain.array() + wanted - reached).astype(np.float32))
            return True
        shift = np.rint((wanted - reached) / step).astype(np.int64)
        bias = _integers(site.node, 2)
        corrected = bias.array().astype(np.int64) + shift
        check_accumulator(site, corrected, self.span)
        bias.assign(corrected.astype(np.int32))
        return bool(shift.any())


def _integers(node: Node, index: int) -> Const:
    producer = node.inputs[index].producer
    constant = producer.constant(0) if producer is not None else None
    if constant is None:
        raise PassError(f"node '{node.label}': input {index} is not a dequantised constant")
    return constant
