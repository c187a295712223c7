"""Scales, links and spatial sizes as a written file states them: what `inspection` judges."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper, helper, shape_inference

from qcompile.dyadic import Array, Float32
from qcompile.errors import ModelError
from qcompile.wiring import BYTES, CARRIES, Node, Wiring

#: Scales are small; larger external tensors are weights and stay on disk.
_SMALL = 1 << 20
#: Operators of com.microsoft that keep their input's shape, as the standard operator that shape inference knows.
_SHAPE_TWINS = {
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearConcat": ("Concat", ()),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QLinearLeakyRelu": ("Identity", (0,)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearSigmoid": ("Identity", (0,)),
}


@dataclass(frozen=True)
class Link:
    """A DequantizeLinear or the parameters of one operand of a QLinear operator."""

    tensor: str
    scale: Float32 | None
    elem_type: int
    axis: int | None
    node: Node | None = None


class Scales:
    """A model with its functions inlined, indexed for reading; `calls`: the nodes that called qcompile's own functions.

    Raises ModelError where it cannot be read.
    """

    def __init__(self, model: onnx.ModelProto | str | Path) -> None:
        whole = read(model)
        self.calls = [n for n in whole.graph.node if n.domain == "qcompile"]
        self.model = inlined(whole)
        self.wiring = Wiring.of(self.model)
        self._shapes: dict[str, list[int | None]] | None = None

    def constant(self, name: str) -> Array | None:
        """A stored tensor; None where it is computed or absent."""
        if not name:
            return None
        maker = self.wiring.producer(name)
        while maker is not None and maker.op == "Identity":
            name = maker.inputs[0]
            maker = self.wiring.producer(name)
        return self.wiring.value(name)

    def scale(self, name: str) -> Float32 | None:
        """A scale as float32, 0-d where it holds one element; None where it is not stored in the file."""
        value = self.constant(name)
        if value is None:
            return None
        value = np.asarray(value, np.float32)
        return value.reshape(()) if value.size == 1 else value

    def dequantised(self, name: str) -> Link | None:
        """The DequantizeLinear that makes `name`, a Transpose in between allowed (weights); else None."""
        node, perm = self.wiring.producer(name), None
        if node is not None and node.op == "Transpose" and self.wiring.root(name) is not None:
            attribute = node.attribute("perm")
            perm = list(attribute.ints) if attribute is not None else None
            if perm is None:
                return None
            node = self.wiring.producer(node.inputs[0])
        if node is None or node.op != "DequantizeLinear":
            return None
        scale = self.scale(node.inputs[1])
        axis: int | None = None
        if scale is not None and scale.ndim == 1:
            axis = integer(node, "axis", 1)
            axis = axis if perm is None else perm.index(axis % len(perm))
        return Link(node.inputs[0], scale, self.wiring.elem_type(node.inputs[0]), axis, node)

    def operand(self, node: Node, first: int) -> Link:
        """Tensor, scale and zero point at inputs `first`.. of a QLinear operator."""
        name = node.inputs[first]
        return Link(name, self.scale(node.inputs[first + 1]), self.wiring.elem_type(name), None)

    def quantisers(self, name: str) -> list[Node]:
        """The nodes that read `name`."""
        return self.wiring.readers.get(name, [])

    def shape(self, name: str) -> list[int | None] | None:
        """Shape by inference, None for an unknown dimension or shape."""
        if self._shapes is None:
            self._shapes = _inferred_shapes(self.model)
        return self._shapes.get(name)

    def spatial_size(self, name: str, channels_last: bool) -> int | None:
        """Number of positions of a [N, C, *S] (or [N, *S, C]) tensor; None where it is not static."""
        shape = self.shape(name)
        if shape is None or len(shape) < 3:
            return None
        dims = shape[1:-1] if channels_last else shape[2:]
        known = [d for d in dims if d is not None]
        return prod(known) if len(known) == len(dims) else None

    def is_eight_bit(self, link: Link) -> bool:
        """Whether it is stored as int8 or uint8."""
        return link.elem_type in BYTES

    def source(self, name: str) -> Node | None:
        """What computes `name`: movement is followed back, a graph input or stored tensor gives None."""
        node = self.wiring.producer(name)
        while node is not None and (node.op in CARRIES or node.op in ("MaxPool", "Resize")):
            name = node.inputs[0]
            node = self.wiring.producer(name)
        return node


def integer(node: Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attribute(name)
    return default if attribute is None else int(attribute.i)


def real(node: Node, name: str, default: float) -> float:
    """A float attribute."""
    attribute = node.attribute(name)
    return default if attribute is None else float(attribute.f)


def read_inlined(model: onnx.ModelProto | str | Path, calls: Counter[str] | None = None) -> onnx.ModelProto:
    """The model, weights left on disk where they lie outside, its functions written out; counts their calls into `calls`.

    Raises ModelError where it cannot be read.
    """
    whole = read(model)
    if calls is not None:
        local = {(f.domain, f.name) for f in whole.functions}
        calls.update(n.op_type for n in whole.graph.node if (n.domain, n.op_type) in local)
    return inlined(whole)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with its functions written out."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def read(model: onnx.ModelProto | str | Path) -> onnx.ModelProto:
    """The model as it stands, weights left on disk where they lie outside. Raises ModelError where it cannot be read."""
    if not isinstance(model, onnx.ModelProto):
        path = Path(model)
        try:
            model = onnx.load(str(path), load_external_data=False)
            for tensor in model.graph.initializer:
                if external_data_helper.uses_external_data(tensor) and prod(tensor.dims) <= _SMALL // 4:
                    external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
                    tensor.data_location = TensorProto.DEFAULT
        except (OSError, DecodeError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{path}: cannot be read as an ONNX model: {' '.join(str(error).split())}") from error
    return model


def _inferred_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Shapes of all tensors that onnx can infer, with operators of com.microsoft replaced by their twins."""
    nodes = []
    for node in model.graph.node:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        if node.domain == "com.microsoft":
            _make_standard(twin)
        nodes.append(twin)
    infos = [
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in model.graph.initializer
        if prod(t.dims) > 64  # short ones may be shapes, whose values inference needs
    ]
    listed = {i.name for i in model.graph.input}
    inputs = [*model.graph.input, *(i for i in infos if i.name not in listed)]
    short = [t for t in model.graph.initializer if prod(t.dims) <= 64]
    outputs = [onnx.ValueInfoProto(name=o.name) for o in model.graph.output]
    graph = helper.make_graph(nodes, "shapes", inputs, outputs, short, value_info=model.graph.value_info)
    shadow = helper.make_model(graph, opset_imports=model.opset_import, ir_version=max(model.ir_version, 4))
    known = shape_inference.infer_shapes(shadow)
    shapes: dict[str, list[int | None]] = {}
    for value in (*known.graph.value_info, *known.graph.input, *known.graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims]
    return shapes


def _make_standard(node: onnx.NodeProto) -> None:
    """In place: a QLinear operator becomes the standard operator with the same output shape."""
    inputs = list(node.input)
    attributes: list[Any] = []
    if node.op_type == "QGemm":
        attributes = [a for a in node.attribute if a.name in ("transA", "transB")]
        name, kept = "Gemm", [inputs[0], inputs[3]]
    elif node.op_type in _SHAPE_TWINS:
        name, positions = _SHAPE_TWINS[node.op_type]
        kept = [inputs[i] for i in positions]
        if node.op_type == "QLinearConcat":
            kept, attributes = inputs[2::3], [a for a in node.attribute if a.name == "axis"]
        elif node.op_type == "QLinearGlobalAveragePool" and any(a.name == "channels_last" and a.i for a in node.attribute):
            return
    else:
        return
    kept_attributes = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in attributes]
    node.ClearField("attribute")
    node.attribute.extend(kept_attributes)
    del node.input[:]
    node.input.extend(kept)
    node.op_type, node.domain = name, ""
