r"""What one step of every wide sum is worth, in formats with integer kernels: chosen before weights are rounded.

    residual = acc * b[channel] + residual',      Sx * Sw[channel] = b[channel] * u,   b a small whole number

so that a Gemm enters the residual stream without any rounding (and the weights' scales are multiples of u / Sx: they are chosen
for it). u is the finest step for which no operand can leave 2^29 steps, whatever the input: of a Gemm that is
255 Sx sum |W| + |bias|, of a LayerNormalization sqrt(d) max |gamma| + max |beta|, of a table its largest entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import frexp, sqrt

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Graph, Node
from qcompile.passes._match import is_op
from qcompile.passes._norms import find_rms_norms
from qcompile.passes._wide import narrow_of
from qcompile.passes._wide_sums import NORMS, WideSum, wide_sums
from qcompile.plan import LinearSite
from qcompile.rewrite import Exact, Promise, Report

_OPERAND_BITS = 29


@dataclass(frozen=True)
class WideUnits:
    """Sets `plan.units` and the `unit` of linear sites that end in a wide sum. The graph is not changed."""

    name: str = "wide_units"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """No rewrites."""
        plan = context.plan
        if plan is None or plan.units or not context.settings.integer_kernels:
            return Report()
        graph.infer_shapes()
        sites = {site.node: site for site in plan.linears}
        rms = {n.output.producer: reach_of(n.gamma, None) for n in find_rms_norms(graph) if n.output.producer is not None}
        for found in wide_sums(graph):
            unit = _unit(found, sites, rms)
            if unit is None:
                continue
            plan.units.update((t.name, float(unit)) for t in found.tensors)
            for node in found.sources:
                if node in sites and sites[node].result is None:
                    sites[node].unit = unit
        return Report()


def _unit(found: WideSum, sites: dict[Node, LinearSite], rms: dict[Node, float]) -> np.float32 | None:
    """The step of one sum, a power of two; None where all that is known of it are single numbers: one may be an epsilon.

    A sum of 8-bit tensors alone has none: it is one exact operator.
    """
    reach = [rms.get(node, largest(node, sites)) for node in found.sources]
    reach += [float(np.abs(c.array()).max(initial=0.0)) for c in found.constants if c.array().size > 1]  # tables, biases
    known: list[float] = [r for r in reach if r is not None and r > 0]
    if not known:
        return None
    known += [float(np.abs(c.array()).max(initial=0.0)) for c in found.constants]
    known += [r for node in found.dequantised if (r := _reach_of_bytes(node)) is not None]
    # A power of two: the steps of LayerNormalization and of tables then divide it without remainder.
    unit: np.float32 = np.float32(2.0 ** (frexp(max(known))[1] - _OPERAND_BITS))
    return unit


def _reach_of_bytes(node: Node) -> float | None:
    """255 steps of a tensor that comes from 8 bits by one stored scale; None for anything else."""
    found = narrow_of(node, node.inputs[0])
    return None if found is None else 255.0 * float(found.scale)


def largest(node: Node, sites: dict[Node, LinearSite]) -> float | None:
    """The largest magnitude that `node` can make, for any input; None where that is not known."""
    if node in sites:
        site = sites[node]
        weight, bias = node.constant(1), node.constant(2)
        if weight is None:
            return None
        sums = np.abs(weight.array()).sum(axis=tuple(a for a in range(len(weight.dims)) if a != site.axis), dtype=np.float64)
        offset = 0.0 if bias is None else np.abs(bias.array().astype(np.float64))
        return float((255.0 * float(site.source.scale) * sums + offset).max(initial=0.0))
    if is_op(node, *NORMS):
        return norm_reach(node)
    table = node.constant(0) if is_op(node, "Gather") else None
    return None if table is None else float(np.abs(table.array()).max(initial=0.0))


def norm_reach(node: Node) -> float | None:
    """sqrt(d) max |gamma| + max |beta|: no row gives more."""
    gamma, beta = node.constant(1), node.constant(2)
    if gamma is None or (node.input(2) is not None and beta is None):
        return None
    return reach_of(gamma.array(), None if beta is None else beta.array())


def reach_of(gamma: Array, beta: Array | None) -> float:
    """sqrt(d) max |gamma| + max |beta| of arrays."""
    most = sqrt(gamma.size) * float(np.abs(gamma).max(initial=0.0))
    return most + (0.0 if beta is None else float(np.abs(beta).max(initial=0.0)))
