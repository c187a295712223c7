"""Bias correction by the walk: each channel's mean output is brought back to the float model's (Nagel et al. 2019, section 4.2).

    bias += E[W x] - E[W' x']      x from the float model, x' from the quantised one with all earlier layers corrected

Rounding weights shifts the mean of every channel, and the shifts add up through the layers; the correction measures both the
weights' and the inputs' part. It works on the int32 bias: no scale and no weight moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Const, Graph, Node, Value
from qcompile.plan import LinearSite
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.walk import Stream, dequantise, linear_mean, mean_of


@dataclass(frozen=True)
class CorrectBias:
    """Needs int32 biases (after `integer_bias`) and `context.samples`."""

    name: str = "correct_bias"
    keeps: Promise = Lossy()

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a corrected bias. Runs once."""
        report = Report()
        plan, original = context.plan, context.float_graph
        if plan is None or original is None or context.corrected or not context.settings.bias_correction:
            return report
        context.corrected = True
        by_name = {n.outputs[0].name: n for n in original.nodes}
        float_world, integer_world = Stream(original, context.samples), Stream(graph, context.samples)
        for site in plan.linears:
            if context.progress is not None:
                context.progress("correcting biases")
            if _correct(site, _float_node(site, by_name), float_world, integer_world):
                report.rewrites += 1
        return report


def _float_node(site: LinearSite, by_name: dict[str, Node]) -> Node:
    """The node of the float graph that `site` came from: node names are kept."""
    found = next((n for n in by_name.values() if n.name == site.node.name), None)
    if found is None:
        raise PassError(f"node '{site.node.label}' is not in the float graph")
    return found


def _correct(site: LinearSite, original: Node, float_world: Stream, integer_world: Stream) -> bool:
    source, weight = original.inputs[0], original.constant(1)
    reader = site.node.inputs[0].producer
    stored, stored_bias = _integers(site.node, 1), _integers(site.node, 2)
    assert isinstance(source, Value) and weight is not None and reader is not None and site.weight_scale is not None
    integers = reader.inputs[0]
    assert isinstance(integers, Value)
    wanted = linear_mean(original, weight.array(), mean_of(float_world.values(source)))
    shape = [1] * len(stored.dims)
    shape[site.axis] = -1
    rounded = stored.array().astype(np.float32) * site.weight_scale.reshape(shape)
    inputs = (dequantise(x, site.source.scale, site.source.zero_point) for x in integer_world.values(integers))
    reached = linear_mean(site.node, rounded, mean_of(inputs))
    step = site.source.scale.astype(np.float64) * site.weight_scale.astype(np.float64)
    shift = np.rint((wanted - reached) / step)
    corrected = stored_bias.array().astype(np.int64) + shift.astype(np.int64)
    if (np.abs(corrected) >= 2**30).any():  # integer_bias left half of int32 to the products
        raise PassError(
            f"node '{site.node.label}': the corrected bias leaves int32; leave it float with --exclude '{site.node.label}'"
        )
    stored_bias.assign(corrected.astype(np.int32))
    return bool(shift.any())


def _integers(node: Node, index: int) -> Const:
    producer = node.inputs[index].producer
    constant = producer.constant(0) if producer is not None else None
    if constant is None:
        raise PassError(f"node '{node.label}': input {index} is not a dequantised constant")
    return constant
