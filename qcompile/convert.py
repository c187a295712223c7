"""Opset conversion on protos: each operator that changed is rewritten by a small adapter, all others only move on.

onnx.version_converter is not used: it wants every weight inside the model, drops metadata, refuses what its older
representation does not know (sparse, INT4, optional types), and leaves Flatten/Shape/Reshape clutter around each Softmax.
Bodies of If, Loop and Scan are converted with the graph. The source of each rule is the operators' change log in the ONNX
specification; `qcompile.load` runs the model before and after, so that a wrong rule cannot pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.graph_parts import Array, body_names, dims_of, node_bodies
from qcompile.lower_opset import lower_opset

__all__ = ["ADAPTERS", "LEAST_OPSET", "WORKING_OPSET", "lower_opset", "opset_of", "raise_opset", "without_weights"]
LEAST_OPSET = 7
WORKING_OPSET = 21
_EMBED_LIMIT = 1024
_DEFAULT_DOMAIN = ("", "ai.onnx")


@dataclass
class Scope:
    """What an adapter may know and do: types of tensors, fresh names, new constants in the graph that holds the node."""

    names: set[str]
    shapes: dict[str, tuple[int | str | None, ...]]
    elem_types: dict[str, int]
    constants: dict[str, TensorProto]
    holder: GraphProto = field(default_factory=GraphProto)

    def fresh(self, base: str) -> str:
        """A name not used anywhere in the model."""
        name, count = base, 0
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name

    def constant(self, node: NodeProto, role: str, value: Array) -> str:
        """Add an initializer beside `node`; returns its name."""
        name = self.fresh(f"{node.output[0]}_{role}")
        self.holder.initializer.append(numpy_helper.from_array(value, name))
        return name

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor; float32 where it is not known."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.elem_types.get(name) or TensorProto.FLOAT))

    def value(self, name: str) -> Array | None:
        """The values of a small constant, else None."""
        proto = self.constants.get(name)
        return None if proto is None else numpy_helper.to_array(proto)


Adapter = Callable[[NodeProto, Scope], "list[NodeProto] | None"]


def opset_of(model: ModelProto) -> int:
    """The version of the default domain that `model` imports; the working one where it uses other domains alone."""
    found = next((o.version for o in model.opset_import if o.domain in _DEFAULT_DOMAIN), None)
    return found if found is not None else (WORKING_OPSET if model.opset_import else 1)


def raise_opset(model: ModelProto, target: int = WORKING_OPSET) -> int:
    """Raise the default domain of `model` to `target`, in place; returns how many nodes were rewritten.

    Functions must be inlined before. Raises ModelError naming the node whose operator has no counterpart.
    """
    start = opset_of(model)
    if start < LEAST_OPSET:
        raise ModelError(
            f"opset {start} is too old (least {LEAST_OPSET}); raise it with onnx.version_converter or export it again"
        )
    if start >= target:
        return 0
    scope = _scope(model, infer=start < 13)
    changed = sum(
        _adapt(model.graph, adapters, scope) for version, adapters in sorted(ADAPTERS.items()) if start < version <= target
    )
    _require_schemas(model.graph, target)
    for entry in model.opset_import:
        if entry.domain in _DEFAULT_DOMAIN:
            entry.version = target
    return changed


def without_weights(model: ModelProto, limit: int = _EMBED_LIMIT) -> ModelProto:
    """A copy of `model` whose constants over `limit` bytes, or external, are inputs: enough for shape inference."""
    light = ModelProto()
    light.ir_version = max(model.ir_version, 4)
    light.opset_import.extend(model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    known = {i.name for i in [*model.graph.initializer]} | {s.values.name for s in model.graph.sparse_initializer}
    light.graph.input.extend(i for i in model.graph.input if i.name not in known)
    light.graph.output.extend(model.graph.output)
    light.graph.value_info.extend(model.graph.value_info)
    for dense in model.graph.initializer:
        if dense.ByteSize() <= limit and dense.data_location != TensorProto.EXTERNAL:
            light.graph.initializer.append(dense)
        else:
            light.graph.input.append(helper.make_tensor_value_info(dense.name, dense.data_type, dense.dims))
    for sparse in model.graph.sparse_initializer:
        info = helper.make_tensor_value_info(sparse.values.name, sparse.values.data_type, sparse.dims)
        light.graph.input.append(info)
    return light


def _scope(model: ModelProto, infer: bool) -> Scope:
    light = without_weights(model)
    if infer:
        light = onnx.shape_inference.infer_shapes(light)
    scope = Scope(body_names(model.graph) | {""}, {}, {}, {})
    graphs = [light.graph]
    while graphs:
        graph = graphs.pop()
        for info in [*graph.value_info, *graph.input, *graph.output]:
            dims = dims_of(info.type)
            if dims is not None:
                scope.shapes[info.name] = dims
            scope.elem_types[info.name] = info.type.tensor_type.elem_type
        for constant in graph.initializer:
            _note_constant(scope, constant.name, constant)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                _note_constant(scope, node.output[0], node.attribute[0].t)
            graphs.extend(node_bodies(node.attribute))
    return scope


def _note_constant(scope: Scope, name: str, proto: TensorProto) -> None:
    scope.shapes[name] = tuple(proto.dims)
    scope.elem_types[name] = proto.data_type
    scope.constants[name] = proto


def _adapt(graph: GraphProto, adapters: dict[str, Adapter], scope: Scope) -> int:
    changed = 0
    nodes: list[NodeProto] = []
    for node in graph.node:
        for body in node_bodies(node.attribute):
            changed += _adapt(body, adapters, scope)
        adapter = adapters.get(node.op_type) if node.domain in _DEFAULT_DOMAIN else None
        scope.holder = graph
        made = adapter(node, scope) if adapter is not None else None
        changed += made is not None
        nodes.extend([node] if made is None else made)
    if any(new is not old for new, old in zip(nodes, graph.node, strict=False)) or len(nodes) != len(graph.node):
        copies = [_copied(n) for n in nodes]  # the originals live in the list that is about to be cleared
        del graph.node[:]
        graph.node.extend(copies)
    return changed


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _require_schemas(graph: GraphProto, target: int) -> None:
    for node in graph.node:
        for body in node_bodies(node.attribute):
            _require_schemas(body, target)
        if node.domain not in _DEFAULT_DOMAIN:
            continue
        try:
            gone = onnx.defs.get_schema(node.op_type, target, "").deprecated
        except onnx.defs.SchemaError:
            gone = True
        if gone:
            raise ModelError(f"node '{label_of(node)}': {node.op_type} does not exist in opset {target}; export the model again")


def label_of(node: NodeProto) -> str:
    """What errors call a node: its name, or its operator and first output."""
    return node.name or f"{node.op_type}({node.output[0] if node.output else ''})"


# ---- adapters: each edits its node in place (returning [node]) or returns the nodes that replace it; None: no change ----
def take(node: NodeProto, name: str, default: Any = None) -> Any:
    """Remove attribute `name` from `node`; returns its value, or `default`."""
    for index, attribute in enumerate(node.attribute):
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            del node.attribute[index]
            return value.decode() if isinstance(value, bytes) else value
    return default


def peek(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of attribute `name`, or `default`."""
    value = next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


