"""Calls of integer kernels in a graph: the model-local function, its constants, and one node that says whose arithmetic it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, helper, parser

from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.kernels._protocol import DOMAIN, Kernel

_LOCAL_FUNCTIONS = 8  # the first IR version with them


def kernel_call(
    graph: Graph,
    kernel: Kernel,
    inputs: list[Tensor],
    result: Value,
    name: str,
    notes: Mapping[str, str] | None = None,
    computed: Mapping[str, Tensor] | None = None,
) -> Node:
    """Append `result = kernel(inputs)`. name: what its constants are called after; notes: the node's metadata.

    computed: tensors of the graph in place of constants, by role.
    """
    declare_kernel(graph, kernel)
    made = computed or {}
    constants = [
        made[role] if role in made else _constant(graph, kernel, name, role, v) for role, v in kernel.constants().items()
    ]
    attributes: dict[str, Any] = dict(kernel.attributes())
    node = graph.node(kernel.name, [*inputs, *constants], [result], domain=DOMAIN, **attributes)
    node.name = ""  # the metadata say whose arithmetic it is
    node.source = NodeProto()
    scales = {"scale_y": repr(kernel.output_scale)} if notes is None else notes
    given = getattr(kernel, "input_scale", getattr(kernel, "scale", None)) if notes is None else None
    if given is not None:
        scales = {"scale_x": repr(float(given)), **scales}
    for key, value in {"source": name, **scales}.items():
        node.source.metadata_props.add(key=f"qcompile.{key}", value=value)
    return node


def _constant(graph: Graph, kernel: Kernel, name: str, role: str, values: Array) -> Const:
    """The constant of this call, or the one that an earlier call has in common with it."""
    if role not in kernel.shared:
        return graph.constant(f"{name}_{role}", values)
    base = f"{role}_{values.dtype}_{'x'.join(map(str, values.shape))}"
    found = graph.constants.get(base)
    if found is not None and np.array_equal(found.array(), values):
        return found
    return graph.constant(base, values)


def declare_kernel(graph: Graph, kernel: Kernel) -> None:
    """Let the model hold the kernel's function; once however often it is called."""
    if _declared(graph, kernel.name):
        return
    proto = kernel.lower()
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = max(kernel.least_opset, graph.opset() or entry.version)
        else:
            graph.require_opset(entry.domain, entry.version)
    proto.doc_string = proto.doc_string or kernel.source
    _append(graph, proto)


def declare_storage(graph: Graph, name: str, text: str, meaning: str) -> None:
    """Let the model hold a function of constants, given as text: how weights are stored. Once however often it is called."""
    if _declared(graph, name):
        return
    proto = parser.parse_function(text)
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", graph.opset() or 21))
    proto.doc_string = meaning
    _append(graph, proto)


def _declared(graph: Graph, name: str) -> bool:
    return any(f.name == name and f.domain == DOMAIN for f in graph.shell.functions)


def _append(graph: Graph, proto: FunctionProto) -> None:
    graph.shell.functions.append(proto)
    graph.shell.ir_version = max(graph.shell.ir_version, _LOCAL_FUNCTIONS)
