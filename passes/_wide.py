"""Float tensors held as int32: value = integers * scale. What they are, how they change step, and how they leave.

Every tensor carries a bound that its integers keep for any input of the model, so that no sum or product can wrap: where it
could, the operand is clipped, or divided by a power of two, first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import frexp, isclose
from typing import TypeVar

import numpy as np
from onnx import TensorProto, helper

from qcompile.context import Context
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.kernels._protocol import Kernel
from qcompile.kernels.rescale import DyadicRescale, FusedRescale
from qcompile.passes._integer_sums import centred, int32_value, plumb
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._rescale import common_shift, dyadic_rescale

_Kernel = TypeVar("_Kernel", bound=Kernel)

INT32_MAX = 2**31 - 1
_SHIFT = 16
_LEAST_BITS = 8  # of the b of a rescale: 1/512 off at most
_EXACT_RATIO = 1e-6  # of a step: the float32 scales of a file are this far from the real numbers
_EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)


class Refusal(Exception):
    """Why a float node stays float; never leaves the pass."""


@dataclass(frozen=True)
class Wide:
    """int32 integers with |integers| <= bound; the real value of one step is `scale`."""

    integers: Tensor
    scale: float
    bound: int


@dataclass(frozen=True)
class Narrow:
    """8-bit integers as a DequantizeLinear reads them, per tensor."""

    integers: Tensor
    scale: np.float32
    zero_point: int
    elem_type: int

    @property
    def signed(self) -> bool:
        """Whether the integers are int8."""
        return self.elem_type == TensorProto.INT8


@dataclass(frozen=True)
class Exponentials:
    """u8 e with softmax = e / sum of the row, as attention multiplies them with V before it divides."""

    integers: Tensor
    longest: int | None


@dataclass
class Wides:
    """The wide form of float tensors while a graph is lowered."""

    graph: Graph
    context: Context
    of: dict[Tensor, Wide] = field(default_factory=dict)
    exponentials: dict[Tensor, Exponentials] = field(default_factory=dict)
    probabilities: set[Tensor] = field(default_factory=set)  # 8 bits of a Softmax: their rows sum up to 1, and what rounding adds
    scaled: dict[Tensor, tuple[Wide, Array]] = field(default_factory=dict)  # on the way to 8 bits: times a number a channel

    def unit(self, tensor: Tensor) -> float | None:
        """The step that the plan gives `tensor`, as an operand of a sum; None where it is free."""
        plan = self.context.plan
        return None if plan is None else plan.units.get(tensor.name)

    # --- reading ----------------------------------------------------------------------------------------------

    def narrow(self, tensor: Tensor | None) -> Narrow | None:
        """`tensor` where a DequantizeLinear of 8 bits with stored parameters, one for all, makes it."""
        node = tensor.producer if tensor is not None else None
        return narrow_of(node, node.inputs[0]) if node is not None and node.op == "DequantizeLinear" else None

    def written(self, quantiser: Node) -> Narrow:
        """What a QuantizeLinear writes. Raises Refusal where that is not 8 bits with stored parameters, one for all."""
        found = narrow_of(quantiser, quantiser.outputs[0])
        if found is None:
            raise Refusal("its result is not quantised to 8 bits by one stored scale")
        return found

    def sole_quantiser(self, output: Value) -> Node | None:
        """The QuantizeLinear that alone reads `output`."""
        readers = output.consumers
        alone = len(readers) == 1 and readers[0].op == "QuantizeLinear" and not self.graph.is_pinned(output)
        return readers[0] if alone else None

    def read(self, tensor: Tensor, scale: float | None = None) -> Wide:
        """`tensor` in wide integers; constants and 8-bit tensors are made so. scale: the step wanted, where there is a choice.

        Raises Refusal where it is float.
        """
        found = self.of.get(tensor)
        if found is not None:
            return found if scale is None else self.to_scale(found, scale, tensor.name)
        if isinstance(tensor, Const):
            return self._constant(tensor, scale)
        narrow = self.narrow(tensor)
        if narrow is None:
            raise Refusal("it reads a float tensor")
        inside = centred(self.graph, narrow.integers, narrow.zero_point, tensor.name)
        wide = Wide(inside, float(narrow.scale), 255)
        return wide if scale is None else self.to_scale(wide, scale, tensor.name)

    def _constant(self, tensor: Const, scale: float | None) -> Wide:
        if tensor.elem_type != TensorProto.FLOAT:
            raise Refusal("it reads a constant that is not float32")
        values = tensor.array().astype(np.float64)
        peak = float(np.abs(values).max(initial=0.0))
        if not np.isfinite(peak):
            raise Refusal("it reads a constant that is not finite")
        step = scale if scale is not None else 2.0 ** (frexp(peak)[1] - _SHIFT)
        steps = np.rint(values / step)
        if float(np.abs(steps).max(initial=0.0)) > INT32_MAX // 2:
            raise Refusal("it reads a constant that is too large for the other operands' step")
        integers = steps.astype(np.int32)
        stored = self.graph.constant(tensor.name + "_wide", integers)
        return Wide(stored, step, max(1, int(np.abs(steps).max(initial=0))))

    # --- changing the step --------------------------------------------------------------------------------------

    def to_scale(self, wide: Wide, scale: float, name: str) -> Wide:
        """The same values in steps of `scale`; rounded, half to even, where it is no divisor of the present step."""
        ratio = wide.scale / scale
        whole = round(ratio)
        if isclose(ratio, 1.0, rel_tol=_EXACT_RATIO):
            return replace(wide, scale=scale)
        if whole >= 1 and isclose(ratio, whole, rel_tol=_EXACT_RATIO):
            wide = self.bounded(wide, INT32_MAX // whole, name)
            return Wide(self.times(wide.integers, np.asarray(whole), name), scale, wide.bound * whole)
        b, c = nearest_dyadic(ratio)
        result = int32_value(self.graph, name + "_rescaled", wide.integers)
        kernel_call(self.graph, DyadicRescale((b,), (c,), 0, "int32"), [wide.integers], result, name)
        return Wide(result, scale, min(INT32_MAX, (wide.bound * b >> c) + 1))

    def halved(self, wide: Wide, most: int, name: str) -> Wide:
        """The same values with |integers| <= `most`: divided by the least power of two, rounded half to even."""
        shift = 0
        while (wide.bound >> shift) + 1 > most and shift < 31:
            shift += 1
        if shift == 0 or wide.bound <= most:
            return wide
        return self.to_scale(wide, wide.scale * 2.0**shift, name)

    def bounded(self, wide: Wide, most: int, name: str) -> Wide:
        """Clipped to +-most where its bound is larger: values that no calibration sample came near."""
        if wide.bound <= most:
            return wide
        result = int32_value(self.graph, name + "_bounded", wide.integers)
        ends = [self.graph.constant(f"{name}_{role}", np.asarray(v, np.int32)) for role, v in (("least", -most), ("most", most))]
        plumb(self.graph, "Clip", [wide.integers, *ends], result)
        return Wide(result, wide.scale, most)

    def times(self, integers: Tensor, factor: Array, name: str) -> Value:
        """int32 product with constants."""
        result = int32_value(self.graph, name + "_multiple", integers)
        plumb(self.graph, "Mul", [integers, self.graph.constant(f"{name}_factor", factor.astype(np.int32))], result)
        return result

    def binary(self, op: str, left: Tensor, right: Tensor, name: str, like: Tensor) -> Value:
        """int32 result of a two-operand operator, of the shape of `like`."""
        result = int32_value(self.graph, f"{name}_{op.lower()}", like)
        plumb(self.graph, op, [left, right], result)
        return result

    # --- leaving ------------------------------------------------------------------------------------------------

    def quantise(self, wide: Wide, quantiser: Node, factors: Array | None = None) -> None:
        """8-bit integers of `wide` in place of `quantiser`, by one dyadic rescale: the nearest b/2^16 to the ratio of the scales,
        the nearest odd b from 512 on.

        factors: positive numbers [channels] of the last axis that the values are multiplied by. Steps so fine that b would have
        fewer than 8 bits are halved first. Raises Refusal where the steps are too coarse.
        """
        y, name = self.written(quantiser), quantiser.inputs[0].name
        wide, numerators = self.numerators(wide, y, np.asarray(1.0 if factors is None else factors, np.float64), name)
        self.graph.remove(quantiser)
        assert isinstance(y.integers, Value)
        self.rescale(wide, numerators, y, y.integers, name)

    def numerators(self, wide: Wide, y: Narrow, factors: Array, name: str) -> tuple[Wide, Array]:
        """(`wide`, in coarser steps where they are too fine; b of each factor, so that b / 2^16 of a step are steps of y)."""
        finest = float(y.scale) * 2.0 ** (_LEAST_BITS - _SHIFT) / float(factors.max())
        if wide.scale < finest:
            wide = self.halved(wide, max(1, int(wide.bound * wide.scale / finest)), name)
        wanted = wide.scale * factors / float(y.scale) * 2**_SHIFT
        # An odd b of 9 bits or more has no ties, which the written-out rescale need not round then; a power of two is exact.
        keeps = (wanted < 2 ** (_LEAST_BITS + 1)) | (np.frexp(wanted)[0] == 0.5)
        found = np.where(keeps, np.maximum(np.rint(wanted), 1), 2 * np.floor(wanted / 2) + 1)
        if found.max() >= 2**24:
            raise Refusal("its steps are too coarse for 8 bits")
        return wide, found.astype(np.int64)

    def rescale(self, wide: Wide, numerators: Array, y: Narrow, result: Value, name: str) -> None:
        """`result`, 8 bits as `y` means them, of `wide` times numerators / 2^16: one, or one a channel of the last axis."""
        notes = {"scale_x": repr(wide.scale), "scale_y": str(y.scale)}
        if result.type is None:
            result.type = helper.make_tensor_type_proto(y.elem_type, wide.integers.dims)
        b, c = common_shift((numerators / 2**_SHIFT).astype(np.float32))
        if self.context.settings.format == "integer":
            dyadic_rescale(self.graph, wide.integers, b, c, y.zero_point, result, y.elem_type, name, notes)
            return
        kind, dims = "int8" if y.signed else "uint8", wide.integers.dims or ()
        columns = dims[1] if len(dims) == 2 and isinstance(dims[1], int) else 0
        kernel = FusedRescale(tuple(b.reshape(-1).tolist()), (c,) * b.size, y.zero_point, kind, columns=columns)
        kernel_call(self.graph, kernel, [wide.integers], result, name, notes)

    def dequantise(self, wide: Wide, result: Value) -> None:
        """`result` = the float value; for what stays float, and for the ends of the model."""
        scale = self.graph.constant(result.name + "_step", np.asarray(wide.scale, np.float32))
        plumb(self.graph, "DequantizeLinear", [wide.integers, scale], result)

    def value(self, base: str, like: Tensor) -> Value:
        """A new int32 tensor of the shape of `like`."""
        return int32_value(self.graph, base, like)

    def set(self, node: Node, wide: Wide, index: int = 0) -> None:
        """Remember the wide form of an output of `node`."""
        self.of[node.outputs[index]] = wide


def narrow_of(node: Node, integers: Tensor) -> Narrow | None:
    """`integers` as the QuantizeLinear or DequantizeLinear `node` means them; None where it has not one stored scale."""
    scale, zero = node.constant(1), node.constant(2)
    if scale is None or zero is None or zero.elem_type not in _EIGHT_BIT or scale.array().size != 1:
        return None
    return Narrow(integers, np.float32(scale.array().reshape(())), int(zero.array().reshape(())), zero.elem_type)


def in_domain(make: Callable[[], _Kernel]) -> _Kernel:
    """The kernel that `make` makes; outside its domain a Refusal. Called before the graph is changed."""
    try:
        return make()
    except ValueError as error:
        raise Refusal(f"outside the kernel's domain ({error})") from error


def nearest_dyadic(ratio: float) -> tuple[int, int]:
    """(b, c) with b / 2^c nearest to `ratio` > 0, 1 <= b < 2^24 and 0 <= c <= 31."""
    c = int(np.clip(23 - frexp(ratio)[1], 0, 31))
    b = round(ratio * 2.0**c)
    if not 1 <= b < 2**24:
        raise Refusal("the steps of its operands are too far apart")
    return b, c
