"""`--inputs-as uint8`: the model takes the integers that its first QuantizeLinear would have made.

    x (float) -> Q -> ...    becomes    x (uint8 or int8) -> ...

The name stays. What an integer means, real = scale * (x - zero_point), stands in the metadata (`qcompile.input.NAME`).
"""

from __future__ import annotations

import json

from onnx import TensorProto, helper

from qcompile.errors import InputError
from qcompile.graph import Graph, Node, Value


def take_integers(graph: Graph, option: str = "--inputs-as uint8") -> list[str]:
    """Change every float input that is only quantised; returns their names.

    option: what asked for it, for messages.
    Raises InputError naming an input that is also read in float, or where no input is quantised.
    """
    changed: list[str] = []
    for value in graph.inputs:
        if value.elem_type != TensorProto.FLOAT:
            continue
        quantise = _only_quantised(graph, value, option)
        scale, zero_point = quantise.constant(1), quantise.constant(2)
        assert scale is not None and zero_point is not None
        real = {"scale": float(scale.array()), "zero_point": int(zero_point.array())}
        graph.shell.metadata_props.add(key=f"qcompile.input.{value.name}", value=json.dumps(real, sort_keys=True))
        integers = quantise.outputs[0]
        graph.replace_uses(integers, value)
        graph.remove(quantise)
        value.type = helper.make_tensor_type_proto(zero_point.elem_type, value.dims)
        changed.append(value.name)
    if not changed:
        raise InputError(f"{option}: no float input is quantised directly; leave the option out")
    graph.cleanup()
    return changed


def _only_quantised(graph: Graph, value: Value, option: str) -> Node:
    readers = value.consumers
    if len(readers) != 1 or readers[0].op != "QuantizeLinear" or graph.is_pinned(value):
        other = next((n for n in readers if n.op != "QuantizeLinear"), None)
        where = f"node '{other.label}'" if other is not None else "the graph's outputs"
        raise InputError(f"{option}: input '{value.name}' is read in float by {where}; leave the option out")
    return readers[0]
