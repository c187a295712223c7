"""Kernels at the ends and in the middle of their domains, the inputs that each is tried on, and a model that holds one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, helper, inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qcompile.kernels import IExp, IGelu, INormalise, ISoftmax, Table, TableExp
from qcompile.kernels._functions import named
from qcompile.kernels._protocol import OPSET, Array, Kernel

INT32 = np.iinfo(np.int32)
ELEMENTS = 100_000


@dataclass(frozen=True)
class Case:
    """A kernel, and what makes the list of inputs that it is tried on."""

    kernel: Kernel
    inputs: Callable[[], list[tuple[Array, ...]]]


def landmarks() -> npt.NDArray[np.int32]:
    """+-2^i +- {0, 1, 2} for every i, and the ends of int32."""
    powers = [s * 2**i + d for i in range(32) for s in (1, -1) for d in (-2, -1, 0, 1, 2)]
    return np.array(sorted({p for p in powers if INT32.min <= p <= INT32.max}), np.int32)


def any_int32(shape: Sequence[int], seed: int = 0) -> npt.NDArray[np.int32]:
    """Uniform over all of int32."""
    return np.random.default_rng(seed).integers(INT32.min, INT32.max, shape, np.int32, endpoint=True)


def score_rows(scale: float, seed: int = 0) -> list[Array]:
    """Rows [rows, keys] of int32: differences that matter at this scale, around any level, and those that do not fit int32."""
    rng = np.random.default_rng(seed)
    reach = max(2, round(20 / scale))
    near = rng.integers(0, min(reach, 2**31), (400, 64)) * rng.random((400, 1))
    level = rng.integers(INT32.min, INT32.max, (400, 1), endpoint=True)
    around = np.clip(level - near.astype(np.int64), INT32.min, INT32.max).astype(np.int32)
    sweep = -np.minimum(np.linspace(0, reach, 65536).astype(np.int64), 2**31 - 1).astype(np.int32)
    swept = np.concatenate([np.zeros((1024, 1), np.int32), sweep.reshape(1024, 64)], 1)
    low, high = INT32.min, INT32.max
    ends = np.array([[low, high], [low, low], [high, high], [low, low + 1], [-1, high], [low, 0], [high - 1, high]])
    every = np.stack([np.zeros(256, np.int32), -np.arange(256, dtype=np.int32)], 1)
    two = np.stack([np.zeros(8192, np.int32), sweep[::8] // 4], 1)
    return [around, swept, ends.astype(np.int32), every, every - 2**30, two, landmarks()[None], np.full((3, 7), 5, np.int32)]


def wild_rows() -> list[Array]:
    """10^5 elements anywhere in int32, and one row for each landmark beside both ends."""
    marks = landmarks()
    beside = np.stack([marks, np.full_like(marks, INT32.min), np.roll(marks, 1)], 1)
    return [any_int32((ELEMENTS // 50, 50)), beside, any_int32((1, 1))]


def with_mask(rows: Sequence[Array], seed: int = 1) -> list[tuple[Array, ...]]:
    """The rows with a random mask; of each five rows one is wholly masked and one wholly kept."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Array, ...]] = []
    for row in rows:
        keep = rng.random(row.shape) < 0.6
        keep[::5] = False
        keep[1::5] = True
        pairs.append((row, keep))
    return pairs


def lost_rows(kernel: ISoftmax) -> list[Array]:
    """The longest rows, all keys but one just below what a unit of e is worth."""
    limit = kernel.attributes()["limit"]
    rows = np.repeat(-np.linspace(0.9 * limit, limit, 64).astype(np.int64)[:, None], kernel.longest, 1)
    rows[:, 3] = 0
    return [rows.astype(np.int32)]


def _scored(kernel: IExp | ISoftmax | TableExp) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        rows = score_rows(kernel.scale) + wild_rows() + (lost_rows(kernel) if isinstance(kernel, ISoftmax) else [])
        if isinstance(kernel, TableExp) and kernel.bound < 2**31:
            rows = [np.clip(row, -kernel.bound, kernel.bound) for row in rows]
        return with_mask(rows) if kernel.masked else [(row,) for row in rows]

    return Case(kernel, inputs)


def _gelu(kernel: IGelu) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        reach = round(9 / kernel.scale)
        near, every = np.arange(-reach, reach + 1, dtype=np.int32), np.arange(-255, 256, dtype=np.int32)
        return [(near,), (every,), (landmarks(),), (any_int32((ELEMENTS,)),), (any_int32((2, 3, 5)),)]

    return Case(kernel, inputs)


