"""All that a model file says about itself, as plain data: `qcompile inspect MODEL --json`, and its tables.

Opset, inputs, parameters, multiply-accumulates and sparsity by layer, element types, quantisation parameters, and the fusion
audit: which nodes onnxruntime runs on integers, and why the others do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.audit import audit
from qcompile.certificate import certify
from qcompile.check import fusion_json, nodes_json
from qcompile.errors import InputError, ModelError
from qcompile.inspection import rescales, summary
from qcompile.macs import LayerMacs, count_macs, sized_feeds
from qcompile.model_file import read_model
from qcompile.portable import portability
from qcompile.report_file import file_record
from qcompile.runtime import Array
from qcompile.samples import model_inputs
from qcompile.size import size_bytes
from qcompile.tensors import read_tensor

_SPARSE = 64  # constants with fewer values are biases and scales: their zeros say nothing


@dataclass(frozen=True)
class Quantised:
    """One QuantizeLinear or DequantizeLinear, or operand of an integer operator: what its scales and zero points are.

    scale_low, scale_high: the range of its scales (equal for one a tensor); channels: how many there are. type: of the integers.
    """

    node: str
    op: str
    tensor: str
    type: str
    channels: int
    scale_low: float
    scale_high: float
    zero_point: int | None


def facts(path: str | Path, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Everything, as plain JSON. sizes: of symbolic dimensions, 1 where not given; multiply-accumulates depend on them.

    Raises ModelError where the file cannot be read, and InputError for a dimension that no input has.
    """
    path = Path(path)
    model = read_model(path)
    constants = {t.name: t for t in model.graph.initializer}
    inputs = model_inputs(model)
    symbols = {d for info in inputs for d in info.shape or () if isinstance(d, str)}
    unknown = sorted(set(sizes or {}) - symbols)
    if unknown:
        known = ", ".join(sorted(symbols)) or "none"
        raise InputError(f"{path}: --dim {unknown[0]}: no input has a dimension of that name; there are: {known}")
    counted = summary(path)
    audited = _audited(path)
    return {
        "file": {**file_record(path), "size_bytes": size_bytes(path)},
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": [_value(v) for v in model.graph.input if v.name not in constants],
        "outputs": [_value(v) for v in model.graph.output],
        "nodes": len(model.graph.node),
        "functions": len(model.functions),
        "parameters": sum(prod(t.dims) for t in model.graph.initializer),
        "formats": list(counted.formats),
        "integer_ops": counted.integer_ops,
        "float_ops": counted.float_ops,
        "weight_bytes": counted.weight_bytes,
        "macs": _macs(path, dict(sizes or {})),
        "quantisation": [asdict(entry) for entry in _quantisation(path, model)],
        "rescales": _rescales(path),
        "sparsity": _sparsity(path, model),
        "integer_only": certify(path).as_json(),
        "portable": portability(path).as_json(),
        **audited,
    }


def _value(info: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = info.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    return {"name": info.name, "type": kind, "shape": dims if tensor.HasField("shape") else None}


def _macs(path: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """{"total", "layers", "inputs"} or, where the model cannot be run, {"total": None, "reason"}."""
    inputs = model_inputs(read_model(path))
    try:
        feeds = sized_feeds(inputs, sizes)
        layers = count_macs(path, feeds)
    except ModelError as error:
        return {"total": None, "layers": [], "reason": str(error)}
    return {
        "total": sum(layer.macs for layer in layers),
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
        "layers": [_layer(layer) for layer in layers],
    }


def _layer(layer: LayerMacs) -> dict[str, Any]:
    return {
        "node": layer.node,
        "op": layer.op,
        "macs": layer.macs,
        "parameters": prod(layer.weight_shape),
        "weight_shape": list(layer.weight_shape),
        "output_shape": list(layer.output_shape),
    }


def _quantisation(path: Path, model: onnx.ModelProto) -> list[Quantised]:
    """Of every QuantizeLinear, DequantizeLinear and integer operator whose scales stand in the file, in its order."""
    constants = {t.name: t for t in model.graph.initializer}
    found = []

    def array(name: str) -> Array | None:
        return read_tensor(constants[name], path.parent) if name in constants else None

    for node in model.graph.node:
        for place in _SCALES_AT.get(node.op_type, ()):
            if place + 1 > len(node.input) - 1 and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            scale = array(node.input[place])
            zero = array(node.input[place + 1]) if place + 1 < len(node.input) else None
            if scale is None or scale.size == 0:
                continue
            source = constants.get(node.input[place - 1])
            kind = TensorProto.DataType.Name(_integer_type(constants, node, place, source)).lower()
            values = scale.astype(np.float64)
            found.append(
                Quantised(
                    node.name or node.output[0],
                    node.op_type,
                    node.input[place - 1],
                    kind,
                    int(scale.size),
                    float(values.min()),
                    float(values.max()),
                    None if zero is None or zero.size != 1 else int(zero.astype(np.int64).reshape(-1)[0]),
                )
            )
    return found


_SCALES_AT = {
    "QuantizeLinear": (1,), "DequantizeLinear": (1,), "QLinearConv": (1, 4), "QLinearMatMul": (1, 4), "QGemm": (1, 4),
    "QLinearAdd": (1, 4), "QLinearMul": (1, 4),
}  # fmt: skip


def _integer_type(constants: Mapping[str, TensorProto], node: onnx.NodeProto, place: int, source: TensorProto | None) -> int:
    """The element type of the integers: the zero point's, else the constant's, else uint8 (the standard's default)."""
    if place + 1 < len(node.input) and node.input[place + 1] in constants:
        return int(constants[node.input[place + 1]].data_type)
    if source is not None and node.op_type != "QuantizeLinear":
        return int(source.data_type)
    return int(TensorProto.UINT8)


def _rescales(path: Path) -> dict[str, Any]:
    found = rescales(path)
    return {"count": len(found), "exact": sum(r.exact for r in found), "inexact": [r.node for r in found if not r.exact]}


def _sparsity(path: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """Zeros of the constants with `_SPARSE` values or more: all together, and of those with any."""
    zeros = total = 0
    tensors = []
    for tensor in model.graph.initializer:
        if prod(tensor.dims) < _SPARSE or tensor.data_type == TensorProto.STRING:
            continue
        values = read_tensor(tensor, path.parent)
        count = int(values.size - np.count_nonzero(values))
        zeros, total = zeros + count, total + int(values.size)
        if count:
            tensors.append({"tensor": tensor.name, "zeros": count / values.size, "values": int(values.size)})
    return {"zeros": zeros / total if total else 0.0, "values": total, "tensors": tensors}


def _audited(path: Path) -> dict[str, Any]:
    """`nodes_at_run_time` and `fusion`; None with the reason where onnxruntime cannot load the file."""
    try:
        found = audit(path)
    except ModelError as error:
        return {"nodes_at_run_time": None, "fusion": None, "fusion_unknown": str(error)}
    return {"nodes_at_run_time": nodes_json(found), "fusion": fusion_json(found)}
