"""Where an imported model is quantised: at its own Q/DQ pairs, and nowhere else.

`import_qdq` left a Clip for each pair, here called its marker. In topological order each marker becomes one of these:

1. its tensor comes out of an integer kernel (a Conv or Gemm with weights of the source, an Add of two quantised tensors, a
   GlobalAveragePool of one, a MatMul or Mul of two; Relu and Clip between fold into the range): the kernel writes these integers,
   the marker goes. An Add with an operand more than 15 times as coarse as the sum (a mask) stays float;
2. its tensor is moved integers already (MaxPool, Reshape ... of a quantised tensor): it keeps the scale that they have, so that
   nothing is rescaled; where the marker cuts off part of that range, its Clip stays and works on the integers;
3. data movement between a kernel and the marker is done on the marker's integers;
4. anything else stays float, and a QuantizeLinear takes the marker's place.

A tensor that is also read without Q/DQ is written in integers for all its readers, unless the pair cuts the negative part off,
which then was a Relu of one branch: there the kernel stays float.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Settings
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.imported import Imported, Mark
from qcompile.placement import Placement, clip_bounds, data_inputs, linear_refusal, pool_area, shares_scale
from qcompile.solver import LARGEST_RATIO

_SHARED_READERS = "tensors that float operators now read after rounding"
_ONE_SCALE = "scales given up where data only moves"


@dataclass
class ImportedPlacement:
    """placement: as `qcompile.placement` gives it. marks: tensor -> its scale. standing: markers that become Q and DQ.

    original: name of a tensor that lost its marker -> the marker's output before, the float tensor that its integers stand for.
    """

    placement: Placement = field(default_factory=Placement)
    marks: dict[Tensor, Mark] = field(default_factory=dict)
    standing: dict[Node, Mark] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)


def place_imported(graph: Graph, settings: Settings, imported: Imported) -> ImportedPlacement:
    """Decide for every marker and every linear node. Markers of cases 1 and 3 are taken out of `graph`; shapes must be known."""
    return _Placer(graph, settings, imported).run()


class _Placer:
    def __init__(self, graph: Graph, settings: Settings, imported: Imported) -> None:
        self.graph = graph
        self.settings = settings
        self.imported = imported
        self.result = ImportedPlacement()
        self.refusals: dict[Node, str] = {}

    def run(self) -> ImportedPlacement:
        graph, placement = self.graph, self.result.placement
        graph.sort()
        for node in list(graph.nodes):
            mark = self.imported.marks.get(node.name)
            if mark is not None and node.op == "Clip":
                self._place(node, mark)
        for node in graph.nodes:
            if node.op == "Gemm" and node not in placement.linears and self._why_float(node) is None:
                placement.linears.append(node)
        order = {node: index for index, node in enumerate(graph.nodes)}
        placement.linears.sort(key=order.__getitem__)
        linears = set(placement.linears)
        for node in graph.nodes:
            reason = "" if node in linears or node in placement.integer else self._why_float(node)
            if reason is None:
                reason = "its output is not quantised in the source, or is read without that too"
            if reason:
                placement.refused.append((node, reason))
        return self.result

    # ---- markers ----
    def _place(self, marker: Node, mark: Mark) -> None:
        source = marker.inputs[0]
        assert isinstance(source, Value)
        if self._known(source):
            self._again(marker, source, mark)
        elif self._may_share(marker, source, mark) and self._computes(source, mark):
            self._commit(source, mark)
            self._merge(marker, source)
        else:
            self.result.standing[marker] = mark
            self._quantised(marker.outputs[0], mark)

    def _quantised(self, tensor: Tensor, mark: Mark | None) -> None:
        self.result.placement.quantised.add(tensor)
        if mark is not None:
            self.result.marks[tensor] = mark

    def _merge(self, marker: Node, source: Value) -> None:
        """Take `marker` out; where its output is an output of the graph, that name wins and stands for `source`."""
        output = marker.outputs[0]
        self.result.original.setdefault(source.name, output.name)
        self.graph.bypass(marker, source)
        if output.producer is not None and output.producer.op != "Identity":
            mark = self.result.marks.pop(source, None)
            self.result.placement.quantised.discard(source)
            self._quantised(output, mark)

    def _again(self, marker: Node, source: Value, mark: Mark) -> None:
        """A second pair on integers that have a scale: only what it cuts off is kept."""
        present = self._mark_of(source)
        low, high = mark.bounds
        step = float(present.scale)
        if (present.scale, present.zero) != (mark.scale, mark.zero):
            self.imported.changed[_ONE_SCALE] += 1
        if present.bounds[0] < low - step / 2 or present.bounds[1] > high + step / 2:
            self.result.placement.integer.add(marker)  # a Clip on integers
            self._quantised(marker.outputs[0], None)
        else:
            self._merge(marker, source)

    def _mark_of(self, tensor: Tensor) -> Mark:
        """The scale of a known tensor: its own, or that of the data it is moved from (the widest of several)."""
        if tensor in self.result.marks:
            return self.result.marks[tensor]
        node = tensor.producer
        assert node is not None
        return max((self._mark_of(t) for t in data_inputs(node)), key=lambda m: float(m.scale))

    def _may_share(self, marker: Node, source: Value, mark: Mark) -> bool:
        """Whether every reader of `source` may read what the pair makes of it."""
        others = [n for n in source.consumers if n is not marker and self.imported.marks.get(n.name) != mark]
        if self.graph.is_pinned(source):
            return False
        if not others:
            return True
        floats = [n for n in others if n.name not in self.imported.marks]
        if mark.low < mark.zero or _never_negative(source):
            if floats:
                self.imported.changed[_SHARED_READERS] += 1
            return True
        return False

    # ---- what is computed in integers ----
    def _known(self, tensor: Tensor) -> bool:
        """Whether `tensor` is integers, or can be by moving integers; marks the nodes that move them."""
        path: list[Node] = []
        if not self._reaches(tensor, path):
            return False
        for node in path:
            self.result.placement.integer.add(node)
            for output in node.outputs:
                if output.name:
                    self._quantised(output, None)
        return True

    def _reaches(self, tensor: Tensor, path: list[Node]) -> bool:
        if tensor in self.result.placement.quantised:
            return True
        node = tensor.producer
        if node is None or self.settings.excluded(node.name):
            return False
        if not shares_scale(node) and (clip_bounds(node) is None or node.name in self.imported.marks):
            return False
        inputs = data_inputs(node)
        if node.op == "Concat" and any(_pooled(t) for t in inputs):
            return False
        path.append(node)
        return all(isinstance(t, Value) and self._reaches(t, path) for t in inputs)

    def _computes(self, tensor: Tensor, mark: Mark) -> bool:
        """Whether an integer kernel can write `tensor`, through folded Relu/Clip and data movement or directly (cases 1, 3)."""
        node = tensor.producer
        if node is None or self.settings.excluded(node.name) or node.name in self.imported.marks:
            return False
        if clip_bounds(node) is not None or shares_scale(node):
            if len(node.outputs) > 1:
                return False
            inputs = data_inputs(node)
            alone = all(len(t.consumers) == 1 and not self.graph.is_pinned(t) for t in inputs)
            return alone and all(self._computes(t, mark) or (node.op != "Concat" and self._known(t)) for t in inputs)
        if node.op == "Add":
            known = all(isinstance(t, Value) and not _pooled(t) and self._known(t) for t in node.inputs)
            return known and all(float(self._mark_of(t).scale) <= LARGEST_RATIO * float(mark.scale) for t in node.inputs)
        if node.op == "GlobalAveragePool":
            return pool_area(node) is not None and self._known(node.inputs[0])
        if is_product(node):
            return all(self._known(t) for t in node.inputs)
        return node.op in ("Conv", "Gemm") and self._why_float(node) is None

    def _commit(self, tensor: Tensor, mark: Mark) -> None:
        """Carry out what `_computes` found possible."""
        node = tensor.producer
        assert node is not None
        placement = self.result.placement
        self._quantised(tensor, mark)
        if clip_bounds(node) is not None:
            base = node
            while clip_bounds(base) is not None:
                before = base.inputs[0].producer
                assert before is not None
                base = before
            if base.op in ("Conv", "Gemm", "Add"):
                while node is not base:
                    placement.folded.add(node)
                    before = node.inputs[0].producer
                    assert before is not None
                    node = before
        if node.op in ("Conv", "Gemm"):
            if node not in placement.linears:
                placement.linears.append(node)
            return
        placement.integer.add(node)
        if shares_scale(node) or clip_bounds(node) is not None:
            for source in data_inputs(node):
                if source not in placement.quantised:
                    self._commit(source, mark)

    def _why_float(self, node: Node) -> str | None:
        """None where `node` can run on integers with the source's weights; "" where it is no linear node; else why not."""
        reason = linear_refusal(node, self.settings)
        if reason is not None:
            return reason
        if node.name in self.imported.unusable:
            return self.imported.unusable[node.name]
        if node.name in self.imported.float_weights:
            return "its weights are float in the source"
        return None if self._known(node.inputs[0]) else "its input is not quantised in the source"


def is_product(node: Node) -> bool:
    """Whether `node` is a MatMul or Mul of two activations."""
    return node.op in ("MatMul", "Mul") and node.domain in ("", "ai.onnx") and all(isinstance(t, Value) for t in node.inputs)


def _never_negative(tensor: Tensor) -> bool:
    node = tensor.producer
    bounds = None if node is None else clip_bounds(node)
    return bounds is not None and bounds[0] >= 0


def _pooled(tensor: Tensor) -> bool:
    """Whether a GlobalAveragePool computes it: its scale follows from the pool's input; no Add or Concat may ask for another."""
    node = tensor.producer
    while node is not None and (shares_scale(node) or clip_bounds(node) is not None):
        node = data_inputs(node)[0].producer
    return node is not None and node.op == "GlobalAveragePool"