def _normalise(kernel: INormalise) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        rng = np.random.default_rng(3)
        largest = kernel.room * kernel.multiplier - 1 if kernel.any_length else kernel.room
        total = rng.integers(1, largest, (ELEMENTS // 50, 1), endpoint=True)
        total[:5, 0] = (1, 2, 255, largest - 1, largest)
        context = rng.integers(-255 * total, 255 * total, (len(total), 50), endpoint=True)
        context[:, 0], context[:, 1:2], context[:, 2:3] = 0, 255 * total, -255 * total
        ties = np.arange(1, 1001)[:, None] * 2 * kernel.multiplier  # (odd * total / 2m) * m / total
        halves = ties // (2 * kernel.multiplier) * np.arange(-255, 256, 2)
        empty = np.zeros((1, 50), np.int64), np.zeros((1, 1), np.int64)
        pairs = [(context, total), empty, *([(halves, ties)] if ties.max() <= largest else [])]
        return [tuple(part.astype(np.int32) for part in pair) for pair in pairs]

    return Case(kernel, inputs)


def _table(kernel: Table) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        every = np.arange(256, dtype=np.uint8).view(kernel.input_type)
        return [(every.reshape(4, 64),), (np.random.default_rng(0).permutation(np.repeat(every, 400)).reshape(400, 4, 64),)]

    return Case(kernel, inputs)


def _table_of(name: str, sy: float = 0.03, zy: int = 6, sx: float = 0.04, zx: int = 128, **kinds: Any) -> Case:
    return _table(Table(named(name), sx, zx, sy, zy, **kinds))


CASES: dict[str, Case] = {
    **{f"IExp {s:g}": _scored(IExp(s)) for s in (2.0**-26, 1e-6, 3.9e-5, 4e-5, 3e-4, 2e-3, 2.1e-3, 0.05, 0.11, 1.0)},
    **{f"IExp masked {s:g}": _scored(IExp(s, masked=True)) for s in (1e-6, 3e-4, 0.11)},
    **{f"ISoftmax {s:g}": _scored(ISoftmax(s)) for s in (2.0**-26, 1e-6, 3.9e-5, 4e-5, 3e-4, 2e-3, 2.1e-3, 0.05, 0.11, 1.0)},
    **{f"ISoftmax masked {s:g}": _scored(ISoftmax(s, masked=True)) for s in (1e-6, 3e-4, 0.11)},
    "ISoftmax long": _scored(ISoftmax(4e-5, longest=4096)),
    "ISoftmax short, 1/255": _scored(ISoftmax(4e-5, longest=400, levels=255)),
    **{
        f"IGelu {s:g}": _gelu(IGelu(s))
        for s in (2.0**-13, 3e-4, 1e-3, 3.7e-3, 3.75e-3, 9e-3, 0.01, 0.03, 0.05, 0.091, 0.098, 0.1)
    },
    "IGelu tanh 0.05": _gelu(IGelu(0.05, tanh=True)),
    **{f"INormalise {n}": _normalise(INormalise(0.02, longest=n)) for n in (1, 128, 512, 8192)},
    **{f"INormalise any, {n}": _normalise(INormalise(0.02, longest=n, any_length=True)) for n in (1, 512, 8192)},
    "Table Sigmoid": _table_of("Sigmoid", 1 / 256, 0),
    "Table Silu": _table_of("Silu"),
    "Table Gelu int8 to int8": _table_of("Gelu", zx=-3, zy=-120, input_type=np.int8, output_type=np.int8),
    "Table GeluTanh to int16": _table_of("GeluTanh", 2e-4, 0, output_type=np.int16),
    "Table Tanh to int32": _table_of("Tanh", 1e-9, 0, output_type=np.int32),
    "Table HardSwish": _table_of("HardSwish"),
    "Table HardSigmoid": _table_of("HardSigmoid", 1 / 255, 0),
    "Table Exp saturates": _table_of("Exp", 0.01, 0),
    "Table LeakyRelu": _table_of("LeakyRelu", 0.04, 10),
    **{f"TableExp {s:g}": _scored(TableExp(s)) for s in (2.0**-26, 1e-6, 2.0**-14, 3e-4, 0.05, 0.11, 1.0)},
    **{f"TableExp masked {s:g}": _scored(TableExp(s, masked=True)) for s in (1e-6, 3e-4, 0.11)},
    **{f"TableExp masked near {s:g}": _scored(TableExp(s, masked=True, bound=2**28)) for s in (2.0**-24, 1e-6, 3e-4, 0.11)},
}


def model_of(kernel: Kernel, inputs: Sequence[Array]) -> ModelProto:
    """A model that is one call of the kernel: inputs of any size, the kernel's constants as initializers."""
    names = [f"in{i}" for i in range(len(inputs))]
    constants = kernel.constants()
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in zip(names, inputs, strict=True)
    ]
    kind = kernel.reference(*(value[:1] for value in inputs)).dtype
    rank = max(value.ndim for value in inputs)
    made = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(kind), [None] * rank)
    graph = helper.make_graph(
        [kernel.node(names, ["y"])], "kernel", given, [made], [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    function = kernel.lower()
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(function.domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


def feeds_of(inputs: Sequence[Array]) -> dict[str, Array]:
    """The inputs by the names that `model_of` gives them."""
    return {f"in{i}": value for i, value in enumerate(inputs)}


class GatherElements(OpRun):
    """onnx's own evaluator gives up beyond 32 entries."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis=0 if axis is None else axis),)


def evaluate(model: ModelProto, inputs: Sequence[Array]) -> Array:
    """The output by onnx's reference evaluator; look-ups are written out first, as functions do not see `new_ops`."""
    if any(node.op_type == "GatherElements" for node in model.functions[0].node):
        model = inliner.inline_local_functions(model)
    result = ReferenceEvaluator(model, new_ops=None if model.functions else [GatherElements]).run(None, feeds_of(inputs))
    return np.asarray(result[0])
