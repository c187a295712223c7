"""Layer after layer, on the quantised inputs that really reach it: learned rounding, then bias correction.

    W*     <- W where the inputs hold no noise, else what makes the best of it, `qcompile.compensation`
    W_int8 <- argmin (W* - s q) Cov(x') (W* - s q)^T    second-order rounding (GPTQ: Frantar et al. 2022) and descent,
                                                        with 4 bits on the best of several scales: `qcompile.lattice`
    bias   <- bias + E[W x] - E[s q x']                 bias correction (Nagel et al. 2019, section 4.2)

x comes from the float model, x' from the quantised one with all earlier layers refined; one walk feeds both. The covariance is
centred because the bias takes care of the mean. Activation scales stay; a weight scale only moves together with its integers,
on the dyadic grid. Rounding is learned with real calibration data only (effort `fast` leaves it
out); bias correction works on the int32 bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes._layer import Layer
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.rounding import WIDEST
from qcompile.walk import Stream

_FEW = 16  # samples for bias correction alone, effort `fast`: means settle long before covariances do


@dataclass(frozen=True)
class RefineLayers:
    """Learned rounding and bias correction of every linear node, by one walk over both models."""

    damping: float = 0.01
    name: str = "refine_layers"
    # 4 bits rounded to nearest (effort `fast`) may leave little but noise: that is reported, and no fault of a pass.
    keeps: Promise = field(default_factory=lambda: Lossy(-6.0))

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
        worlds = Stream(original, samples), Stream(graph, samples)
        for site in plan.linears:
            if context.progress is not None:
                context.progress("refining layers")
            layer = Layer(site, by_name[site.node.name], worlds, context)
            moved = False
            if learn and layer.width > WIDEST:
                report.refuse(site.node.label, "reduction too wide for a second moment in memory: rounded to nearest")
            elif learn:
                moved = layer.learn_rounding(self.damping)
            if settings.bias_correction:
                moved |= layer.correct_bias()
            report.rewrites += moved
        return report
