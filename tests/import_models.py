"""Q/DQ models as other tools write them, made here from a small float net: one builder, many spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qcompile.graph import Array
from qcompile.runtime import Session

KINDS = {"uint8": (0, 255), "int8": (-128, 127)}


class Builder:
    """Collects nodes. `ranges` None: the float net, every tensor that would be quantised an output; else the Q/DQ net."""

    def __init__(
        self, ranges: Mapping[str, tuple[float, float]] | None, activations: str = "uint8", symmetric: bool = False
    ) -> None:
        self.ranges = ranges
        self.kind = activations
        self.symmetric = symmetric
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.watched: list[str] = []
        self.stored: dict[str, tuple[Array, Array]] = {}  # node -> integers as stored, scale of each output channel

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def pair(self, source: str, scale: float | None = None, zero: int | None = None, clip: tuple[int, int] | None = None) -> str:
        """Q/DQ of one activation; `clip`: bounds on the integers between."""
        self.watched.append(source)
        if self.ranges is None:
            return source
        low, high = KINDS[self.kind]
        least, most = (min(self.ranges[source][0], 0.0), max(self.ranges[source][1], 0.0))
        if scale is None:
            scale = max(-least, most) / 127 if self.symmetric else (most - least) / 255
        if zero is None:
            zero = 0 if self.symmetric else int(np.clip(round(low - least / scale), low, high))
        dtype = np.dtype(self.kind)
        ends = [
            self.constant(f"{source}_scale", np.float32(scale)),
            self.constant(f"{source}_zero", np.asarray(zero, dtype)),
        ]
        integers = self.node("QuantizeLinear", [source, *ends], f"{source}_q")
        if clip is not None:
            bounds = [self.constant(f"{source}_{n}", np.asarray(b, dtype)) for n, b in zip(("min", "max"), clip, strict=True)]
            integers = self.node("Clip", [integers, *bounds], f"{source}_qc")
        return self.node("DequantizeLinear", [integers, *ends], f"{source}_dq")

    def weight(self, node: str, value: Array, axis: int, form: str = "integers", per_channel: bool = True) -> str:
        """A weight, quantised symmetrically: as stored integers, as a float constant through Q and DQ, or left float."""
        if self.ranges is None or form == "float":
            return self.constant(f"{node}_w", value.astype(np.float32))
        others = tuple(a for a in range(value.ndim) if a != axis)
        peak = np.abs(value).max(axis=others) if per_channel else np.abs(value).max()
        scale = np.asarray(peak / 127, np.float32)
        spread = scale.reshape([-1 if a == axis else 1 for a in range(value.ndim)]) if per_channel else scale
        integers = np.clip(np.rint(value.astype(np.float32) / spread), -127, 127).astype(np.int8)
        self.stored[node] = integers, np.broadcast_to(scale, value.shape[axis])
        ends = [self.constant(f"{node}_ws", scale), self.constant(f"{node}_wz", np.zeros(scale.shape, np.int8))]
        if form == "fake":
            source = self.node(
                "QuantizeLinear", [self.constant(f"{node}_w", value.astype(np.float32)), *ends], f"{node}_wq", axis=axis
            )
        else:
            source = self.constant(f"{node}_w", integers)
        return self.node("DequantizeLinear", [source, *ends], f"{node}_wdq", axis=axis)

    def model(self, output: str, shape: list[int | str]) -> ModelProto:
        outputs = [output] if self.ranges is not None else list(dict.fromkeys([*self.watched, output]))
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs if n != "x"]
        ends = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "g", [ends], infos, self.constants)
        made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
        made = onnx.shape_inference.infer_shapes(made)
        onnx.checker.check_model(made)
        return made


def samples(count: int = 4, shape: tuple[int, ...] = (1, 3, 8, 8)) -> list[dict[str, Array]]:
    random = np.random.default_rng(5)
    return [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(count)]


def ranges_of(model: ModelProto) -> dict[str, tuple[float, float]]:
    """Extremes of every watched tensor over the samples."""
    session = Session(model)
    found: dict[str, tuple[float, float]] = {}
    for feeds in samples(8):
        for name, value in {**session.run(feeds), **feeds}.items():
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


def net(
    *,
    activations: str = "uint8",
    symmetric: bool = False,
    weights: str = "integers",
    per_channel: bool = True,
    relu: bool = True,
    norm: bool = False,
    int32_bias: bool = False,
    add: bool = True,
    ends: bool = True,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    narrow: tuple[int, int] | None = None,
) -> tuple[ModelProto, dict[str, tuple[Array, Array]]]:
    """A residual net with a pool and a Gemm, and its stored weights by node.

    relu: whether the Relu is spelt out (else the pair's range does it); ends: whether logits are quantised.
    """

    def build(found: Mapping[str, tuple[float, float]] | None) -> Builder:
        random = np.random.default_rng(3)
        b = Builder(found, activations, symmetric)

        def conv(name: str, source: str, channels: int, inputs: int) -> str:
            weight = random.normal(size=(channels, inputs, 3, 3)) / np.sqrt(9 * inputs)
            bias = random.normal(size=channels).astype(np.float32) / 4
            names = [source, b.weight(name, weight, 0, weights, per_channel)]
            if int32_bias and found is not None:
                scale = float(
                    next(numpy_helper.to_array(c) for c in b.constants if c.name == source.removesuffix("_dq") + "_scale")
                )
                factor = (np.float32(scale) * b.stored[name][1]).astype(np.float32)
                stored = b.constant(f"{name}_bq", np.rint(bias / factor).astype(np.int32))
                names.append(b.node("DequantizeLinear", [stored, b.constant(f"{name}_bs", factor)], f"{name}_b", axis=0))
            else:
                names.append(b.constant(f"{name}_b", bias))
            result = b.node("Conv", names, name, pads=[1, 1, 1, 1])
            if norm:
                values = random.uniform(0.5, 1.5, (4, channels)).astype(np.float32)
                values[0, 0] *= -1  # a negative factor turns the signs of that channel's integers
                parts = [b.constant(f"{name}_bn_{k}", v) for k, v in zip("gbmv", values, strict=True)]
                result = b.node("BatchNormalization", [result, *parts], f"{name}_bn")
            return result

        first = conv("conv1", b.pair("x"), 8, 3)
        if relu or found is None:
            first = b.node("Relu", [first], "relu1")
        elif found is not None:
            b.ranges = {**found, first: found["relu1"]}
        first = b.pair(first, clip=narrow)
        body = b.pair(conv("conv2", first, 8, 8))
        if add:
            body = b.pair(b.node("Relu", [b.node("Add", [body, first], "sum")], "relu2"))
        pooled = b.pair(b.node("GlobalAveragePool", [body], "pool"))
        flat = b.node("Flatten", [pooled], "flat")
        dense = random.normal(size=(8, 5)) / 3
        gemm = b.node(
            "Gemm", [flat, b.weight("gemm", dense, 1, weights, per_channel), b.constant("gemm_b", np.ones(5, np.float32))], "gemm"
        )
        b.result = b.pair(gemm) if ends else gemm  # type: ignore[attr-defined]
        return b

    if ranges is None:
        ranges = ranges_of((plain := build(None)).model(plain.result, [1, 3, 8, 8]))  # type: ignore[attr-defined]
    built = build(ranges)
    return built.model(built.result, [1, 3, 8, 8]), built.stored  # type: ignore[attr-defined]
