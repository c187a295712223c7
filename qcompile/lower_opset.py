"""Lowering the opset of a finished graph (`--opset N`): allowed where every node means the same there, refused otherwise."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import AttributeProto, helper

from qcompile.errors import InputError, ModelError
from qcompile.graph import Graph, Node, Tensor
from qcompile.graph_parts import node_bodies

LEAST_OPSET = 13  # the first with per-channel QuantizeLinear and DequantizeLinear

# Same signature, other meaning: never moved across the version where it changed.
_CHANGED_MEANING = {"GroupNormalization", "RoiAlign", "GridSample", "DFT", "TfIdfVectorizer", "Multinomial"}
_CEIL_CHANGED = {"AveragePool": 19}
_REDUCTIONS = {f"Reduce{kind}" for kind in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"]}


def lower_opset(graph: Graph, version: int) -> None:
    """Let `graph` import opset `version` of the default domain, in place; a no-op where it has that version already.

    Raises InputError for a version out of range, ModelError naming the first node that does not exist there in its form.
    """
    now = graph.opset() or onnx.defs.onnx_opset_version()
    if version < LEAST_OPSET or version > now:
        raise InputError(f"opset {version}: choose one from {LEAST_OPSET} to {now}")
    if version == now:
        return
    work = [(node, _plan(graph, node, now, version)) for node in graph.nodes]
    for node, plan in work:
        if plan is not None:
            node.inputs.clear()
            node.inputs.extend(plan[0])
            node.attrs.clear()
            node.attrs.update(plan[1])
    for function in graph.shell.functions:  # the compiler's own: their operators mean the same from opset 13 on
        for inner in function.node:
            _schema(inner.op_type, version, function.name)
    for entry in [*graph.shell.opset_import, *(o for f in graph.shell.functions for o in f.opset_import)]:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    graph.cleanup()


_Plan = tuple["list[Tensor]", "dict[str, AttributeProto]"]


def _plan(graph: Graph, node: Node, now: int, version: int) -> _Plan | None:
    """The node's inputs and attributes at `version`; None where nothing changes. Nothing is edited here."""
    for body in node_bodies(list(node.attrs.values())):
        _require_same(body, now, version, node.label)
    if node.domain not in ("", "ai.onnx"):
        return None
    new, old = onnx.defs.get_schema(node.op, now, ""), _schema(node.op, version, node.label)
    if old.since_version == new.since_version:
        return None
    if node.op in _CHANGED_MEANING:
        raise _refusal(node, version, f"{node.op} changed its meaning in opset {new.since_version}")
    if node.op == "AveragePool" and node.attr("ceil_mode", 0) and old.since_version < _CEIL_CHANGED[node.op] <= new.since_version:
        raise _refusal(node, version, "AveragePool with ceil_mode counts otherwise there")
    inputs, attrs = list(node.inputs), dict(node.attrs)
    if node.op in _REDUCTIONS and old.since_version < 18 <= new.since_version:
        inputs, attrs = _axes_to_attribute(node, version)
    if node.op == "Split" and old.since_version < 18 <= new.since_version and node.input(1) is None:
        dims, axis = node.inputs[0].dims, int(node.attr("axis", 0))
        size = dims[axis] if dims is not None else None
        if not isinstance(size, int) or size % len(node.outputs):
            raise _refusal(node, version, "Split into unequal or unknown parts needs opset 18")
        attrs.pop("num_outputs", None)
    while inputs and inputs[-1].name == "":
        inputs.pop()
    if len(inputs) > old.max_input or len(node.outputs) > old.max_output:
        raise _refusal(node, version, f"{node.op} has fewer inputs or outputs there")
    for name, attribute in list(attrs.items()):
        if name not in old.attributes:
            default = new.attributes[name].default_value if name in new.attributes else None
            if default is None or _value(default) != _value(attribute):
                raise _refusal(node, version, f"{node.op} has no attribute {name} there")
            del attrs[name]
    for name, definition in new.attributes.items():
        if (
            name not in attrs
            and name in old.attributes
            and _value(definition.default_value) != _value(old.attributes[name].default_value)
        ):
            attrs[name] = definition.default_value
    _require_types(node, inputs, old, version)
    return inputs, attrs


def _axes_to_attribute(node: Node, version: int) -> _Plan:
    inputs, attrs = list(node.inputs), dict(node.attrs)
    if node.input(1) is None:
        if node.attr("noop_with_empty_axes", 0):
            raise _refusal(node, version, f"{node.op} without axes that does nothing")
    else:
        axes = node.constant(1)
        if axes is None:
            raise _refusal(node, version, f"{node.op} with axes that are computed")
        values = [int(v) for v in axes.array().ravel()]
        if not values and node.attr("noop_with_empty_axes", 0):
            raise _refusal(node, version, f"{node.op} without axes that does nothing")
        if values:
            attrs["axes"] = helper.make_attribute("axes", values)
    attrs.pop("noop_with_empty_axes", None)
    return inputs[:1], attrs


def _require_types(node: Node, inputs: list[Tensor], old: onnx.defs.OpSchema, version: int) -> None:
    for index, tensor in enumerate([*inputs, *node.outputs]):
        formal = old.inputs if index < len(inputs) else old.outputs
        place = min(index if index < len(inputs) else index - len(inputs), len(formal) - 1)
        if place < 0 or not tensor.name:
            continue
        kind = _TYPE_NAMES.get(tensor.elem_type)
        if kind is not None and f"tensor({kind})" not in formal[place].types:
            raise _refusal(node, version, f"{node.op} takes no {kind} there ('{tensor.name}')")


def _require_same(body: onnx.GraphProto, now: int, version: int, owner: str) -> None:
    for node in body.node:
        if node.domain in ("", "ai.onnx"):
            new, old = onnx.defs.get_schema(node.op_type, now, ""), _schema(node.op_type, version, owner)
            if new.since_version != old.since_version:
                raise ModelError(
                    f"node '{owner}': {node.op_type} in its body differs in opset {version}; choose --opset {new.since_version}"
                )
        for inner in node_bodies(node.attribute):
            _require_same(inner, now, version, owner)


def _schema(op: str, version: int, label: str) -> onnx.defs.OpSchema:
    try:
        return onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError as error:
        raise ModelError(f"node '{label}': {op} does not exist in opset {version}; choose a higher --opset") from error


def _refusal(node: Node, version: int, why: str) -> ModelError:
    return ModelError(f"node '{node.label}': cannot be lowered to opset {version}: {why}; choose a higher --opset")


def _value(attribute: AttributeProto) -> Any:
    return helper.get_attribute_value(attribute) if attribute.type else None


_TYPE_NAMES = {code: name.lower() for name, code in onnx.TensorProto.DataType.items() if name != "UNDEFINED"}
