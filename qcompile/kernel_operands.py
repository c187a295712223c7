"""What integer kernels read in 8 bits: the operands of attention's products, and the input of a function done by table.

In `qdq` these tensors are float; in `qoperator` and `integer` they are quantised, and what lies between them (Softmax, residual
sums, LayerNormalization) is computed in wider integers (`passes.lower_wide`).
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from qcompile.context import Settings
from qcompile.graph import Const, Graph, Node, Value
from qcompile.levelled import levelled

#: Functions of one tensor, by ONNX operator, that a table of 256 entries computes.
TABULATED = frozenset(
    {
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Mish",
        "Reciprocal",
        "Sigmoid",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
    }
)
_HEADS = ("Sigmoid",)


def kernel_operands(graph: Graph, settings: Settings) -> Iterator[tuple[Node, int]]:
    """(node, input) of what formats with integer kernels read in 8 bits, besides the inputs of linear nodes."""
    if not settings.integer_kernels:
        return
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx") or settings.excluded(node.name):
            continue
        if node.op == "MatMul":
            yield from _product_operands(node)
        elif node.op in TABULATED and _float(node.inputs[0]):
            stays = _in_norm(node) or (settings.format == "qoperator" and is_head(graph, node))
            if not stays:
                found = levelled(graph, node)
                yield (node, 0) if found is None else (found.product, found.product.inputs.index(found.x))


def is_head(graph: Graph, node: Node) -> bool:
    """Whether `node` makes a result of the model as such, which `qoperator` leaves in float."""
    return node.op in _HEADS and graph.is_output(node.outputs[0])


def _in_norm(node: Node) -> bool:
    """Whether it is the root of a mean of squares, or its reciprocal: the kernels of norms compute those."""
    added = node.inputs[0].producer
    if node.op == "Reciprocal" and added is not None and added.op == "Sqrt":
        return _in_norm(added)
    if node.op not in ("Sqrt", "Reciprocal") or added is None or added.op != "Add":
        return False
    return any(t.producer is not None and t.producer.op == "ReduceMean" for t in added.inputs)


def _product_operands(node: Node) -> Iterator[tuple[Node, int]]:
    """Of a product of two computed tensors: both, but not the probabilities of a Softmax, which has a kernel of its own."""
    if any(isinstance(t, Const) for t in node.inputs):
        return
    for index, tensor in enumerate(node.inputs):
        producer = tensor.producer
        if _float(tensor) and not (producer is not None and producer.op == "Softmax"):
            yield node, index


def _float(tensor: Value | Const) -> bool:
    return isinstance(tensor, Value) and tensor.elem_type in (TensorProto.FLOAT, TensorProto.UNDEFINED)
