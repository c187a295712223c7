"""`--io integer`, the way out: the model gives the integers that its last DequantizeLinear would have read.

    ... -> DQ -> y (float)    becomes    ... -> y (int32, int8 or uint8)

The name stays. What an integer means, real = scale * (y - zero_point), stands in the metadata (`qcompile.output.NAME`): a number,
or one a channel along `axis`. `DequantisedOutputs` reads them again, to compare such a file with its float original.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from qcompile.dyadic import along_axis
from qcompile.errors import InputError
from qcompile.graph import Graph, Value
from qcompile.runtime import Array, Feeds, Session

_KEY = "qcompile.output."


def give_integers(graph: Graph) -> list[str]:
    """Change every float output; returns their names. Raises InputError naming an output that is computed in float."""
    changed = []
    for value in list(graph.outputs):
        if value.elem_type not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
            continue
        node = value.producer
        if node is None or node.op != "DequantizeLinear" or value.consumers:
            where = "an input" if node is None else f"node '{node.label}' ({node.op})"
            raise InputError(f"--io integer: output '{value.name}' is made in float by {where}; leave the option out")
        scale, zero = node.constant(1), node.constant(2)
        integers = node.inputs[0]
        assert scale is not None and isinstance(value, Value) and isinstance(integers, Value)
        real: dict[str, Any] = {"scale": scale.array().tolist(), "zero_point": 0 if zero is None else zero.array().tolist()}
        if scale.array().ndim:
            real["axis"] = int(node.attr("axis", 1))
        graph.shell.metadata_props.add(key=_KEY + value.name, value=json.dumps(real, sort_keys=True, separators=(",", ":")))
        kind = zero.elem_type if zero is not None else TensorProto.INT32
        declared, maker = value.dims, integers.producer
        if maker is None or len(integers.consumers) > 1 or graph.is_pinned(integers):
            node.op = "Identity"
            node.attrs.clear()
            node.inputs.clear()
            node.inputs.append(integers)
        else:
            graph.remove(node)
            maker.outputs[next(i for i, o in enumerate(maker.outputs) if o is integers)] = value
        value.type, value.info = helper.make_tensor_type_proto(kind, declared), None
        changed.append(value.name)
    graph.cleanup()
    return changed


class DequantisedOutputs:
    """A session whose integer outputs are read as the floats that the model's metadata say they stand for."""

    def __init__(self, session: Session, model: ModelProto) -> None:
        self._session = session
        self._real = {p.key.removeprefix(_KEY): json.loads(p.value) for p in model.metadata_props if p.key.startswith(_KEY)}

    def run(self, feeds: Feeds) -> Mapping[str, Array]:
        """{output name: array}; float32 where the metadata give a scale: fl(integer) * scale, as DequantizeLinear computes it."""
        found = self._session.run(feeds)
        return {name: self._dequantised(name, value) for name, value in found.items()}

    def _dequantised(self, name: str, value: Array) -> Array:
        real = self._real.get(name)
        if real is None:
            return value
        scale = along_axis(np.asarray(real["scale"], np.float32), value.ndim, real.get("axis"))
        zero = along_axis(np.asarray(real["zero_point"], np.int64), value.ndim, real.get("axis"))
        return np.asarray((value.astype(np.int64) - zero).astype(np.float32) * scale)
