"""Why onnxruntime left a node in float that the file had surrounded with Q/DQ.

onnxruntime gives no reason of its own, so each rule below is one condition of its Q/DQ fusion as measured on the CPU
provider (1.31 and 1.32, x86-64): the first one that holds for the node, in the optimised graph, is the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from qcompile.wiring import BYTES, CARRIES, MOVES, NARROW, WIDE, Node, Root, Wiring

#: Operators that onnxruntime turns into an integer kernel when Q/DQ surround them.
HAVE_KERNEL = frozenset(
    [
        "Add",
        "AveragePool",
        "Concat",
        "Conv",
        "Gemm",
        "GlobalAveragePool",
        "LeakyRelu",
        "MatMul",
        "Mul",
        "Sigmoid",
        "Softmax",
        "Where",
    ]
)
#: Operators that run on the integers themselves once the scale before and after them is the same.
SHARE_SCALE = MOVES | {"MaxPool", "Resize"}

_ACTIVATIONS = {"Relu", "Clip"}
#: Relative; onnxruntime pull request 28229. Gemm is not checked: it fuses, and computes with the scale it wants.
_BIAS_SCALE_TOLERANCE = 0.01
_WEIGHTED = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}


def weight_index(wiring: Wiring, node: Node) -> int:
    """Position of the weight among a float Conv/Gemm/MatMul's inputs: 1, or 0 where a MatMul's left side is the constant."""
    left_is_constant = wiring.root(node.inputs[0]) is not None and wiring.root(node.inputs[1]) is None
    return 0 if left_is_constant else 1


def why_float(wiring: Wiring, node: Node, root: Root | None, written_as: str) -> str:
    """Why the weighted `node` of the optimised graph runs in float.

    `root` is its stored weight (None for a product of two activations), `written_as` its operator in the file.
    """
    return next(_reasons(wiring, node, root, written_as), f"not known (onnxruntime {ort.__version__} gives no reason)")


def _reasons(wiring: Wiring, node: Node, root: Root | None, written_as: str) -> Iterator[str]:
    at = weight_index(wiring, node)
    before_weight, before_data = (wiring.producer(node.inputs[k]) for k in (at, 1 - at))
    weight_type = TensorProto.UNDEFINED if root is None else root.elem_type
    data_type = _quantised_type(wiring, before_data)
    if node.op == "ConvTranspose":
        yield "ConvTranspose never fuses: onnxruntime has no integer kernel for it"
    if data_type in WIDE:
        yield "16-bit activations: the integer kernels take 8 bits only"
    if node.op == "MatMulNBits":
        yield f"only its weight is quantised: {_not_quantised(node.inputs[0])}"
    block = None if before_weight is None else before_weight.attribute("block_size")
    if data_type == TensorProto.UNDEFINED and block is not None and block.i:
        yield f"weight {_of(root)} in blocks of {block.i} was not made a MatMulNBits (a MatMul + Add became a Gemm first?)"
    if data_type == TensorProto.UNDEFINED:
        yield _not_quantised(node.inputs[1 - at])
    if weight_type in WIDE:
        yield f"{_name(weight_type)} weight {_of(root)}: the integer kernels take INT8 only"
    if weight_type in NARROW:
        yield f"{_name(weight_type)} weight {_of(root)} behind DequantizeLinear: put Cast(to=INT8) in front of it"
    if root is not None and (before_weight is None or before_weight.op != "DequantizeLinear"):
        yield f"weight {_of(root)} is widened to float without a DequantizeLinear right in front of the node"
    if block is not None and block.i:
        yield f"weight {_of(root)} has one scale a block of {block.i}: the kernels take one a tensor or a channel"
    yield from _gemm_reasons(wiring, node, written_as)
    yield from _output_reasons(wiring, node)
    if node.op in ("Conv", "FusedConv", "Gemm", "FusedGemm"):
        yield from _bias_reasons(wiring, node)
    yield from _sign_reasons(wiring, [node])


def _gemm_reasons(wiring: Wiring, node: Node, written_as: str) -> Iterator[str]:
    if node.op not in ("Gemm", "FusedGemm"):
        return
    for name in ("alpha", "beta"):
        factor = node.attribute(name)
        if factor is not None and factor.f != 1:
            yield f"Gemm with {name} = {factor.f:g}: only 1 fuses"
    for before in map(wiring.producer, node.inputs[:2]):
        if before is not None and before.op == "DequantizeLinear" and (len(before.inputs) < 3 or not before.inputs[2]):
            yield f"DequantizeLinear {before.label} has no zero_point: Gemm fuses only with one given"
    if written_as == "MatMul" and not _read_by_quantize(wiring, node):
        yield "MatMul + Add on static shapes became a float Gemm: write Reshape + Gemm with an int32 bias + Reshape"


def _output_reasons(wiring: Wiring, node: Node) -> Iterator[str]:
    fused = node.attribute("activation")
    readers = [reader for output in node.outputs for reader in wiring.readers.get(output, [])]
    quantised = [reader for reader in readers if reader.op == "QuantizeLinear"]
    between = next((r for r in readers if r.op in _ACTIVATIONS and _read_by_quantize(wiring, r)), None)
    if (fused is not None and quantised) or between is not None:
        what = fused.s.decode() if fused is not None else between.op if between is not None else ""
        yield f"{what} before the QuantizeLinear cuts inside the quantised range: fold it into that range and drop it"
    leaves = bool(wiring.outputs & set(node.outputs))
    others = sorted({reader.op for reader in readers if reader.op != "QuantizeLinear"})
    who = f"{', '.join(others)} reads it in float" if others else "it is an output of the graph"
    if quantised and (others or leaves):
        yield f"its output goes not only to QuantizeLinear: {who}"
    if not quantised and node.op in ("Conv", "FusedConv"):
        yield f"Conv without an output QuantizeLinear: {who}"


def _sign_reasons(wiring: Wiring, nodes: list[Node]) -> Iterator[str]:
    """Signed activations fuse on ARM; x86 wants UINT8, and a kernel wants one type on all sides."""
    made = {
        _quantised_type(wiring, wiring.producer(name))
        for node in nodes
        for name in node.inputs
        if name and (wiring.is_float(name) or node.op not in _WEIGHTED)
    }
    read = {
        wiring.elem_type(reader.outputs[0])
        for node in nodes
        for output in node.outputs
        for reader in wiring.readers.get(output, [])
        if reader.op == "QuantizeLinear"
    }
    kinds = (made | read) & BYTES
    if len(kinds) > 1:
        yield "INT8 and UINT8 activations around one operator: use UINT8 for all (INT8 on ARM)"
    if kinds == {TensorProto.INT8}:
        yield "INT8 activations: on x86 use UINT8"


def _bias_reasons(wiring: Wiring, node: Node) -> Iterator[str]:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return
    before = wiring.producer(node.inputs[2])
    if before is None or _quantised_type(wiring, before) != TensorProto.INT32:
        yield f"bias {node.inputs[2]} is not a DequantizeLinear of int32"
        return
    scales = [wiring.value(d.inputs[1]) for d in map(wiring.producer, node.inputs[:3]) if d is not None and len(d.inputs) > 1]
    data, weight, bias = (*scales, None, None, None)[:3]
    if node.op not in ("Conv", "FusedConv") or data is None or weight is None or bias is None:
        return
    if not np.allclose(bias, data * weight, rtol=_BIAS_SCALE_TOLERANCE, atol=0):
        yield f"the scale of bias {node.inputs[2]} is not the input's scale times the weight's"


def why_between(wiring: Wiring, members: list[Node]) -> str:
    """Why the float operators `members` between DequantizeLinear and QuantizeLinear are not one integer kernel each."""
    compute = [node for node in members if node.op not in SHARE_SCALE]
    without = sorted({node.op for node in compute if node.op not in HAVE_KERNEL | _ACTIVATIONS | {"Cast"}})
    if without:
        return f"{', '.join(without)}: onnxruntime has no integer kernel for it"
    if any(_quantised_type(wiring, wiring.producer(i)) in WIDE for node in members for i in node.inputs):
        return "16-bit activations: the integer kernels take 8 bits only"
    for node in compute:
        for name in node.inputs:
            root = wiring.root(name) if name else None
            if root is not None and node.op not in _ACTIVATIONS and not _from_dequantize(wiring, name):
                return f"{node.op} {node.label} reads the float constant {root.name}: quantise it as well"
        made_by = [wiring.producer(name) for name in node.inputs if name and wiring.is_float(name)]
        kernel = next((p for p in made_by if p is not None and p.op.startswith("MatMulInteger")), None)
        if kernel is not None:
            return f"{node.op} {node.label} reads {kernel.label} in float: a MatMul without an output QuantizeLinear"
    if compute and all(node.op in _ACTIVATIONS for node in compute):
        return f"{compute[0].op} {compute[0].label}: fold it into the quantised range and drop it"
    if not compute:
        moved = ", ".join(sorted({node.op for node in members}))
        return f"{moved} between two different scales: give both sides one scale and zero point"
    if len(compute) > 1:
        chain = ", ".join(node.label for node in compute)
        return f"no QuantizeLinear and DequantizeLinear between {chain}"
    sign = next(_sign_reasons(wiring, compute), None)
    if sign is not None:
        return sign
    return f"{compute[0].op} {compute[0].label}: not known (onnxruntime {ort.__version__} gives no reason)"


def _read_by_quantize(wiring: Wiring, node: Node) -> bool:
    readers = [reader for output in node.outputs for reader in wiring.ahead_of_moves(output)]
    return any(reader.op == "QuantizeLinear" for reader in readers)


def _from_dequantize(wiring: Wiring, name: str) -> bool:
    producer = wiring.behind_moves(name)
    return producer is not None and producer.op == "DequantizeLinear"


def _quantised_type(wiring: Wiring, node: Node | None) -> int:
    """Integer type that DequantizeLinear `node` reads; UNDEFINED where it is none."""
    while node is not None and node.op in CARRIES:
        node = wiring.producer(node.inputs[0])
    if node is None or node.op != "DequantizeLinear":
        return int(TensorProto.UNDEFINED)
    return wiring.elem_type(node.inputs[0])


def _not_quantised(name: str) -> str:
    return f"its input {name} is not quantised (no DequantizeLinear in front)"


def _name(elem_type: int) -> str:
    return str(TensorProto.DataType.Name(elem_type))


def _of(root: Root | None) -> str:
    return "" if root is None else root.name
