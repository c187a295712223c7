"""Dyadic rescale, written out and fused, against fractions and each other, on inputs that are full of ties."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_models import assert_lowered_equals_reference, assert_other_evaluators_agree, element_types
from onnx import TensorProto, helper

from qcompile.kernels._protocol import Array
from qcompile.kernels.rescale import DyadicRescale, FusedRescale

MOST = 2**24 - 1
MULTIPLIERS = [
    (1, 0),
    (3, 1),
    (1, 16),
    (65, 16),
    (12345, 14),
    (77, 9),
    (2**23 + 1, 16),
    (MOST, 16),
    (MOST, 0),
    (1, 22),
    (2**20 + 1, 22),
]
LONG = [(MOST, 31), (1, 31), (12_345_677, 24), (2**20, 31), (3, 17)]
TYPES = [
    ("uint8", 0),
    ("uint8", 131),
    ("uint8", 255),
    ("int8", -128),
    ("int8", 127),
    ("int16", -7),
    ("uint16", 40_000),
    ("int32", 0),
]


def accumulators(b: int, c: int, reach: int, count: int = 20_000) -> Array:
    """Ties and their neighbours inside and just beyond the output, +-2^i, the ends of int32, and `count` of every size."""
    rng = np.random.default_rng(b + c)
    odd = 2 * rng.integers(-(2**reach) - 4, 2**reach + 4, 4000).astype(object) + 1
    near = np.array([int(v) * 2**c // (2 * b) for v in odd], object)
    powers = np.array([s * 2**i + d for i in range(32) for s in (1, -1) for d in (-2, -1, 0, 1, 2)], object)
    spread = rng.integers(-(2**31), 2**31, count) >> rng.integers(0, 32, count)
    every = np.concatenate([near, near + 1, near - 1, powers, spread.astype(object)])
    return np.clip(every, -(2**31), 2**31 - 1).astype(np.int32).reshape(1, -1)


def reach_of(dtype: str) -> int:
    return min(np.iinfo(dtype).bits, 31)


@pytest.mark.parametrize(("dtype", "zero"), TYPES, ids=lambda v: str(v))
@pytest.mark.parametrize(("b", "c"), MULTIPLIERS + LONG, ids=lambda v: str(v))
def test_lowered_equals_reference(b: int, c: int, dtype: str, zero: int) -> None:
    kernel = DyadicRescale((b,), (c,), zero, dtype)
    x = accumulators(b, c, reach_of(dtype))
    assert_lowered_equals_reference(kernel, x)
    assert_other_evaluators_agree(kernel, x[:, ::40])


@pytest.mark.parametrize(("dtype", "zero"), TYPES[:5], ids=lambda v: str(v))
@pytest.mark.parametrize(("b", "c"), [m for m in MULTIPLIERS if m[1] <= 16], ids=lambda v: str(v))
def test_fused_equals_reference(b: int, c: int, dtype: str, zero: int) -> None:
    assert_lowered_equals_reference(FusedRescale((b,), (c,), zero, dtype), accumulators(b, c, 8))


@pytest.mark.parametrize("kernel", [DyadicRescale, FusedRescale], ids=["written", "fused"])
def test_hundred_thousand_random_accumulators(kernel: type[DyadicRescale]) -> None:
    x = np.random.default_rng(5).integers(-(2**31), 2**31, (200, 500)).astype(np.int32)
    for b in (3, 77):  # 8 bits hold almost none of them at a larger multiplier
        assert_lowered_equals_reference(kernel((b,), (16,), 128), x >> 9)
        assert_lowered_equals_reference(kernel((b,), (16,), 128), x)


def test_every_accumulator_inside_the_output_range() -> None:
    """b = 65, c = 16 and u8: all acc from saturation to saturation."""
    reach = 2**24 // 65 + 9
    x = np.arange(-reach, reach, dtype=np.int32).reshape(2, -1)
    for kernel in (DyadicRescale, FusedRescale):
        assert_lowered_equals_reference(kernel((65,), (16,), 128), x)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32"])
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(-1, (3, 40, 24)), (-3, (2, 24, 9, 7)), (-1, (24,)), (-1, (0, 24))],
    ids=["last", "NCHW", "vector", "empty"],
)
def test_per_channel(dtype: str, axis: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    b = tuple(int(v) for v in np.maximum(rng.integers(1, 2**24, 24) >> rng.integers(0, 24, 24), 1))
    c = tuple(int(v) for v in rng.integers(0, 17, 24))
    x = (rng.integers(-(2**31), 2**31, shape) >> rng.integers(0, 32, shape)).astype(np.int32)
    kernel = DyadicRescale(b, c, 0, dtype, axis)
    assert_lowered_equals_reference(kernel, x)
    if dtype in ("uint8", "int8") and axis == -1:
        assert_lowered_equals_reference(FusedRescale(b, c, 0, dtype), x)
    channels = np.moveaxis(x, axis, 0).reshape(24, -1)
    each = [DyadicRescale((b[i],), (c[i],), 0, dtype).reference(channels[i]) for i in range(24)]
    np.testing.assert_array_equal(np.moveaxis(kernel.reference(x), axis, 0).reshape(24, -1), each)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, MOST), st.integers(0, 16), st.sampled_from(TYPES))
def test_reference_is_half_to_even_in_fractions(acc: int, b: int, c: int, kind: tuple[str, int]) -> None:
    dtype, zero = kind
    ends = np.iinfo(dtype)
    expected = min(max(round(Fraction(acc * b, 2**c)) + zero, int(ends.min)), int(ends.max))
    assert int(DyadicRescale((b,), (c,), zero, dtype).reference(np.array([acc], np.int32))[0]) == expected


@given(st.integers(1, MOST), st.integers(0, 16), st.integers(-300, 300), st.sampled_from(TYPES))
def test_reference_is_half_to_even_at_ties(b: int, c: int, k: int, kind: tuple[str, int]) -> None:
    """The accumulators next to (k + 1/2) / M."""
    dtype, zero = kind
    tie = round(Fraction((2 * k + 1) * 2**c, 2 * b))
    accs = np.array([tie - 1, tie, tie + 1], np.int32)
    ends = np.iinfo(dtype)
    expected = [min(max(round(Fraction(int(a) * b, 2**c)) + zero, int(ends.min)), int(ends.max)) for a in accs]
    assert DyadicRescale((b,), (c,), zero, dtype).reference(accs).tolist() == expected


@given(st.integers(1, MOST), st.integers(0, 31), st.sampled_from([t for t, _ in TYPES]))
@example(MOST, 22, "uint8")
@example(MOST, 0, "int16")
@example(1, 14, "int16")
def test_bounds_of_the_written_form_hold_for_every_multiplier(b: int, c: int, dtype: str) -> None:
    """What the lowering computes, at its largest, in Python's integers."""
    kernel = DyadicRescale((b,), (c,), 0, dtype)
    made = {name: int(value) for name, value in kernel.constants().items()}
    b, c = made["b"], made["c"]
    end = 2 ** reach_of(dtype) << c
    if kernel.takes_bias:
        below, span = 2 ** (c - 1) - 1, 2 ** reach_of(dtype) - 1
        assert c >= 1 and b <= 2**c and span * 2**c + below < end <= 2**30
        for zero in (0, 1, span // 2, span):  # zero point - low
            most, least = ((span - zero) * 2**c + below) // b, (zero * 2**c + below) // b
            low, high = least * -b + zero * 2**c + below, most * b + zero * 2**c + below
            assert low >= 0 and high + 1 < end + 2**c <= 2**32 and low >> c == 0 and (high + 1) >> c == span
            assert round(Fraction(most * b, 2**c)) == span - zero and round(Fraction(least * b, 2**c)) == zero
        return
    steep = kernel.name == "DyadicRescaleSteep"
    limit = -(-end // b) if steep else made["limit"]
    assert c >= 1 and limit * b < end + b
    assert limit == 2**31 or limit * b >= end
    if steep:
        assert end <= 2**30 and b <= end and limit < 2**31
        assert end + b - 1 < 2**31 and limit * b < 2**31
        lift = 2 * end
        assert lift >> c == 2 ** (reach_of(dtype) + 1) and lift - limit * b >= 0
        assert lift + limit * b + 2 ** (c - 1) - 1 + 1 < 2**32


BIASED = [
    (b, c, zero, dtype)
    for b, c in [(1, 16), (65, 16), (16384, 16), (12345, 14), (77, 9), (1, 1), (513, 10), (65535, 16)]
    for dtype, zero in [("uint8", 0), ("uint8", 131), ("int8", -128), ("int8", 3), ("int16", -7), ("uint16", 40_000)]
    if c <= 14 or dtype.endswith("8")
]


@pytest.mark.parametrize(("b", "c", "zero", "dtype"), BIASED, ids=lambda v: str(v))
def test_a_bias_is_added_exactly(b: int, c: int, zero: int, dtype: str) -> None:
    """No sum wraps, also where acc + bias leaves int32."""
    accs = accumulators(b, c, reach_of(dtype), 500).reshape(1, -1)
    ends = np.iinfo(dtype)
    for bias in (1, -1, 12_345, -(2**30), 2**30, 2 ** (c - 1)):
        kernel = DyadicRescale((b,), (c,), zero, dtype, bias=(bias,))
        x = np.clip(accs.astype(np.int64) - bias, -(2**31), 2**31 - 1).astype(np.int32)  # so that sums lie at ties again
        assert_lowered_equals_reference(kernel, x)
        some = x.reshape(-1)[::37]
        expected = [min(max(round(Fraction((int(v) + bias) * b, 2**c)) + zero, int(ends.min)), int(ends.max)) for v in some]
        assert kernel.reference(some).tolist() == expected


def test_a_bias_a_channel() -> None:
    rng = np.random.default_rng(2)
    bias = tuple(int(v) for v in rng.integers(-(2**20), 2**20, 24))
    b = tuple(int(v) for v in rng.integers(1, 2**16, 24))
    x = rng.integers(-(2**22), 2**22, (2, 24, 9, 7)).astype(np.int32)
    kernel = DyadicRescale(b, (16,), 128, axis=-3, bias=bias)
    assert kernel.name.endswith("Biased")
    assert_lowered_equals_reference(kernel, x)
    plain = DyadicRescale(b, (16,), 128, axis=-3)
    np.testing.assert_array_equal(kernel.reference(x), plain.reference(x + np.array(bias, np.int32).reshape(24, 1, 1)))


@given(st.integers(1, 2**12), st.integers(1, 12), st.integers(0, 255))
def test_untied_is_what_has_no_tie(b: int, c: int, zero: int) -> None:
    """Every accumulator whose result is not saturated, in Python's integers."""
    b = min(b, 2**c)
    inside = range(-(256 * 2**c // b) - 1, 256 * 2**c // b + 2)
    ties = [
        a
        for a in inside
        if (2 * a * b) % 2**c == 0 and (a * b) % 2**c and 0 <= Fraction(a * b, 2**c) + zero + Fraction(1, 2) <= 256
    ]
    strictly = [a for a in ties if 0 < Fraction(a * b, 2**c) + zero + Fraction(1, 2) < 256]
    name = DyadicRescale((b,), (c,), zero).name
    assert not (strictly and "Untied" in name)
    assert ties or "Untied" in name


def test_reference_is_within_half_a_step_of_the_oracle() -> None:
    for b, c in MULTIPLIERS + LONG:
        for dtype, zero in TYPES:
            kernel = DyadicRescale((b,), (c,), zero, dtype)
            x = accumulators(b, c, reach_of(dtype))
            worst = np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max()
            assert worst <= kernel.tolerance == 0.5
            assert worst > 0.45 or 4 * b > 2**c, "such a multiplier has fractions of every kind"


def test_thirty_two_bits_alone() -> None:
    x = np.zeros((2, 3), np.int32)
    for c, dtype in ((16, "uint8"), (14, "int16"), (31, "int32")):
        kinds = element_types(DyadicRescale((77,), (c,), 0, dtype), x)
        assert kinds == {TensorProto.INT32, TensorProto.UINT32, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (0,)}, "b 0 is outside"),
        ({"b": (2**24,)}, r"b 1.67772e\+07 is outside"),
        ({"c": (32,)}, "c 32 is outside"),
        ({"c": (-1,)}, "c -1 is outside"),
        ({"b": (1, 2), "c": (1, 1, 1)}, "2 numerators and 3 shifts"),
        ({"b": (), "c": ()}, "0 numerators"),
        ({"dtype": "float32"}, "output type 'float32'"),
        ({"zero_point": 256}, "zero point 256 is outside"),
        ({"dtype": "int32", "zero_point": 1}, "zero point 1 is outside"),
        ({"axis": 1}, "axis 1: count it from the end"),
        ({"b": (3,), "bias": (1,)}, "a bias: only multipliers up to 1"),
        ({"c": (31,), "bias": (1,)}, "a bias: only multipliers up to 1"),
        ({"bias": (2**30 + 1,)}, r"bias 1.07374e\+09 is outside"),
    ],
    ids=lambda v: str(v),
)
def test_outside_the_domain_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyadicRescale(**{"b": (1,), "c": (1,), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": (17,)}, "c 17 is outside"),
        ({"dtype": "int16"}, "output type 'int16'"),
        ({"axis": -3}, "axis -3"),
        ({"b": (1, 2), "columns": 3}, "3 columns: there are multipliers for 2"),
        ({"bias": (1,)}, "a bias: add it before"),
    ],
    ids=["shift", "type", "axis", "columns", "bias"],
)
def test_outside_the_fused_domain_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedRescale(**{"b": (1,), "c": (1,), **change})
