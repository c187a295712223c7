"""4-bit weights stored as 4 bits, read at int8 speed.

    w int8, |w| <= 7    ->    w INT4 (packed, two in a byte) -> Cast to int8

onnxruntime folds the Cast when it loads the model, so that the same fused int8 kernel runs on the same integers; an INT4
DequantizeLinear in front of a Conv would not fuse and is five times slower. Runs last, for every format; needs opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompile.block_packing import int4_tensor
from qcompile.context import Context
from qcompile.graph import Const, Graph, Value
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class PackInt4:
    """Pack the weights of integer linear nodes and embedding tables; fires where 4 bits are asked for.

    Layers raised to 8 bits keep their int8 weights."""

    name: str = "pack_int4"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a weight tensor. A weight outside [-8, 7] is refused."""
        report = Report()
        if 4 not in context.settings.widths:
            return report
        wanted = _wanted(graph, context)
        for const in [c for c in graph.constants.values() if c.elem_type == TensorProto.INT8]:
            if const.name not in wanted and not (context.settings.bits == 4 and _is_table(const)):
                continue
            values = const.array()
            if values.min(initial=0) < -8 or values.max(initial=0) > 7:
                report.refuse(const.name, "a weight needs more than 4 bits")
                continue
            _pack(graph, const, values)
            report.rewrites += 1
        if report.rewrites:
            graph.cleanup()
            graph.sort()
        return report


def _wanted(graph: Graph, context: Context) -> set[str]:
    """Names of the integer weights that are to be packed."""
    if context.plan is None:  # activations quantised at run time
        weights = [n.inputs[1] for n in graph.nodes if n.op == "MatMulInteger"]
        return {w.name for w in weights if isinstance(w, Const)}
    narrow = [site for site in context.plan.linears if context.settings.bits_for(site.node.name) == 4]
    return {site.stored.name for site in narrow if site.stored is not None}


def _is_table(const: Const) -> bool:
    """Whether it is an embedding table, which only Gather reads."""
    return len(const.dims) == 2 and all(n.op == "Gather" and n.inputs[0] is const for n in const.consumers)


def _pack(graph: Graph, const: Const, values: npt.NDArray[np.int8]) -> None:
    stored = graph.constant(const.name.removesuffix("_int8") + "_int4", int4_tensor(values, signed=True))
    widened = Value(graph.fresh_name(const.name + "_widened"))
    graph.replace_uses(const, widened)
    graph.node("Cast", [stored], [widened], to=TensorProto.INT8)
