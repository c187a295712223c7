"""Put the Q/DQ pairs of an imported model back, at its own scales: see `qcompile.passes._import_place` for where.

    y = Clip(x), which stands for a pair    becomes    Q(x) -> DQ -> y, or the integer kernel that computes x writes Q's integers

What `quantise` takes from calibration comes from the source here: range, scale and zero point of every tensor, in the integer
type of the target. Tensors that share a scale take the source's where they agree, else a range that holds all of theirs.
Bounds of a folded Relu/Clip, of a Clip on integers, or of the source's own range that the common one does not carry become a
Clip on integers.

onnxruntime fuses a dozen operators that stand between DequantizeLinear and QuantizeLinear, in kernels that do not round alike
everywhere. A Sum of one keeps those apart that no exact kernel computes: they are computed in float, as they are spelt.

Raises ModelError where no Conv and no Gemm is left to run on integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from qcompile.context import Context
from qcompile.errors import ModelError
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.imported import Mark
from qcompile.passes._import_place import ImportedPlacement, is_product, place_imported
from qcompile.passes.quantise import Inserter
from qcompile.plan import ProductSite, ScaleClass
from qcompile.rewrite import Lossy, Promise, Report

_INEXACT = "products of two activations computed in float: their scale is tied to a sum"
_FUSED = {"Add", "AveragePool", "Concat", "LeakyRelu", "MatMul", "Mul", "ReduceMean", "Sigmoid", "Softmax", "Where"}


@dataclass(frozen=True)
class QuantiseImported:
    """Q/DQ insertion from `context.imported`."""

    name: str = "quantise_imported"
    keeps: Promise = field(default_factory=lambda: Lossy(-30.0))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a Q/DQ pair. Sets `context.plan` and `context.float_graph`."""
        report, imported = Report(), context.imported
        if imported is None or context.plan is not None:
            return report
        graph.infer_shapes()
        context.float_graph = graph.copy()
        found = place_imported(graph, context.settings, imported)
        for node, reason in found.placement.refused:
            report.refuse(node.label, reason)
        if not found.placement.linears:
            reasons = "; ".join(sorted(report.skipped)) or "there is no Conv or Gemm/MatMul with constant weights"
            raise ModelError(f"nothing of its Q/DQ can be imported: {reasons}")
        inserter = _Inserter(graph, context, found)
        report.rewrites = inserter.run()
        context.plan = inserter.plan
        if inserter.inexact:
            imported.changed[_INEXACT] += inserter.inexact
        for site in inserter.plan.linears:
            site.output = found.original.get(site.output, site.output)
        imported.classes = inserter.sources
        return report


class _Inserter(Inserter):
    def __init__(self, graph: Graph, context: Context, found: ImportedPlacement) -> None:
        super().__init__(graph, context, found.placement)
        self.marks = found.marks
        self.standing = found.standing
        self.sources: list[tuple[ScaleClass, Mark]] = []
        self.inexact = 0

    def _operands(self) -> Iterable[tuple[Node, int]]:
        """None: integers stand where the source has pairs."""
        return ()

    def _fold(self) -> None:
        super()._fold()
        for tensor, mark in self.marks.items():
            if mark.narrowed:
                low, high = self.bounds.get(tensor, mark.bounds)
                self.bounds[tensor] = max(low, mark.bounds[0]), min(high, mark.bounds[1])

    def _choose(self, place_: ScaleClass, members: list[Tensor]) -> None:
        marks = [self.marks[t] for t in members if t in self.marks]
        spans = [m.span for m in marks]
        place_.low, place_.high = min(s[0] for s in spans), max(s[1] for s in spans)
        self.sources.append((place_, max(marks, key=lambda m: float(m.scale))))
        place_.floor = place_.low  # what the range cuts off by itself
        tops = [self.bounds.get(t, (0.0, float("inf")))[1] for t in members if t in self.marks]
        step = (place_.high - place_.low) / 255
        if max(tops) < float("inf") and place_.high <= max(tops) + step / 2:
            place_.ceiling = max(tops)
        for tensor in (
            t for t in members if t in self.marks
        ):  # a narrower range saturates earlier, at 0 where a Relu was left out
            low, high = self.bounds.get(tensor, (-inf, inf))
            least, most = self.marks[tensor].bounds
            low = max(low, least) if least > place_.low + step / 2 else low
            high = min(high, most) if most < place_.high - step / 2 else high
            if (low, high) != (-inf, inf):
                self.bounds[tensor] = low, high

    def _leave(self, node: Node) -> None:
        if node not in self.standing:
            super()._leave(node)
            return
        output = node.outputs[0]
        place_, source = self.class_of[output], node.inputs[0]
        self.graph.remove(node)
        self._produced(output, self._clamped(self._q(source, place_, output.name), output, place_))

    def _shield(self) -> None:
        super()._shield()
        self._products()
        plan = self.plan
        exact = {s.node for s in plan.linears} | {s.node for s in plan.adds}
        exact |= {s.node for s in plan.pools} | {s.node for s in plan.products}
        for node in list(self.graph.nodes):
            if node in exact or node.op not in _FUSED or not node.outputs:
                continue
            output = node.outputs[0]
            dequantised = any(t.producer is not None and t.producer.op == "DequantizeLinear" for t in node.inputs)
            if dequantised and any(n.op == "QuantizeLinear" for n in output.consumers):
                node.outputs[0] = Value(self.graph.fresh_name(output.name + "_unshielded"), output.type)
                self.graph.node("Sum", [node.outputs[0]], [output])

    def _products(self) -> None:
        """Products whose result has a scale of its own: one product, and no Add or pool that would decide it too."""
        tied = {place for add in self.plan.adds for place in (add.left, add.right, add.result)}
        tied |= {place for pool in self.plan.pools for place in (pool.source, pool.result)}
        for node in self.graph.nodes:
            if node not in self.placement.integer or not is_product(node):
                continue
            quantise = next(n for n in node.outputs[0].consumers if n.op == "QuantizeLinear")
            result = next(c for c in self.plan.classes if c.scale_const is quantise.inputs[1])
            left, right = (self._class_read(t) for t in node.inputs)
            if result in tied or result in (left, right):
                self.inexact += 1
                continue
            tied.add(result)
            self.plan.products.append(ProductSite(node, left, right, result))
