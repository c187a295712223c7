"""Small quantised models for the tests, the same network written as `qdq` or as `qoperator`.

Weight scales are found so that fl(fl(Sx*Sw)/Sy) is b/2^c to the last bit, by trying neighbouring floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"


def dyadic_weight_scale(input_scale: float, output_scale: float, b: int, c: int) -> float:
    """A float32 Sw with fl(fl(Sx*Sw)/Sy) == b'/2^c, b' the nearest integer to b for which one exists."""
    sx, sy = np.float32(input_scale), np.float32(output_scale)
    for step in range(64):
        for candidate in (b + step, b - step):
            target = np.float32(candidate / 2**c)
            if candidate < 1:
                continue
            middle = np.float32(np.float64(target) * np.float64(sy) / np.float64(sx))
            for toward in (np.float32(0), np.float32(np.inf)):
                sw = middle
                for _ in range(6):
                    if np.float32(np.float32(sx * sw) / sy) == target:
                        return float(sw)
                    sw = np.float32(np.nextafter(sw, toward))
    raise AssertionError(f"no dyadic weight scale near {b}/2^{c}")


@dataclass(frozen=True)
class Tensor:
    """A quantised tensor of the network: the name of its integers, its scale and its zero point."""

    name: str
    scale: float
    zero: int


@dataclass
class Net:
    """Collects nodes of a network in one of the two formats."""

    layout: str
    kind: str = "uint8"
    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    count: int = 0

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        self.count += 1
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"c{self.count}"))
        return f"c{self.count}"

    def node(self, op: str, inputs: list[str], name: str = "", domain: str = "", **attributes: Any) -> str:
        self.count += 1
        out = f"t{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [out], name or f"{op}_{self.count}", domain=domain, **attributes))
        return out

    def ends(self, t: Tensor) -> list[str]:
        """Names of the tensor's scale and zero point."""
        return [self.const(t.scale), self.const(t.zero, self.kind)]

    def input(self, shape: list[int | str], scale: float, zero: int, integer: bool = False) -> Tensor:
        name = f"x{len(self.inputs)}"
        integer_type = helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        kind = integer_type if integer else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if integer:
            return Tensor(name, scale, zero)
        return self.q(name, scale, zero)

    def q(self, name: str, scale: float, zero: int) -> Tensor:
        t = Tensor("", scale, zero)
        return Tensor(self.node("QuantizeLinear", [name, *self.ends(t)]), scale, zero)

    def dq(self, t: Tensor) -> str:
        return self.node("DequantizeLinear", [t.name, *self.ends(t)])

    def linear(
        self,
        op: str,
        x: Tensor,
        w: Array,
        multipliers: list[tuple[int, int]],
        out: tuple[float, int] | None,
        bias: Array | None = None,
        after: str = "",
        **attributes: Any,
    ) -> Tensor:
        """Conv, Gemm or MatMul; `out` None leaves the result as a float tensor. One multiplier means per tensor."""
        channels = {"Conv": 0, "MatMul": w.ndim - 1, "Gemm": 0 if attributes.get("transB") else 1}[op]
        sy = out[0] if out else 1.0
        scales = [dyadic_weight_scale(x.scale, sy, b, c) for b, c in multipliers]
        ws = np.asarray(scales[0] if len(scales) == 1 else scales, np.float32)
        wz = np.zeros(ws.shape, w.dtype)
        weight = [self.const(w, w.dtype), self.const(ws), self.const(wz, w.dtype)]
        bias_scale = np.float32(x.scale) * ws
        if self.layout == "qdq":
            given = [self.dq(x), self.node("DequantizeLinear", weight, axis=channels)]
            if bias is not None:
                full = np.broadcast_to(bias_scale, bias.shape[-1:])
                parts = [
                    self.const(bias, np.int32),
                    self.const(full),
                    self.const(np.zeros(full.shape), np.int32),
                ]
                given.append(self.node("DequantizeLinear", parts, axis=0))
            y = self.node(op, given, **attributes)
            y = self.node(after, [y]) if after else y
            return self.q(y, *out) if out else Tensor(y, 1.0, 0)
        assert not after
        head = [x.name, *self.ends(x), *weight]
        stored = [self.const(bias, np.int32)] if bias is not None else []
        if op == "Gemm":
            tail = [*(stored or [""]), *(self.ends(Tensor("", *out)) if out else [])]
            y = self.node("QGemm", [*head, *tail], domain=MICROSOFT, **attributes)
        else:
            assert out is not None
            y = self.node(f"QLinear{op}", [*head, *self.ends(Tensor("", *out)), *stored], **attributes)
        return Tensor(y, *(out or (1.0, 0)))

    def pair(self, op: str, a: Tensor, b: Tensor, scale: float, zero: int) -> Tensor:
        if self.layout == "qdq":
            return self.q(self.node(op, [self.dq(a), self.dq(b)]), scale, zero)
        out = self.ends(Tensor("", scale, zero))
        inputs = [a.name, *self.ends(a), b.name, *self.ends(b), *out]
        return Tensor(self.node(f"QLinear{op}", inputs, domain=MICROSOFT), scale, zero)

    def pool(self, x: Tensor, scale: float, zero: int) -> Tensor:
        if self.layout == "qdq":
            return self.q(self.node("GlobalAveragePool", [self.dq(x)]), scale, zero)
        inputs = [x.name, *self.ends(x), *self.ends(Tensor("", scale, zero))]
        y = self.node("QLinearGlobalAveragePool", inputs, domain=MICROSOFT, channels_last=0)
        return Tensor(y, scale, zero)

    def move(self, op: str, x: Tensor, *others: str, **attributes: Any) -> Tensor:
        """A movement of one tensor, its scale shared."""
        if self.layout == "qdq":
            return self.q(self.node(op, [self.dq(x), *others], **attributes), x.scale, x.zero)
        return Tensor(self.node(op, [x.name, *others], **attributes), x.scale, x.zero)

    def model(self, *outputs: str, types: dict[str, int] | None = None) -> onnx.ModelProto:
        """The model with `outputs`; their types are the network's integer type unless given."""
        default = helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        infos = [helper.make_tensor_value_info(o, (types or {}).get(o, default), None) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)
