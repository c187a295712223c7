"""One node of a model, and the handler that runs nodes without integer semantics through onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompile.dyadic import Array
from qcompile.errors import ModelError
from qcompile.runtime import Optimisation, Session


@dataclass(frozen=True)
class Step:
    """A node, its attributes decoded, and the opset of its domain."""

    proto: onnx.NodeProto
    name: str
    op: str
    domain: str
    opset: int
    attributes: dict[str, Any]

    @property
    def inputs(self) -> list[str]:
        """Input names; "" where an optional input is absent."""
        return list(self.proto.input)

    @property
    def outputs(self) -> list[str]:
        """Output names; "" where an optional output is absent."""
        return list(self.proto.output)

    def error(self, message: str) -> ModelError:
        """A ModelError that names this node."""
        return ModelError(f"node {self.name} ({self.op}): {message}")


def node_name(node: onnx.NodeProto) -> str:
    """The node's name, or its first output where it has none."""
    return node.name or next((o for o in node.output if o), node.op_type)


def steps_of(model: onnx.ModelProto) -> list[Step]:
    """The nodes of the main graph in file order. Raises ModelError for control flow."""
    opsets = {_domain(o.domain): o.version for o in model.opset_import}
    out = []
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ModelError(f"node {node_name(node)} ({node.op_type}): control flow is not supported")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        domain = _domain(node.domain)
        out.append(Step(node, node_name(node), node.op_type, domain, opsets.get(domain, 1), attributes))
    return out


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


class SingleNodeRunner:
    """Runs single nodes in onnxruntime, one cached session for each node and combination of input types.

    One thread each: hundreds of sessions live at once, and the idle threads of all of them would spin against the one at work.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._opsets = list(model.opset_import)
        self._ir_version = min(model.ir_version, 10)
        self._sessions: dict[tuple[str, ...], Session] = {}

    def run(self, step: Step, inputs: list[Array | None]) -> list[Array]:
        """All outputs of `step` (an empty array for an absent one). Raises ModelError naming the node."""
        names = [name if value is not None else "" for name, value in zip(step.inputs, inputs, strict=True)]
        feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
        wanted = [name for name in step.outputs if name]
        key = (step.name, *wanted, *(f"{name}:{value.dtype}" for name, value in feeds.items()))
        if key not in self._sessions:
            node = onnx.NodeProto()
            node.CopyFrom(step.proto)
            graph = helper.make_graph(
                [node],
                "single_node",
                [_value_info(step, name, value) for name, value in feeds.items()],
                [onnx.ValueInfoProto(name=name) for name in wanted],
            )
            single = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
            label = f"node {step.name} ({step.op})"
            self._sessions[key] = Session(single, optimisation=Optimisation.OFF, threads=1, label=label)
        values = self._sessions[key].run(feeds, wanted)
        return [values[name] if name else np.empty(0, np.float32) for name in step.outputs]


def _value_info(step: Step, name: str, value: Array) -> onnx.ValueInfoProto:
    try:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    except (KeyError, ValueError) as error:
        raise step.error(f"input {name} has type {value.dtype}, which cannot be handed to onnxruntime") from error
    return helper.make_tensor_value_info(name, kind, [None] * value.ndim)