def _set(node: NodeProto, name: str, value: Any) -> None:
    take(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def _place(node: NodeProto, index: int, name: str) -> None:
    while len(node.input) <= index:
        node.input.append("")
    node.input[index] = name


def _to_inputs(first: int, **roles: type[np.generic]) -> Adapter:
    """Attributes that became inputs `first`, `first` + 1 ...; absent ones stay absent."""

    def adapt(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
        found = False
        for index, (role, dtype) in enumerate(roles.items(), first):
            value = take(node, role)
            if value is not None:
                _place(node, index, scope.constant(node, role, np.asarray(value, dtype)))
                found = True
        return [node] if found else None

    return adapt


def _clip_11(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    dtype = scope.dtype(node.input[0])
    found = False
    for index, role in enumerate(("min", "max"), 1):
        value = take(node, role)
        if value is not None:
            _place(node, index, scope.constant(node, role, np.asarray(value, dtype)))
            found = True
    return [node] if found else None


def _pad_11(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    pads = take(node, "pads")
    value = take(node, "value", 0.0)
    _place(node, 1, scope.constant(node, "pads", np.asarray(pads, np.int64)))
    if value:
        _place(node, 2, scope.constant(node, "value", np.asarray(value, scope.dtype(node.input[0]))))
    return [node]


def _top_k_10(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    _place(node, 1, scope.constant(node, "k", np.asarray([take(node, "k")], np.int64)))
    return [node]


def _slice_10(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    for index, role in enumerate(("starts", "ends", "axes"), 1):
        value = take(node, role)
        if value is not None:
            _place(node, index, scope.constant(node, role, np.asarray(value, np.int64)))
    return [node]


def _upsample_10(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    node.op_type = "Resize"
    return [node]


def _resize_11(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    scales = node.input[1]
    values = scope.value(scales)
    # Before opset 11 nearest meant the floor when growing and the ceiling when shrinking.
    shrinks = values is not None and bool(np.any(values < 1))
    _set(node, "coordinate_transformation_mode", "asymmetric")
    if peek(node, "mode", "nearest") == "nearest":
        _set(node, "nearest_mode", "ceil" if shrinks else "floor")
    node.input[:] = [node.input[0], "", scales]
    return [node]


def _scatter_11(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    node.op_type = "ScatterElements"
    return [node]


def _batch_normalization_9(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    if take(node, "spatial", 1) != 1:
        raise ModelError(f"node '{label_of(node)}': BatchNormalization with spatial=0 has no counterpart; export the model again")
    return [node]


def _batch_normalization_14(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    if len(node.output) > 1:
        if any(node.output[1:]):
            raise ModelError(f"node '{label_of(node)}': BatchNormalization in training form; export the model for inference")
        del node.output[1:]
        return [node]
    return None


def _dropout_12(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    return [node] if take(node, "ratio") is not None else None  # of no effect outside training


def _softmax_13(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    """Before 13: over all axes from `axis` on, taken as one. From 13 on: over that axis alone."""
    axis = int(peek(node, "axis", 1))
    shape = scope.shapes.get(node.input[0])
    if shape is not None:
        from_front = axis + len(shape) if axis < 0 else axis
        if all(d == 1 for d in shape[from_front + 1 :]):
            _set(node, "axis", from_front)
            return [node]
    source, result = node.input[0], node.output[0]
    base = node.name or result
    size, flat, soft = (scope.fresh(f"{result}_{role}") for role in ("shape", "flat", "softmax"))
    node.input[0], node.output[0] = flat, soft
    _set(node, "axis", -1)
    return [
        helper.make_node("Shape", [source], [size], scope.fresh(f"{base}_shape")),
        helper.make_node("Flatten", [source], [flat], scope.fresh(f"{base}_flatten"), axis=axis),
        node,
        helper.make_node("Reshape", [soft, size], [result], scope.fresh(f"{base}_reshape")),
    ]


def _split_18(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    if len(node.input) > 1 and node.input[1]:
        return None
    _set(node, "num_outputs", len(node.output))
    return [node]


def _roi_align_16(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    _set(node, "coordinate_transformation_mode", "output_half_pixel")
    return [node]


def _grid_sample_20(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    modes = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}
    _set(node, "mode", modes[peek(node, "mode", "bilinear")])
    return [node]


def _dft_20(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    axis = take(node, "axis", 1)
    _place(node, 2, scope.constant(node, "axis", np.asarray(axis, np.int64)))
    return [node]


def _no_counterpart(node: NodeProto, scope: Scope) -> list[NodeProto] | None:
    raise ModelError(
        f"node '{label_of(node)}': this old form of {node.op_type} is not supported; export the model with a newer opset"
    )


def _over(ops: Iterable[str], adapter: Adapter) -> dict[str, Adapter]:
    return dict.fromkeys(ops, adapter)


_SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
_REDUCTIONS = tuple(f"Reduce{kind}" for kind in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"])
_AXES = _to_inputs(1, axes=np.int64)

# version -> operators whose form or meaning changed there
ADAPTERS: dict[int, dict[str, Adapter]] = {
    9: {"Upsample": _to_inputs(1, scales=np.float32), "BatchNormalization": _batch_normalization_9, "Scan": _no_counterpart},
    10: {"Upsample": _upsample_10, "Slice": _slice_10, "TopK": _top_k_10},
    11: {"Clip": _clip_11, "Pad": _pad_11, "Resize": _resize_11, "Scatter": _scatter_11},
    12: {"Dropout": _dropout_12},
    13: {
        **_over(_SOFTMAXES, _softmax_13),
        **_over(("Squeeze", "Unsqueeze", "ReduceSum"), _AXES),
        "Split": _to_inputs(1, split=np.int64),
    },
    14: {"BatchNormalization": _batch_normalization_14},
    16: {"RoiAlign": _roi_align_16},
    18: {**_over(_REDUCTIONS, _AXES), "Split": _split_18},
    20: {"GridSample": _grid_sample_20, "DFT": _dft_20},
    21: {"GroupNormalization": _no_counterpart},
}
