"""What lies between 8-bit tensors in float becomes integers: residual sums, LayerNormalization, attention, functions by table.

    DQ -> Gemm -> Add -> LayerNormalization -> Q      becomes     MatMulInteger * b + residual -> ILayerNorm -> u8

Node by node in topological order, each float tensor gets a *wide* form (`_wide`): int32 integers, the real value of a step, and a
bound that holds for any input. Every operator has a rule, by name; a QuantizeLinear of a wide tensor is one dyadic rescale. What
has no rule stays float, is counted with its reason, and reads its wide operands through a DequantizeLinear.

Only for formats with integer kernels. A Gemm whose result only leaves the model keeps its float end (`lower_qoperator`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.kernel_operands import TABULATED
from qcompile.kernels._functions import named
from qcompile.kernels.ilayernorm import IRmsNorm
from qcompile.passes._activations import Silu, find_silu
from qcompile.passes._match import is_op
from qcompile.passes._norms import Normalisation, find_rms_norms
from qcompile.passes._wide import Refusal, Wides
from qcompile.passes._wide_arithmetic import ARITHMETIC
from qcompile.passes._wide_attention import product, softmax
from qcompile.passes._wide_linear import gemm
from qcompile.passes._wide_norms import layer_norm, normalise
from qcompile.passes._wide_sums import NORMS
from qcompile.passes._wide_tables import by_table, tabulated
from qcompile.rewrite import Lossy, Promise, Report

_SAME_ELEMENTS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_HEADS = ("ArgMax", "LogSoftmax", "Sigmoid", "Softmax")
_FLOATS = (TensorProto.FLOAT, TensorProto.UNDEFINED)
_RULES: dict[str, Callable[[Wides, Node], None]] = {
    **ARITHMETIC,
    **dict.fromkeys(NORMS, layer_norm),
    "Gemm": gemm,
    "MatMul": product,
    "Softmax": softmax,
}


@dataclass(frozen=True)
class LowerWide:
    """Before `lower_qoperator`, on the finished Q/DQ graph."""

    name: str = "lower_wide"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a float node that became integers."""
        report = Report()
        if not context.settings.integer_kernels or context.plan is None:
            return report
        graph.infer_shapes()
        for node in list(graph.nodes):
            if is_op(node, "QuantizeLinear"):
                _raise_quantiser(graph, node)
        graph.sort()
        wides, refused = Wides(graph, context), {}
        spelled = _spelled(graph)
        for node in list(graph.nodes):
            if node not in spelled and not _candidate(graph, node, context):
                continue
            try:
                note = spelled[node](wides, node) if node in spelled else _lower(wides, node)
            except Refusal as refusal:
                refused[node] = str(refusal)
                continue
            report.rewrites += 1
            if note is not None:
                report.refuse(node.label, note)
        _shapes_of_integers(wides)
        _leave(wides)
        graph.cleanup()
        graph.sort()
        left = set(graph.nodes)
        for node, reason in refused.items():
            if node in left and reason:
                report.refuse(node.label, reason)
        return report


def _spelled(graph: Graph) -> dict[Node, Callable[[Wides, Node], str | None]]:
    """The last nodes of patterns that no operator of the graph's opset names."""
    found: dict[Node, Callable[[Wides, Node], str | None]] = {}
    for silu in find_silu(graph):
        if silu.alpha == 1.0 and silu.output.producer is not None:
            found[silu.output.producer] = partial(_silu, silu)
    for norm in find_rms_norms(graph):
        if norm.output.producer is not None:
            found[norm.output.producer] = partial(_rms_norm, norm)
    return found


def _silu(silu: Silu, wides: Wides, node: Node) -> str | None:
    return by_table(wides, node, _read_by_sigmoid(silu), named("Silu"))


def _read_by_sigmoid(silu: Silu) -> Tensor:
    """x as Sigmoid reads it: dequantised, where x itself stays float."""
    return next((step.inputs[0] for step in silu.steps if step.op == "Sigmoid"), silu.x)


