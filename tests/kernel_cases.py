"""Kernels at the ends and in the middle of their domains, and the inputs that each is tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.kernels import (
    ChannelTable,
    DyadicRescale,
    FusedRescale,
    IDivide,
    IExp,
    IExpLevels,
    IGelu,
    ILayerNorm,
    INormalise,
    IRmsNorm,
    ISoftmax,
    ISqrt,
    RatioRescale,
    Table,
    TableExp,
)
from qcompile.kernels._functions import named
from qcompile.kernels._protocol import Array, Kernel

INT32 = np.iinfo(np.int32)
ELEMENTS = 100_000


@dataclass(frozen=True)
class Case:
    """A kernel, and what makes the list of inputs that it is tried on."""

    kernel: Kernel
    inputs: Callable[[], list[tuple[Array, ...]]]
    slack: float = 8.0  # how far above the largest error that is seen the tolerance may lie
    long_ops: frozenset[str] = frozenset({"Constant", "Shape"})  # operators that may compute in int64
    runtime_only: bool = False  # made of onnxruntime's own operators, with a float multiplier
    row_sums: bool = False  # MatMul over rows: needs an onnxruntime that can multiply no rows


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
        if isinstance(kernel, TableExp | IExpLevels) and kernel.bound < 2**31:
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


def _divide(kernel: IDivide) -> Case:
    """Halves of both signs with their neighbours, the largest sums by the smallest and the largest counts, counts below 1."""

    def inputs() -> list[tuple[Array, ...]]:
        rng = np.random.default_rng(5)
        most = kernel.most
        count = rng.integers(1, most, (ELEMENTS // 50, 1), endpoint=True) >> rng.integers(0, 30, (ELEMENTS // 50, 1))
        count[:6, 0] = (1, 2, 3, most - 1, most, 128)
        halves = (2 * rng.integers(-(2**12), 2**12, (len(count), 25)) + 1) * count // 2
        near = np.clip(halves + rng.integers(-1, 1, halves.shape, endpoint=True), -most, most)
        anywhere = rng.integers(-most, most, (len(count), 23), endpoint=True)
        ends = np.repeat([[-most, most]], len(count), 0)
        masked = np.zeros((4, 1, 3), np.int64), np.array([0, -1, INT32.min, 1]).reshape(4, 1, 1)  # nothing to count
        pairs = [(np.concatenate([near, anywhere, ends], 1), count), masked]
        return [tuple(part.astype(np.int32) for part in pair) for pair in pairs]

    return Case(kernel, inputs)


def _table(kernel: Table) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        every = np.arange(256, dtype=np.uint8).view(kernel.input_type)
        return [(every.reshape(4, 64),), (np.random.default_rng(0).permutation(np.repeat(every, 400)).reshape(400, 4, 64),)]

    return Case(kernel, inputs)


def _table_of(name: str, sy: float = 0.03, zy: int = 6, sx: float = 0.04, zx: int = 128, **kinds: Any) -> Case:
    return _table(Table(named(name), sx, zx, sy, zy, **kinds))


def _channel_table(name: str, axis: int = -1, zx: int = 128, zy: int = 6, **kinds: Any) -> Case:
    """Every input in every channel; channels of three kinds, in no order."""
    numbers = ((0.04, 0.0, 1.0), (0.01, -1.3, 0.25), (0.16, 3.0, 2.0**-0.5))
    kernel = ChannelTable(named(name), 1.0, zx, 0.03, zy, numbers, (2, 0, 1, 1, 0), axis, **kinds)

    def inputs() -> list[tuple[Array, ...]]:
        every = np.arange(256, dtype=np.uint8).view(kernel.input_type)
        behind = [3] * (-axis - 1)
        rows = np.repeat(every, 5).reshape(256, 5, *[1] * len(behind))
        shuffled = np.random.default_rng(0).choice(every, (40, 5, *behind))
        return [(rows,), (shuffled,), (shuffled.reshape(2, 20, 5, *behind),)]

    return Case(kernel, inputs)


def ties(numerator: int, denominator: int, bits: int, seed: int = 0) -> Array:
    """x [1, n] int32 next to where x numerator / denominator is k + 1/2, k inside and just beyond `bits` bits, and landmarks."""
    rng = np.random.default_rng(seed)
    odd = 2 * rng.integers(-(2**bits) - 4, 2**bits + 4, 4000).astype(object) + 1
    near = odd * denominator // (2 * numerator)
    every = np.concatenate([near, near + 1, near - 1, landmarks().astype(object)])
    return np.clip(every, INT32.min, INT32.max).astype(np.int32).reshape(1, -1)


def _slack(numerator: int, denominator: int) -> float:
    """Multiples of whole numbers have no fraction, and of those beyond 2 few that 8 bits hold have one."""
    return inf if numerator % denominator == 0 or numerator > 2 * denominator else 8.0


def _rescale(kernel: DyadicRescale, shape: Sequence[int] = (), **more: Any) -> Case:
    """Ties of the first channel, every int32; `shape`: of tensors with the channels of `kernel`, where it has several."""

    def inputs() -> list[tuple[Array, ...]]:
        bits = min(np.iinfo(kernel.dtype).bits, 31)
        if shape:
            everywhere = any_int32(shape)
            return [(everywhere,), (everywhere >> np.random.default_rng(1).integers(0, 32, shape, np.int32),)]
        return [(ties(kernel.b[0], 1 << kernel.c[0], bits),), (any_int32((200, ELEMENTS // 200)),), (any_int32((4, 500)) >> 9,)]

    return Case(kernel, inputs, _slack(min(kernel.b), 1 << max(kernel.c)), **more)


def _ratio(kernel: RatioRescale) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        return [(ties(kernel.p, kernel.q, 8),), (any_int32((200, ELEMENTS // 200)),), (any_int32((2, 3, 5)),)]

    return Case(kernel, inputs, _slack(kernel.p, kernel.q))


def roots(wide: bool) -> Array:
    """All small numbers, 2^k and squares with their neighbours, the largest, random ones of every size, [n] int32 or int64."""
    bits = 63 if wide else 31
    top = 2**bits - 1
    rng = np.random.default_rng(0)
    whole = rng.integers(1, isqrt(top), 20_000, endpoint=True)
    parts = [
        np.arange(66_000),
        [min(2**k + d, top) for k in range(2, bits + 1) for d in (-2, -1, 0, 1, 2)],
        whole**2,
        whole**2 - 1,
        rng.integers(0, top, ELEMENTS, endpoint=True) >> rng.integers(0, bits, ELEMENTS),
        [isqrt(top) ** 2, isqrt(top) ** 2 - 1, top],
    ]
    return np.concatenate([np.asarray(p, np.int64) for p in parts]).astype(np.int64 if wide else np.int32)


#: What ISqrtWide computes in 64 bits: everything.
_ROOT_OPS = frozenset({"Add", "Cast", "Constant", "Div", "MatMul", "Sub", "Unsqueeze"})


def _root(wide: bool) -> Case:
    long_ops = _ROOT_OPS if wide else frozenset({"Constant"})
    return Case(ISqrt(wide), lambda: [(roots(wide),), (roots(wide)[:900].reshape(3, 1, 300),)], long_ops=long_ops, row_sums=True)


def norm_rows(d: int, bits: int, count: int = 150) -> Array:
    """Rows of every size and offset, one outlier, constant, ends against ends, and neighbours at the lowest value."""
    rng = np.random.default_rng(bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    size = 10.0 ** rng.uniform(0, bits * 0.3, (count, 1))
    outlier = np.zeros((24, d), np.int64)
    outlier[np.arange(24), rng.integers(0, d, 24)] = [(-1) ** i * min(high, 5 ** (i % 14)) for i in range(24)]
    constant = np.repeat([[0], [1], [low], [high]], d, 1)
    one_high = np.full((2, d), low)
    one_high[:, 0] = (high, low + 1)
    parts = [
        rng.integers(low, high, (count, d), endpoint=True) >> rng.integers(0, bits, (count, 1)),
        rng.normal(0, 1, (count, d)) * size + rng.integers(low, high, (count, 1)) * (rng.random((count, 1)) < 0.5),
        outlier,
        constant,
        one_high,
        np.where(rng.random((6, d)) < 0.5, low, high),
        low + (rng.random((6, d)) < 0.3),
        rng.normal(0, high / 6, (count, d)),
    ]
    whole = np.concatenate([np.rint(p).astype(np.float64).clip(low, high).astype(np.int64) for p in parts])
    return whole.astype(np.int32)


def grudging_rows(d: int) -> Array:
    """One value of 2^20, the others +-m: the rounding of all of them errs the same way for some m, and moves sigma most."""
    m = np.linspace(2**20 / d, 2**20 / np.sqrt(d) * 2, 400).astype(np.int64)
    row = np.where(np.arange(d) % 2 == 1, 1, -1) * m[:, None]
    row[:, 0] = 2**20
    return row.astype(np.int32)


def norm_of(
    norm: type[ILayerNorm] | type[IRmsNorm], d: int, bits: int, dtype: str, step: float, zero: int
) -> ILayerNorm | IRmsNorm:
    """Channels with gammas of both signs, one of them 0, and betas."""
    rng = np.random.default_rng(d)
    gamma = rng.normal(1, 0.5, d)
    gamma[: min(2, d)] = (-1.5, 0.0)[: min(2, d)]
    beta = tuple(rng.normal(0, 0.5, d))
    return norm(1e-3, tuple(gamma), step, beta, zero, dtype, input_bits=bits)


#: Numbers a row, not of the tensor: the sum of squares, its root and sigma; and the limbs of the squares.
_NORM_OPS = _ROOT_OPS | {"Identity", "Mul", "Shape", "Where"}


def _norm(norm: type[ILayerNorm] | type[IRmsNorm], d: int, bits: int, dtype: str, step: float, zero: int = 0) -> Case:
    def inputs() -> list[tuple[Array, ...]]:
        grudging = [(grudging_rows(d),)] if bits == 32 and d > 16 else []
        return [(norm_rows(d, bits, 150 if d < 500 else 25),), *grudging]

    return Case(norm_of(norm, d, bits, dtype, step, zero), inputs, slack=40.0, long_ops=_NORM_OPS, row_sums=True)


_CHANNELS = tuple(2**k // 3 + 1 for k in range(1, 25)), tuple(k % 17 for k in range(24))  # b and c

CASES: dict[str, Case] = {
    **{
        f"DyadicRescale {b}/2^{c}": _rescale(DyadicRescale((b,), (c,), 131))
        for b, c in ((1, 0), (3, 1), (65, 16), (2**24 - 1, 22))
    },
    "ChannelTable Gelu": _channel_table("Gelu"),
    "ChannelTable Sigmoid int8 to int8, maps": _channel_table("Sigmoid", -3, -5, -120, input_type=np.int8, output_type=np.int8),
    "ChannelTable Gelu to int32": _channel_table("Gelu", zy=0, output_type=np.int32),
    "DyadicRescale int8": _rescale(DyadicRescale((77,), (9,), -128, "int8")),
    "DyadicRescale int16": _rescale(DyadicRescale((12345,), (14,), -7, "int16")),
    "DyadicRescale channels": _rescale(DyadicRescale(*_CHANNELS, 128), (3, 40, 24)),
    "DyadicRescale channels, one c": _rescale(DyadicRescale(_CHANNELS[0], (16,), 128, axis=-3), (2, 24, 9, 7)),
    "DyadicRescale with a bias": _rescale(DyadicRescale((77,), (9,), 131, bias=(-4321,))),
    "DyadicRescale int16 with a bias": _rescale(DyadicRescale((12345,), (14,), -7, "int16", bias=(99,))),
    "DyadicRescaleWide uint8": _rescale(DyadicRescale((12_345_677,), (24,), 7)),
    "DyadicRescaleWide int32": _rescale(DyadicRescale((65,), (16,), 0, "int32")),
    "FusedRescale": _rescale(FusedRescale((65,), (16,), 131), runtime_only=True),
    "FusedRescale int8": _rescale(FusedRescale((77,), (9,), -128, "int8"), runtime_only=True),
    "FusedRescale channels": _rescale(FusedRescale(*_CHANNELS, 128), (3, 40, 24), runtime_only=True),
    "FusedRescale matrix": _rescale(FusedRescale(*_CHANNELS, 128, columns=24), (400, 24), runtime_only=True),
    "FusedRescale matrix int8, one b": _rescale(FusedRescale((77,), (9,), -128, "int8", columns=7), (900, 7), runtime_only=True),
    **{f"RatioRescale {p}/{q}": _ratio(RatioRescale(p, q, 131)) for p, q in ((1, 1), (1, 1023), (7, 255), (10**9, 3))},
    "RatioRescale int8": _ratio(RatioRescale(5, 1023, -128, "int8")),
    "ISqrt": _root(False),
    "ISqrt wide": _root(True),
    **{f"IExp {s:g}": _scored(IExp(s)) for s in (2.0**-26, 1e-6, 3.9e-5, 4e-5, 3e-4, 2e-3, 2.1e-3, 0.05, 0.11, 1.0)},
    **{f"IExpLevels {s:g}": _scored(IExpLevels(s)) for s in (2.0**-26, 3.9e-5, 4e-5, 3e-4, 2.1e-3, 0.11, 1.0)},
    **{f"IExpLevels masked {s:g}": _scored(IExpLevels(s, True)) for s in (1e-6, 3e-4, 0.11)},
    **{f"IExpLevels near {s:g}": _scored(IExpLevels(s, True, 2**28)) for s in (1e-6, 3e-4, 0.11)},
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
    **{f"IDivide {s:g}": _divide(IDivide(s)) for s in (1.0, 2.0**-20)},
    "Table Sigmoid": _table_of("Sigmoid", 1 / 256, 0),
    "Table Silu": _table_of("Silu"),
    "Table Gelu int8 to int8": _table_of("Gelu", zx=-3, zy=-120, input_type=np.int8, output_type=np.int8),
    "Table GeluTanh to int16": _table_of("GeluTanh", 2e-4, 0, output_type=np.int16),
    "Table Tanh to int32": _table_of("Tanh", 1e-9, 0, output_type=np.int32),
    "Table HardSwish": _table_of("HardSwish"),
    "Table HardSigmoid": _table_of("HardSigmoid", 1 / 255, 0),
    "Table Exp saturates": _table_of("Exp", 0.01, 0),
    "Table LeakyRelu": _table_of("LeakyRelu", 0.04, 10),
    **{
        f"{norm.__name__} {d} of {bits} bits to {dtype}": _norm(norm, d, bits, dtype, step, zero)
        for norm in (ILayerNorm, IRmsNorm)
        for d, bits, dtype, step, zero in (
            (1, 32, "uint8", 8 / 255, 120),
            (64, 16, "uint8", 8 / 255, 120),
            (64, 32, "int16", 2.0**-12, 0),
            (600, 16, "int32", 2.0**-11, 0),
        )
    },
    **{f"TableExp {s:g}": _scored(TableExp(s)) for s in (2.0**-26, 1e-6, 2.0**-14, 3e-4, 0.05, 0.11, 1.0)},
    **{f"TableExp masked {s:g}": _scored(TableExp(s, masked=True)) for s in (1e-6, 3e-4, 0.11)},
    **{f"TableExp masked near {s:g}": _scored(TableExp(s, masked=True, bound=2**28)) for s in (2.0**-24, 1e-6, 3e-4, 0.11)},
}
