"""Make activation scales final: tie-free at every Add, dyadic at every pool (see `qcompile.solver`). No scale moves after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes.quantise import set_clamp
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.solver import solve


@dataclass(frozen=True)
class DyadicScales:
    """Solve the scale constraints of `context.plan` and write the scales into the graph."""

    name: str = "dyadic_scales"
    keeps: Promise = Lossy()

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a scale that moved."""
        report = Report()
        plan, kind = context.plan, context.activations
        if plan is None:
            return report
        solve(plan, kind)
        for place in plan.classes:
            assert place.scale_const is not None and place.zero_const is not None
            if place.scale_const.array() != place.scale or place.zero_const.array() != place.zero_point:
                report.rewrites += 1
            place.scale_const.assign(np.asarray(place.scale, np.float32))
            place.zero_const.assign(np.asarray(place.zero_point, kind.dtype))
        for clamp in plan.clamps:
            set_clamp(clamp, context)
        return report
