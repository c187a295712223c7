"""Bytes that a file need not hold: attributes at their defaults, equal small constants, zero points of zero where implied.

Nothing that a runtime computes changes. On a model of some kilobytes they are a tenth of the file.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from onnx import AttributeProto, SparseTensorProto, TensorProto, defs

from qcompile.graph import Const, Graph, Node
from qcompile.tensors import is_external

_SMALL = 64  # bytes: sharing larger constants saves nothing that is worth a look at their values
_WINDOWS = {"strides": 1, "dilations": 1, "pads": 0}  # defaults that depend on the rank, so that no schema holds them
_WINDOWED = frozenset(["AveragePool", "Conv", "ConvInteger", "ConvTranspose", "LpPool", "MaxPool", "QLinearConv"])


def compact(graph: Graph) -> None:
    """Leave out of `graph` what its file need not say. The last step before names are shortened."""
    for node in graph.nodes:
        _drop_defaults(graph, node)
        _drop_zero_point(node)
    _share(graph)
    graph.cleanup()


def _drop_defaults(graph: Graph, node: Node) -> None:
    """Attributes of a standard operator that say what would hold without them."""
    if node.domain not in ("", "ai.onnx"):
        return
    defaults = _defaults(node.op, graph.opset() or 1)
    plain = node.attr("auto_pad", b"NOTSET") in (b"NOTSET", "NOTSET")
    for name, attribute in list(node.attrs.items()):
        usual = _WINDOWS.get(name) if node.op in _WINDOWED and (name != "pads" or plain) else None
        if defaults.get(name) == _value(attribute) or (usual is not None and all(v == usual for v in attribute.ints)):
            del node.attrs[name]


def _value(attribute: AttributeProto) -> bytes:
    """What an attribute holds, without its name and description."""
    bare = AttributeProto()
    bare.CopyFrom(attribute)
    bare.ClearField("name")
    bare.ClearField("doc_string")
    return bytes(bare.SerializeToString(deterministic=True))


@cache
def _defaults(op: str, opset: int) -> dict[str, bytes]:
    """Attribute name -> default value of a standard operator; empty for one that is not known."""
    try:
        schema = defs.get_schema(op, opset, "")
    except defs.SchemaError:
        return {}
    known = {name: a.default_value for name, a in schema.attributes.items()}
    return {name: _value(a) for name, a in known.items() if a.type != AttributeProto.UNDEFINED}


def _drop_zero_point(node: Node) -> None:
    """Zero points of 0 of int8 weights that only Conv reads; onnxruntime fuses no Gemm without them (1.23 fails at run time)."""
    if node.op != "DequantizeLinear" or len(node.inputs) < 3:
        return
    zero = node.constant(2)
    if zero is None or zero.elem_type != TensorProto.INT8 or zero.array().any() or not node.outputs[0].consumers:
        return
    if all(reader.op == "Conv" and reader.inputs[1] is node.outputs[0] for reader in node.outputs[0].consumers):
        del node.inputs[2]


def _share(graph: Graph) -> None:
    """One constant for all that are equal, type and shape included."""
    first: dict[tuple[int, tuple[int, ...], bytes], Const] = {}
    for const in list(graph.constants.values()):
        if isinstance(const.proto, SparseTensorProto) or is_external(const.proto) or const.elem_type == TensorProto.STRING:
            continue
        if const.nbytes > _SMALL or graph.is_pinned(const):
            continue
        key = (const.elem_type, const.dims, np.ascontiguousarray(const.array()).tobytes())
        kept = first.setdefault(key, const)
        if kept is not const:
            graph.replace_uses(const, kept)
