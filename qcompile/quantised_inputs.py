"""Feeds of the float model turned into those of a quantised file that takes integers (`--inputs-as uint8`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from qcompile.errors import ModelError
from qcompile.runtime import Array, Feeds
from qcompile.samples import InputInfo, model_inputs
from qcompile.wiring import CARRIES

#: Operators through which a quantised tensor passes with its scale unchanged.
_SAME_SCALE = CARRIES | {"MaxPool", "Resize"}
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


@dataclass(frozen=True)
class QuantisedInput:
    """How one integer input is to be read: real value = scale * (integer - zero_point)."""

    scale: np.float32
    zero_point: int

    def quantise(self, values: Array, dtype: np.dtype[Any]) -> Array:
        """`saturate(round_half_even(values / scale) + zero_point)`, as ONNX QuantizeLinear computes it in float32."""
        limits = np.iinfo(dtype)
        steps = np.rint(np.asarray(values, np.float32) / self.scale) + np.float32(self.zero_point)
        return np.asarray(np.clip(steps, limits.min, limits.max), dtype)


def feeds_map(float_inputs: Sequence[InputInfo], model: ModelProto, path: Path) -> Callable[[Feeds], Feeds] | None:
    """What makes feeds of the quantised `model` (read from `path`) from feeds of the float one; None where they are the same.

    Raises ModelError where the inputs' names differ, or a type differs other than float against int8 or uint8.
    """
    inputs = {info.name: info for info in model_inputs(model)}
    names = [info.name for info in float_inputs]
    if sorted(inputs) != sorted(names):
        raise ModelError(f"{path}: has inputs {sorted(inputs)}, the float model {sorted(names)}; compare models of one origin")
    changed: dict[str, tuple[QuantisedInput, np.dtype[Any]]] = {}
    for info in float_inputs:
        dtype = inputs[info.name].dtype
        if dtype == info.dtype:
            continue
        if dtype not in _BYTES or info.dtype.kind != "f":
            raise ModelError(
                f"{path}: input '{info.name}' is {dtype}, in the float model {info.dtype}; compare models of one origin"
            )
        changed[info.name] = (input_quantisation(model, info.name, path), dtype)
    if not changed:
        return None

    def quantised(feeds: Feeds) -> Feeds:
        return {
            name: changed[name][0].quantise(value, changed[name][1]) if name in changed else value
            for name, value in feeds.items()
        }

    return quantised


def input_quantisation(model: ModelProto, name: str, path: Path) -> QuantisedInput:
    """Scale and zero point of graph input `name`, from the first node that states them, else from the metadata.

    `x, x_scale, x_zero_point` stand side by side in DequantizeLinear, QGemm and all QLinear operators. Raises ModelError
    where no such node reads the input, or its parameters are not constant scalars.
    """
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        for index, read in enumerate(node.input):
            readers.setdefault(read, []).append((node, index))
    waiting, seen = [name], {name}
    while waiting:
        for node, index in readers.get(waiting.pop(0), ()):
            if node.op_type in ("DequantizeLinear", "QGemm") or node.op_type.startswith("QLinear"):
                scale = _scalar(model, node, index + 1, path)
                zero_point = _scalar(model, node, index + 2, path) if len(node.input) > index + 2 else np.zeros((), np.int64)
                return QuantisedInput(np.float32(scale), int(zero_point))
            if node.op_type in _SAME_SCALE:
                new = [output for output in node.output if output and output not in seen]
                seen.update(new)
                waiting += new
    stated = next((p.value for p in model.metadata_props if p.key == f"qcompile.input.{name}"), None)
    if stated is not None:  # integer files hold no scales beside their ends
        real = json.loads(stated)
        return QuantisedInput(np.float32(real["scale"]), int(real["zero_point"]))
    raise ModelError(f"{path}: no node says which scale the integer input '{name}' has; give a model with a float input")


def _scalar(model: ModelProto, node: NodeProto, index: int, path: Path) -> Array:
    name, label = node.input[index], node.name or node.output[0]
    tensor = next((t for t in model.graph.initializer if t.name == name), None)
    if tensor is None:
        made = next((n for n in model.graph.node if n.op_type == "Constant" and n.output[0] == name), None)
        tensor = next((a.t for a in made.attribute if a.name == "value"), None) if made is not None else None
    if tensor is None:
        raise ModelError(f"{path}: node '{label}': '{name}' is no constant, so the input cannot be quantised")
    if tensor.data_location == TensorProto.EXTERNAL:
        own = TensorProto()
        own.CopyFrom(tensor)
        onnx.external_data_helper.load_external_data_for_tensor(own, str(path.parent))
        tensor = own
    value = numpy_helper.to_array(tensor)
    if value.size != 1:
        raise ModelError(f"{path}: node '{label}': '{name}' holds {value.size} values, an input has one scale")
    return np.asarray(value).reshape(())
