"""What `load_model` refuses, each check with the evidence and the node or tensor in its message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from qcompile.convert import label_of, peek
from qcompile.errors import ModelError
from qcompile.graph import Const, Graph, Node
from qcompile.graph_parts import Array, node_bodies

_DEFAULT_DOMAIN = ("", "ai.onnx")
_TRAINING_DOMAINS = ("ai.onnx.training", "ai.onnx.preview.training")
_QUANTISED = {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear"}
_QUANTISED_MICROSOFT = {
    "ConvTransposeInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16",
    "MatMulIntegerToFloat", "MatMulNBits", "GatherBlockQuantized", "QMoE", "MulInteger", "ReduceSumInteger",
}  # fmt: skip
# Operators whose constant inputs are weights: a NaN or an infinity there is a broken export. Constants of other operators
# (Where, Add, Clip ... ) may be infinite on purpose, as attention masks and limits are.
_WEIGHTED = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization", "InstanceNormalization",
    "GroupNormalization", "RMSNormalization", "LSTM", "GRU", "RNN", "DeformConv", "FusedConv", "FusedMatMul", "FusedGemm",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "EmbedLayerNormalization",
    "Attention", "MultiHeadAttention", "PRelu", "Gather",
}  # fmt: skip
_MOVES = {"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "DequantizeLinear"}


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of the graph and of all bodies inside it."""
    for node in graph.node:
        yield node
        for body in node_bodies(node.attribute):
            yield from all_nodes(body)


def domains(graph: GraphProto) -> set[str]:
    """Operator domains in use; the default one is ''."""
    return {"" if n.domain == "ai.onnx" else n.domain for n in all_nodes(graph)}


def foreign_node(model: ModelProto) -> str | None:
    """The first node outside ONNX's own domain; None where there is none."""
    return next((label_of(n) for n in all_nodes(model.graph) if n.domain not in _DEFAULT_DOMAIN), None)


def holds_qdq(model: ModelProto) -> bool:
    """Whether `model` is a Q/DQ model, to be imported. Raises ModelError where it computes with quantised numbers otherwise.

    The error counts the operators that say so. A file that quantises weights alone holds no QuantizeLinear, and is no Q/DQ model.
    """
    constants = {t.name for t in model.graph.initializer} | {s.values.name for s in model.graph.sparse_initializer}
    evidence: Counter[str] = Counter()
    for node in all_nodes(model.graph):
        carried = ("Constant", "Cast", "Transpose", "Reshape", "Identity")
        if node.op_type in carried and all(i in constants for i in node.input):
            constants.update(node.output)
        if node.op_type == "Gather" and node.input[0] in constants:
            constants.update(node.output)  # rows of a table of integers
        if _is_quantised(node) or (node.op_type == "DequantizeLinear" and node.input[0] in constants):
            evidence[node.op_type] += 1
    bodies = (body for node in model.graph.node for body in node_bodies(node.attribute))
    inside = next((n for body in bodies for n in all_nodes(body) if n.op_type == "QuantizeLinear"), None)
    if inside is not None:
        raise ModelError(f"node '{label_of(inside)}': QuantizeLinear in a body of If, Loop or Scan is not imported")
    pairs = any(n.op_type == "QuantizeLinear" for n in model.graph.node)
    others = sorted(op for op in evidence if not pairs or op not in ("QuantizeLinear", "DequantizeLinear"))
    if others:
        found = ", ".join(f"{evidence[op]} {op}" for op in others)
        raise ModelError(
            f"already quantised: {found}; only activations and weights in Q/DQ pairs are imported: "
            "give the float model that it was made from"
        )
    return pairs


def _is_quantised(node: NodeProto) -> bool:
    if node.domain in _DEFAULT_DOMAIN:
        return node.op_type in _QUANTISED or node.op_type.startswith("QLinear")
    if node.domain != "com.microsoft":
        return False
    quick = {"QuickGelu"}
    q_name = len(node.op_type) > 1 and node.op_type[0] == "Q" and node.op_type[1].isupper()
    return node.op_type not in quick and (q_name or node.op_type in _QUANTISED_MICROSOFT | _QUANTISED)


def refuse_training(model: ModelProto) -> None:
    """Raise ModelError where a node only makes sense while training."""
    true = {t.name for t in model.graph.initializer if t.data_type == TensorProto.BOOL and numpy_helper.to_array(t).any()}
    for node in all_nodes(model.graph):
        training = node.domain in _TRAINING_DOMAINS or (node.domain == "com.microsoft" and node.op_type.endswith("Grad"))
        if node.domain in _DEFAULT_DOMAIN:
            training |= node.op_type == "BatchNormalization" and bool(peek(node, "training_mode", 0))
            training |= node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in true
            if node.op_type == "Constant" and node.attribute and node.attribute[0].type == AttributeProto.TENSOR:
                value = node.attribute[0].t
                if value.data_type == TensorProto.BOOL and numpy_helper.to_array(value).any():
                    true.add(node.output[0])
        if training:
            raise ModelError(
                f"node '{label_of(node)}': {node.op_type} in training form; export the model for inference (eval mode)"
            )


def refuse_bad_weights(graph: Graph) -> None:
    """Raise ModelError naming the constant where a weight holds NaN or infinity. Reads one constant at a time."""
    checked: set[object] = set()
    work = [n for n in graph.nodes if n.op in _WEIGHTED]
    while work:
        node = work.pop()
        for tensor in node.inputs[:1] if node.op == "Gather" or node.op in _MOVES else node.inputs:
            if not tensor.name or tensor in checked:
                continue
            checked.add(tensor)
            producer = tensor.producer
            if isinstance(tensor, Const):
                _require_finite(tensor.name, tensor.array(), node)
            elif producer is not None and producer.op == "Constant" and "value" in producer.attrs:
                _require_finite(tensor.name, numpy_helper.to_array(producer.attrs["value"].t), node)
            elif producer is not None and producer.op in _MOVES:
                work.append(producer)


def _require_finite(name: str, values: Array, node: Node) -> None:
    if values.dtype.kind in "fV" and not np.isfinite(values.astype(np.float32, copy=False)).all():
        kind = "NaN" if np.isnan(values.astype(np.float32, copy=False)).any() else "infinity"
        raise ModelError(
            f"initializer '{name}' (weight of node '{node.label}') holds {kind}; the training diverged or the file is broken"
        )


def uses_types(graph: GraphProto, names: Iterable[str]) -> bool:
    """Whether a constant or declared tensor has one of the element types (by name, where onnx knows it)."""
    codes = {getattr(TensorProto, n) for n in names if hasattr(TensorProto, n)}
    if any(t.data_type in codes for t in graph.initializer):
        return True
    if any(i.type.tensor_type.elem_type in codes for i in [*graph.input, *graph.output, *graph.value_info]):
        return True
    return any(uses_types(body, names) for node in graph.node for body in node_bodies(node.attribute))
