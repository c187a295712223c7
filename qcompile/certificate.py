"""The certificate of an integer-only file: which element types it computes in, and every float tensor between its ends.

The ends are float on purpose: QuantizeLinear of a graph input on the way in; on the way out DequantizeLinear of the last
integers (or Cast and Mul by a constant), data movement, and a head kept float (Softmax, LogSoftmax, Sigmoid, ArgMax). A float
tensor that is neither is named with the node that makes it. An operator that holds integers but rescales them by a float
multiplier inside (QLinearConv ...) is named too. Types are inferred here by each operator's own schema, behind the operators of
other domains as well, where onnx's inference stops (`qcompile.wiring`); a type that cannot be told counts as float.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
from onnx import TensorProto

from qcompile.inspection_scales import read_inlined
from qcompile.wiring import CARRIES, FLOATS, Node, Wiring

EndKind: TypeAlias = Literal["quantise input", "dequantise output", "float head"]

_HEADS = frozenset({"ArgMax", "LogSoftmax", "Sigmoid", "Softmax"})
_SCALINGS = frozenset({"Cast", "DequantizeLinear", "Mul"})
_WAY_OUT = CARRIES | _HEADS | _SCALINGS
#: Why of a float tensor that no movement or conversion made.
COMPUTES = "computes in float"
_UNDEFINED = int(TensorProto.UNDEFINED)
#: Inputs that say where elements go, not what they are: sizes of Resize as ratios.
_POSITIONS = {"Resize": (1, 2), "Upsample": (1,)}


@dataclass(frozen=True)
class FloatTensor:
    """A float tensor between the ends, the node that makes it (or reads it from outside), and what it is."""

    tensor: str
    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class End:
    """A node that stands between floats outside and integers inside, or that computes the result in float."""

    kind: EndKind
    node: str
    op: str


@dataclass(frozen=True)
class Certificate:
    """operators: nodes at run time by operator, functions written out; functions: calls of model-local ones.

    element_types: tensors at run time by type (constants are not counted). floats: empty for an integer-only file.
    """

    operators: dict[str, int]
    functions: dict[str, int]
    element_types: dict[str, int]
    ends: tuple[End, ...]
    floats: tuple[FloatTensor, ...]

    @property
    def integer_only(self) -> bool:
        """Whether no float tensor lies between the ends."""
        return not self.floats

    def as_json(self) -> dict[str, Any]:
        """The report's `integer_only`."""
        return {
            "holds": self.integer_only,
            "ends": [asdict(end) for end in self.ends],
            "floats": len(self.floats),
            "element_types": self.element_types,
        }


def certify(model: onnx.ModelProto | str | Path) -> Certificate:
    """Certify a file or model. Raises ModelError where it cannot be read."""
    calls: Counter[str] = Counter()
    inlined = read_inlined(model, calls)
    wiring = Wiring.of(inlined)
    inputs = [i.name for i in inlined.graph.input if wiring.root(i.name) is None]
    return _Judge(wiring, inputs).certificate(dict(sorted(calls.items())))


