"""Make activation scales final: tie-free at every Add, dyadic at every pool (see `qcompile.solver`). No scale moves after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from operator import is_not

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes.quantise import set_clamp
from qcompile.plan import ClampSite, ScaleClass
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.solver import reaches_past, solve


@dataclass(frozen=True)
class DyadicScales:
    """Solve the scale constraints of `context.plan` and write the scales into the graph."""

    name: str = "dyadic_scales"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a scale that moved, and one a Clip on integers where a scale reaches past a folded bound."""
        report = Report()
        plan, kind = context.plan, context.activations
        if plan is None:
            return report
        solve(plan, kind, close=context.imported is not None)
        for place in plan.classes:
            assert place.scale_const is not None and place.zero_const is not None
            if place.scale_const.array() != place.scale or place.zero_const.array() != place.zero_point:
                report.rewrites += 1
            place.scale_const.assign(np.asarray(place.scale, np.float32))
            place.zero_const.assign(np.asarray(place.zero_point, kind.dtype))
            if reaches_past(place, kind) and not place.clamped:
                report.rewrites += _clamp(graph, context, place)
        for clamp in plan.clamps:
            set_clamp(clamp, context)
        return report


def _clamp(graph: Graph, context: Context, place: ScaleClass) -> int:
    """Clip the integers of every tensor quantised into `place` to the folded bounds, which its scale now reaches past."""
    plan = context.plan
    assert plan is not None and place.floor is not None and place.ceiling is not None
    place.clamped = True
    quantisers = [n for n in graph.nodes if n.op == "QuantizeLinear" and n.inputs[1] is place.scale_const]
    for quantiser in quantisers:
        integers = quantiser.outputs[0]
        bounds = [graph.constant(f"{integers.name}_{end}", np.zeros((), context.activations.dtype)) for end in ("low", "high")]
        clip = graph.node("Clip", [integers, *bounds], [integers.name + "_clamped"])
        graph.replace_uses(integers, clip.outputs[0], only=partial(is_not, clip))
        plan.clamps.append(ClampSite(clip, place, place.floor, place.ceiling))
    return len(quantisers)
