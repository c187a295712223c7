"""Biases to int32 at scale Sx*Sw: the accumulator's own scale, so that adding them is exact.

    b  ->  DequantizeLinear(round(b / (Sx*Sw)), Sx*Sw, axis=0)

|bias| + 255 * sum|w| < 2^31 is checked for every channel: no accumulator can wrap.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Array, Graph
from qcompile.plan import LinearSite
from qcompile.rewrite import Lossy, Promise, Report


def check_accumulator(site: LinearSite, bias: Array, span: int) -> None:
    """Raise PassError, naming node and channel, unless |bias| + span * sum|w| < 2^31 for every channel of `site`.

    span: the largest magnitude of an activation minus its zero point (255); bias: integers, of any type, [channels].
    """
    assert site.stored is not None
    weights = site.stored.array().astype(np.int64)
    axes = tuple(a for a in range(weights.ndim) if a != site.axis)
    reach = span * np.abs(weights).sum(axis=axes) + np.abs(bias)
    if (reach >= 2**31).any():
        label = site.node.label
        raise PassError(
            f"node '{label}', channel {int(np.argmax(reach))}: the int32 accumulator could overflow; "
            f"leave it float with --exclude '{label}'"
        )


@dataclass(frozen=True)
class IntegerBias:
    """Round each linear node's bias; the last step before lowering."""

    name: str = "integer_bias"
    keeps: Promise = field(default_factory=lambda: Lossy(-30.0))  # 4 bits rounded to nearest may drown a net until refine_layers

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a bias."""
        report = Report()
        if context.plan is None or context.settings.target == "tensorrt":
            return report  # TensorRT wants float biases
        span = context.activations.high - context.activations.low
        for site in context.plan.linears:
            bias = site.node.constant(2)
            if bias is None or site.weight_scale is None:
                continue
            scale = np.float32(site.source.scale) * site.weight_scale
            integers = np.rint(bias.array().astype(np.float64) / scale.astype(np.float64))
            check_accumulator(site, integers, span)
            stored = graph.constant(bias.name + "_int32", integers.astype(np.int32))
            factor = graph.constant(bias.name + "_scale", scale)
            node = graph.node(
                "DequantizeLinear", [stored, factor], [bias.name + "_dequantized"], name=site.node.label + "_bias_dq", axis=0
            )
            site.node.inputs[2] = node.outputs[0]
            report.rewrites += 1
        graph.cleanup()
        return report