class _Judge:
    def __init__(self, wiring: Wiring, inputs: list[str]) -> None:
        self.wiring = wiring
        self.inputs = inputs
        self._leaves: dict[str, bool] = {}
        for node in reversed(wiring.nodes):  # readers before makers
            for name in node.outputs:
                self._leaves[name] = self._goes_out(wiring, name)

    def certificate(self, functions: dict[str, int]) -> Certificate:
        operators: Counter[str] = Counter()
        types: Counter[str] = Counter(_type_name(self.wiring.elem_type(name)) for name in self.inputs)
        ends: list[End] = []
        floats: list[FloatTensor] = []
        for scope in self.wiring.scopes():
            for node in scope.nodes:
                if node.op == "Constant" or _constant(scope, node):
                    continue
                operators[node.op] += 1
                types.update(_type_name(scope.elem_type(name)) for name in node.outputs if name)
                end = self._end(scope, node)
                if end is not None:
                    ends.append(End(end, node.label, node.op))
                else:
                    floats += self._floats(scope, node)
        return Certificate(_sorted(operators), functions, _sorted(types), tuple(ends), tuple(floats))

    def _end(self, scope: Wiring, node: Node) -> EndKind | None:
        """Which end `node` is; None inside."""
        if scope is not self.wiring:
            return None  # the body of a loop is between the ends
        if node.op == "QuantizeLinear":
            return "quantise input" if node.inputs[0] in self.inputs else None
        if node.op not in _WAY_OUT or not all(self._leaves[name] for name in node.outputs if name):
            return None
        reads = [n for n in node.inputs if n and scope.root(n) is None]
        if not _touches_float(scope, node, reads):
            return None  # movement of integers
        if node.op in _HEADS:
            return "float head" if all(self._comes_out(scope, n) for n in reads) else None
        if node.op == "DequantizeLinear" or all(scope.elem_type(n) not in FLOATS for n in reads):
            return "dequantise output"
        if node.op == "Mul" and len(reads) > 1:
            return None  # two tensors multiplied in float
        moved = node.op in CARRIES or node.op in _SCALINGS
        return "dequantise output" if moved and all(self._comes_out(scope, n) for n in reads) else None

    def _goes_out(self, scope: Wiring, name: str) -> bool:
        """Whether `name` reaches nothing but outputs of the graph, through operators that may stand behind the integers."""
        if not name:
            return True
        readers = scope.readers.get(name, [])
        known = all(r.op in _WAY_OUT and r.outputs and all(self._leaves.get(o, False) for o in r.outputs) for r in readers)
        return known and (name in scope.outputs or bool(readers))

    def _comes_out(self, scope: Wiring, name: str) -> bool:
        """Whether the float `name` is made by an end (and so is no tensor of a graph input)."""
        maker = scope.producer(name)
        return maker is not None and self._end(scope, maker) not in (None, "quantise input")

    def _floats(self, scope: Wiring, node: Node) -> list[FloatTensor]:
        """What is float about a node between the ends: its results; a graph input or a constant that it reads."""
        found = []
        for name in (o for o in node.outputs if o):
            kind = scope.elem_type(name)
            if kind == _UNDEFINED:
                found.append(FloatTensor(name, node.label, node.op, "its type cannot be told"))
            elif kind in FLOATS:
                found.append(FloatTensor(name, node.label, node.op, _why(node)))
        if found:
            return found
        # What a node of the graph makes is named there; left are graph inputs and constants, but for scales.
        positions = (1, 2) if node.op == "QuantizeLinear" else _POSITIONS.get(node.op, ())
        given = [n for i, n in enumerate(node.inputs) if n and i not in positions and scope.elem_type(n) in FLOATS]
        outside = next((n for n in given if scope.producer(n) is None or scope.root(n) is not None), None)
        if outside is None:
            return []
        inside = node.op.startswith("QLinear") or node.op == "QGemm"
        return [FloatTensor(outside, node.label, node.op, "rescales by a float multiplier" if inside else "reads a float tensor")]


def _why(node: Node) -> str:
    if node.op == "DequantizeLinear":
        return "goes from integers to float where the graph does not end"
    return "moves a float tensor" if node.op in CARRIES else COMPUTES


def _constant(scope: Wiring, node: Node) -> bool:
    return bool(node.outputs) and all(scope.root(o) is not None for o in node.outputs if o)


def _touches_float(scope: Wiring, node: Node, reads: list[str]) -> bool:
    return any(scope.elem_type(n) in FLOATS for n in (*reads, *(o for o in node.outputs if o)))


def _type_name(elem_type: int) -> str:
    return "unknown" if elem_type == _UNDEFINED else str(TensorProto.DataType.Name(elem_type)).lower()


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