def _rms_norm(norm: Normalisation, wides: Wides, node: Node) -> str | None:
    normalise(wides, norm.x, node.outputs[0], norm.gamma, norm.beta, norm.epsilon, IRmsNorm)
    return None


def _candidate(graph: Graph, node: Node, context: Context) -> bool:
    """Whether `node` computes a float tensor that is not the result of the model as such."""
    if node.domain not in ("", "ai.onnx") or node.op in ("DequantizeLinear",) or not node.outputs:
        return False
    if node.op == "QuantizeLinear":
        return True
    if node.outputs[0].elem_type not in _FLOATS or (node.op not in _RULES and node.op not in TABULATED):
        return False
    if node.op in ("Gemm", "GlobalAveragePool"):
        return not (_quantised(node) or _leaves(graph, node, context.settings.format))
    return True


def _quantised(node: Node) -> bool:
    """Whether 8 bits come out of it: a kernel does that."""
    return [n.op for n in node.outputs[0].consumers] == ["QuantizeLinear"]


def _leaves(graph: Graph, node: Node, form: str) -> bool:
    """Whether the result only leaves the model, through data movement and a head at most: it stays a float end.

    In format integer a Softmax is no such head: it is computed in integers.
    """
    for output in node.outputs:
        if not output.consumers and not graph.is_output(output):
            return False
        for reader in output.consumers:
            ends = is_op(reader, *_SAME_ELEMENTS, *(h for h in _HEADS if h != "Softmax" or form != "integer"))
            if not (ends and _leaves(graph, reader, form)):
                return False
    return True


def _lower(wides: Wides, node: Node) -> str | None:
    if node.op == "QuantizeLinear":
        return _quantise(wides, node)
    if node.op in TABULATED:
        return tabulated(wides, node)
    _RULES[node.op](wides, node)
    return None


def _quantise(wides: Wides, node: Node) -> str | None:
    source = node.inputs[0]
    wide, factors = wides.scaled.get(source, (wides.of.get(source), None))
    if wide is None:
        raise Refusal("")  # the ends of the model, and what is dequantised only to be quantised again
    wides.quantise(wide, node, factors)
    return None


def _raise_quantiser(graph: Graph, node: Node) -> None:
    """Quantise before data is moved: bytes are moved then, and the same ones."""
    source = node.inputs[0]
    while True:
        mover = source.producer
        if mover is None or not is_op(mover, *_SAME_ELEMENTS) or len(source.consumers) > 1 or graph.is_pinned(source):
            return
        before = mover.inputs[0]
        if not isinstance(before, Value) or before.producer is None or before.elem_type not in _FLOATS:
            return
        result, integers = node.outputs[0], Value(graph.fresh_name(before.name + "_quantized"))
        node.inputs[0], mover.inputs[0] = before, integers
        node.outputs[0], mover.outputs[0] = integers, result
        source = before


def _shapes_of_integers(wides: Wides) -> None:
    """Let Shape read integers where they have the shape of the float tensor that it asked."""
    for node in wides.graph.nodes:
        if not is_op(node, "Shape", "Size"):
            continue
        source = node.inputs[0]
        producer = source.producer
        if source in wides.of:
            node.inputs[0] = wides.of[source].integers
        elif producer is not None and producer.op == "DequantizeLinear":
            node.inputs[0] = producer.inputs[0]
        else:
            quantised = [n.outputs[0] for n in source.consumers if is_op(n, "QuantizeLinear")]
            if quantised:
                node.inputs[0] = quantised[0]


def _leave(wides: Wides) -> None:
    """Wide tensors that a float node or the model's end reads go back to float under their own names."""
    graph = wides.graph
    gone: set[Tensor] = set()
    for tensor, wide in wides.of.items():
        assert isinstance(tensor, Value)
        if tensor in gone or tensor.producer is None:
            continue
        readers = [n for n in tensor.consumers if not all(o in wides.of or o in wides.exponentials for o in n.outputs)]
        if readers or graph.is_pinned(tensor):
            producer = tensor.producer
            graph.remove(producer)
            wides.dequantise(wide, tensor)
            gone.add(tensor)
