"""Fusion audit: which nodes of a quantised file onnxruntime really runs on integers, and why the others do not.

The file is loaded once at the highest optimisation level and the graph that onnxruntime then runs is read back. In it a
fused node has lost its Q/DQ and often its name; a node that did not fuse stands there in float behind a DequantizeLinear
that is computed at every run. So the search starts from the optimised graph and goes back to the file only for names
and for weights that were folded to float.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
from onnx import TensorProto

from qcompile.audit_reasons import weight_index, why_between, why_float
from qcompile.errors import ModelError
from qcompile.runtime import Optimisation, Session
from qcompile.wiring import BYTES, FLOATS, MOVES, WIDE, Node, Root, Wiring, bits

_BOUNDARY = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Constant"})
#: Integer kernels with a weight, and which input it is.
_KERNEL_WEIGHT = {
    "ConvInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulInteger": 1, "MatMulInteger16": 1,
    "MatMulIntegerToFloat": 1, "MatMulNBits": 1, "QAttention": 1, "QGemm": 3, "QLinearConv": 3, "QLinearMatMul": 3,
}  # fmt: skip
_FLOAT_WEIGHTED = frozenset(
    [
        "Attention",
        "Conv",
        "ConvTranspose",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulNBits",
        "NhwcFusedConv",
    ]
)
_INTEGERS = BYTES | WIDE | {TensorProto.INT32, TensorProto.UINT32}
#: What onnxruntime adds to the name of a node that it rewrites.
_DECORATION = re.compile(r"^fused |/MatMulAddFusion$|_token_\d+$")


@dataclass(frozen=True)
class Left:
    """One node left behind: its name (its first output's where it has none), its operator type and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """What onnxruntime runs after its optimisation.

    `integer_ops`, `float_ops`: {operator type: nodes that compute on integers, in float}; operators that only move data,
    quantise, dequantise or cast are in neither. MatMulNBits and GatherBlockQuantized count as integer: they read integers,
    and what they widen or round inside is their own business.
    `not_fused`: Conv, Gemm and MatMul meant to be integer (their second operand is stored in 2 to 16 bits or comes from a
    DequantizeLinear) that run in float, named as in the file.
    `leftover`: QuantizeLinear and DequantizeLinear at run time that stand neither at an end of the graph nor beside an
    operator that the file itself keeps in float; named as in the optimised graph.
    `integer_weight_bytes`, `float_weight_bytes`: constant weights of Conv, Gemm and MatMul as their kernels read them (an
    int8 weight behind a DequantizeLinear that did not fuse is read as float); a shared weight counts once.
    """

    integer_ops: dict[str, int]
    float_ops: dict[str, int]
    not_fused: list[Left]
    leftover: list[Left]
    integer_weight_bytes: int
    float_weight_bytes: int


def audit(model: str | Path | onnx.ModelProto) -> Audit:
    """Audit a path (external data beside it, any size) or a ModelProto under 2 GiB.

    Raises ModelError where the file cannot be read or onnxruntime refuses it.
    """
    if isinstance(model, onnx.ModelProto):
        label, source = "model", model
    else:
        label, source = str(model), _read(Path(model))
    with tempfile.TemporaryDirectory(prefix="qcompile-audit-") as folder:
        path = Path(folder) / "optimised.onnx"
        Session(model, optimisation=Optimisation.ALL, threads=1, label=label, optimised_path=path)
        optimised = _read(path)
    return audit_optimised(source, optimised)


def audit_optimised(source: onnx.ModelProto, optimised: onnx.ModelProto) -> Audit:
    """Audit the graph `optimised` that onnxruntime made of `source`. The weights' data need not be loaded."""
    if source.functions:
        source = onnx.inliner.inline_local_functions(source)
    names = _FileNames(Wiring.of(source))
    found = [_Scope(wiring, names) for wiring in Wiring.of(optimised).scopes()]
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    stored: dict[tuple[str, bool], int] = {}
    for scope in found:
        for node in scope.wiring.nodes:
            kind = _kind(scope.wiring, node)
            if kind is not None:
                (integer if kind else floating)[node.op] += 1
        stored.update(_weights(scope.wiring))
    return Audit(
        integer_ops=dict(sorted(integer.items())),
        float_ops=dict(sorted(floating.items())),
        not_fused=[left for scope in found for left in scope.not_fused.values()],
        leftover=[left for scope in found for left in scope.leftover()],
        integer_weight_bytes=sum(size for (_, is_integer), size in stored.items() if is_integer),
        float_weight_bytes=sum(size for (_, is_integer), size in stored.items() if not is_integer),
    )


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and OSError have no nearer common base
        raise ModelError(f"{path}: cannot be read as an ONNX model: {' '.join(str(error).split())}") from error


def _is_kernel(node: Node) -> bool:
    """Whether `node` is an operator of its own for quantised tensors (as against Add on int32, which is told by type)."""
    # NhwcMaxPool exists for 8-bit tensors only, and carries no type that shape inference knows.
    return (
        node.op in _KERNEL_WEIGHT
        or node.op.startswith(("QLinear", "QOrdered"))
        or node.op in ("DynamicQuantizeLSTM", "GatherBlockQuantized", "NhwcMaxPool")
    )


def _kind(wiring: Wiring, node: Node) -> bool | None:
    """True: computes on integers. False: in float. None: moves or converts data, handles shapes, is folded."""
    if _is_kernel(node):
        return True
    if node.op in MOVES or node.op in _BOUNDARY or all(wiring.root(o) is not None for o in node.outputs if o):
        return None
    if any(wiring.is_float(name) for name in (*node.inputs, *node.outputs)):
        return False
    return True if any(wiring.elem_type(name) in _INTEGERS for name in node.outputs if name) else None


def _weights(wiring: Wiring) -> Iterator[tuple[tuple[str, bool], int]]:
    """((stored weight, whether an integer kernel reads it), bytes as read) of every weighted node."""
    for node in wiring.nodes:
        if node.op in _FLOAT_WEIGHTED:
            name = node.inputs[weight_index(wiring, node)]
        elif node.op in _KERNEL_WEIGHT:
            name = node.inputs[_KERNEL_WEIGHT[node.op]]
        else:
            continue
        root = wiring.root(name)
        if root is not None:
            elem_type = wiring.elem_type(name)
            yield (root.name, elem_type not in FLOATS), root.elements * bits(elem_type) // 8


def _did_not_fuse(left: Left) -> str:
    return f"{left.op} {left.node} did not fuse: {left.reason}"


class _FileNames:
    """The file's weighted nodes and stored weights, found again from what survives in the optimised graph."""

    def __init__(self, main: Wiring) -> None:
        self._scopes = list(main.scopes())
        self._weighted: dict[str, tuple[Wiring, Node]] = {}
        by_root: dict[str, list[tuple[Wiring, Node]]] = {}
        for wiring in self._scopes:
            for node in wiring.nodes:
                if node.op not in _FLOAT_WEIGHTED:
                    continue
                found = (wiring, node)
                self._weighted.update(dict.fromkeys((k for k in (node.proto.name, *node.outputs) if k), found))
                root = wiring.root(node.inputs[weight_index(wiring, node)])
                if root is not None:
                    by_root.setdefault(root.name, []).append(found)
        self._by_root = {name: found[0] for name, found in by_root.items() if len(found) == 1}

    def node(self, optimised: Node, root: Root | None) -> tuple[Wiring, Node] | None:
        """The file's node that became `optimised`: by its name, its output, or its weight where one node has it."""
        keys = (optimised.proto.name, _DECORATION.sub("", optimised.proto.name), *optimised.outputs)
        for key in keys:
            if key in self._weighted:
                return self._weighted[key]
        return None if root is None else self._by_root.get(root.name)

    def stored(self, root: Root, match: tuple[Wiring, Node] | None) -> Root:
        """What the file stores where the optimised graph has `root`: the integers that were folded to float, or itself."""
        for wiring in self._scopes:
            if root.name in wiring.producers:
                return wiring.root(root.name) or root
        if match is None or any(root.name in wiring.roots for wiring in self._scopes):
            return root
        wiring, node = match
        return wiring.root(node.inputs[weight_index(wiring, node)]) or root


class _Scope:
    """Findings in one graph (the main one or a subgraph) of the optimised model."""

    def __init__(self, wiring: Wiring, names: _FileNames) -> None:
        self.wiring = wiring
        self.not_fused: dict[Node, Left] = {}
        for node in wiring.nodes:
            # A MatMulNBits made of a MatMul between Q/DQ has dropped the file's quantised input for a rounding of its own.
            if node.op in _FLOAT_WEIGHTED and not (_is_kernel(node) and not self._from_dequantize(node.inputs[0])):
                left = self._judge(node, names)
                if left is not None:
                    self.not_fused[node] = left

    def _judge(self, node: Node, names: _FileNames) -> Left | None:
        """What to say of a weighted node in float; None where the file meant it to be so."""
        weight = node.inputs[weight_index(self.wiring, node)]
        root = self.wiring.root(weight)
        match = names.node(node, root)
        if root is not None:
            root = names.stored(root, match)
        before = self.wiring.behind_moves(weight)
        if root is None and (before is None or before.op != "DequantizeLinear"):
            return None
        if root is not None and not root.is_integer:
            return None
        if node.op == "MatMulNBits" and match is not None and match[1].op == "MatMulNBits":
            return None
        written = node if match is None else match[1]
        return Left(written.label, written.op, why_float(self.wiring, node, root, written.op))

    def leftover(self) -> Iterator[Left]:
        """Q/DQ that stand between integers, with the reason of what stands beside them."""
        enclosed = dict(self._enclosed())
        for node in self.wiring.nodes:
            beside: list[Node | None] = []
            if node.op == "QuantizeLinear":
                beside = [self.wiring.producer(node.inputs[0])]
            elif node.op == "DequantizeLinear":
                read = node.outputs[0]
                beside = [*self.wiring.readers.get(read, []), *self.wiring.ahead_of_moves(read)]
            reason = next(filter(None, (self._beside(other, enclosed) for other in beside if other)), None)
            if reason is not None:
                yield Left(node.label, node.op, reason)

    def _beside(self, node: Node, enclosed: dict[Node, str]) -> str | None:
        """Why a Q or DQ next to `node` is still there; None where `node` was meant to be float, or is an end."""
        if node in self.not_fused:
            return _did_not_fuse(self.not_fused[node])
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            return "a rescale from one scale to another with no operator to carry it"
        if _is_kernel(node):
            return f"{node.op} {node.label} takes or gives floats here and converts them itself"
        return enclosed.get(node)

    def _enclosed(self) -> Iterator[tuple[Node, str]]:
        """(node, reason) of each float operator in a group that only reads DequantizeLinear and only feeds QuantizeLinear.

        The file breaks the chain of integers there and takes it up again, so integers were meant. A group that touches a
        graph input or output, or a tensor that stays float, was meant to be float.
        """
        members = {
            node: None
            for node in self.wiring.nodes
            if node.op not in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
            and not _is_kernel(node)
            and any(self.wiring.is_float(name) for name in (*node.inputs, *node.outputs))
        }
        seen: set[Node] = set()
        for start in members:
            if start in seen:
                continue
            group, waiting = [start], [start]
            seen.add(start)
            while waiting:
                beside = [n for n in self._neighbours(waiting.pop()) if n in members and n not in seen]
                beside = list(dict.fromkeys(beside))
                seen.update(beside)
                group += beside
                waiting += beside
            if self._is_enclosed(group):
                inside = next((left for n in group if (left := self.not_fused.get(n))), None)
                reason = why_between(self.wiring, group) if inside is None else _did_not_fuse(inside)
                yield from ((node, reason) for node in group)

    def _neighbours(self, node: Node) -> list[Node]:
        made = [self.wiring.producers.get(name) for name in node.inputs if self.wiring.is_float(name)]
        read = [r for name in node.outputs if self.wiring.is_float(name) for r in self.wiring.readers.get(name, [])]
        return [n for n in (*made, *read) if n is not None]

    def _from_dequantize(self, name: str) -> bool:
        before = self.wiring.producer(name)
        return before is not None and before.op == "DequantizeLinear"

    def _is_enclosed(self, group: list[Node]) -> bool:
        inside = set(group)
        quantised = False
        for node in group:
            if not any(self.wiring.is_float(name) or self._from_dequantize(name) for name in node.inputs):
                return False  # floats begin here: a Cast of integers, a table of floats that is looked up
            for name in filter(self.wiring.is_float, node.inputs):
                producer = self.wiring.producers.get(name)
                if producer is None:
                    return False
                if producer not in inside and producer.op != "DequantizeLinear" and not _is_kernel(producer):
                    return False
            for name in filter(self.wiring.is_float, node.outputs):
                outside = [r for r in self.wiring.readers.get(name, []) if r not in inside]
                if name in self.wiring.outputs or any(r.op != "QuantizeLinear" for r in outside):
                    return False
                quantised = quantised or bool(outside)
        return quantised
