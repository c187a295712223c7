"""Exact rescaling against fractions, and against onnxruntime's own kernels at ties and at the ends of the range."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.dyadic import (
    add_requantize,
    along_axis,
    as_dyadic,
    is_exact_dyadic,
    linear_multiplier,
    mul_requantize,
    pool_multiplier,
    product_ratio,
    requantize,
    round_shift,
    sum_ratio,
    tie_free_ratio,
)
from qcompile.errors import ModelError
from qcompile.runtime import Optimisation, Session

Array = npt.NDArray[Any]
INT32 = st.integers(-(2**31), 2**31 - 1)


def half_even(value: Fraction) -> int:
    floor = math.floor(value)
    rest = value - floor
    return floor + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1))


# --- decomposition --------------------------------------------------------------------------------------------


@given(st.floats(min_value=2.0**-149, max_value=2.0**61, width=32))
def test_every_positive_float32_is_b_over_a_power_of_two(m: float) -> None:
    b, c = as_dyadic(np.float32(m))
    assert Fraction(int(b), 2 ** int(c)) == Fraction(m)
    assert int(c) == 0 or int(b) % 2 == 1  # smallest c
    assert bool(is_exact_dyadic(np.float32(m))) == (1 <= int(b) < 2**24 and int(c) <= 16)


@given(st.integers(1, 2**24 - 1), st.integers(0, 16))
def test_all_numbers_of_the_domain_are_exact(b: int, c: int) -> None:
    m = np.float32(b / 2**c)
    assert is_exact_dyadic(m)
    found_b, found_c = as_dyadic(m)
    assert Fraction(int(found_b), 2 ** int(found_c)) == Fraction(b, 2**c)


@pytest.mark.parametrize(
    ("m", "exact"),
    [
        pytest.param(2.0**-16, True, id="smallest"),
        pytest.param(2.0**-17, False, id="c-17"),
        pytest.param(float(2**24 - 1), True, id="largest"),
        pytest.param(float(2**24), False, id="b-2^24"),
        pytest.param(0.1, False, id="one-tenth"),
        pytest.param(0.0, False, id="zero"),
        pytest.param(-0.5, False, id="negative"),
        pytest.param(math.inf, False, id="inf"),
        pytest.param(math.nan, False, id="nan"),
    ],
)
def test_edges_of_the_domain(m: float, exact: bool) -> None:
    assert bool(is_exact_dyadic(np.float32(m))) is exact


@pytest.mark.parametrize("m", [0.0, -1.0, math.inf, math.nan, 2.0**62], ids=str)
def test_multipliers_without_a_decomposition_are_refused(m: float) -> None:
    with pytest.raises(ModelError, match="check the scales"):
        as_dyadic(np.array([0.5, m], np.float32))


def test_shapes_are_kept() -> None:
    m = np.array([[0.5, 0.75], [3.0, 1.0]], np.float32)
    b, c = as_dyadic(m)
    assert b.tolist() == [[1, 3], [3, 1]]
    assert c.tolist() == [[1, 2], [0, 0]]
    assert is_exact_dyadic(m).shape == (2, 2)


@given(*[st.floats(2.0**-20, 2.0**10, width=32)] * 3)
def test_multiplier_rounds_twice(x: float, w: float, y: float) -> None:
    def nearest(value: Fraction) -> Fraction:  # float32 of a positive normal fraction, by hand
        exponent = math.floor(math.log2(value.numerator) - math.log2(value.denominator))
        exponent += 1 if value >= Fraction(2) ** (exponent + 1) else 0
        exponent -= 1 if value < Fraction(2) ** exponent else 0
        unit = Fraction(2) ** (exponent - 23)
        return half_even(value / unit) * unit

    expected = nearest(nearest(Fraction(x) * Fraction(w)) / Fraction(y))
    assert Fraction(float(linear_multiplier(x, w, y))) == expected
    assert Fraction(float(pool_multiplier(x, y, 49))) == nearest(Fraction(x) / nearest(Fraction(y) * 49))


# --- requantize -----------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(INT32, st.integers(1, 2**24 - 1), st.integers(0, 16), st.integers(0, 255))
def test_requantize_is_the_fraction_rounded_half_to_even(acc: int, b: int, c: int, zero: int) -> None:
    expected = min(max(half_even(Fraction(acc * b, 2**c)) + zero, 0), 255)
    assert int(requantize(np.asarray(acc), b, c, zero, 0, 255)) == expected


@settings(max_examples=300)
@given(st.integers(-(2**24), 2**24), st.integers(0, 16), st.integers(-1, 1))
def test_ties_and_their_neighbours(whole: int, c: int, offset: int) -> None:
    value = (whole << c) + (1 << c >> 1) + offset
    assert int(round_shift(np.asarray([value]), c)[0]) == half_even(Fraction(value, 2**c))


def test_requantize_per_channel_equals_channel_by_channel() -> None:
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**20), 2**20, (2, 3, 4, 5))
    b, c, zero = np.array([1, 3, 65535]), np.array([0, 5, 16]), 128
    got = requantize(acc, b, c, zero, 0, 255, axis=1)
    for k in range(3):
        assert np.array_equal(got[:, k], requantize(acc[:, k], int(b[k]), int(c[k]), zero, 0, 255))


@pytest.mark.parametrize(
    ("acc", "b", "c"),
    [
        pytest.param(2**40, 2**24, 0, id="product"),
        pytest.param(1, 1, -1, id="negative-shift"),
        pytest.param(1, 1, 61, id="long-shift"),
    ],
)
def test_requantize_refuses_what_int64_cannot_hold(acc: int, b: int, c: int) -> None:
    with pytest.raises(ModelError, match="int64"):
        requantize(np.asarray([acc]), b, c, 0, -128, 127)


def test_requantize_of_nothing() -> None:
    assert requantize(np.zeros((0, 3), np.int32), 1, 1, 0, 0, 255).shape == (0, 3)


def test_along_axis() -> None:
    assert along_axis(np.arange(3), 4, 1).shape == (1, 3, 1, 1)
    assert along_axis(np.arange(3), 4, -1).shape == (1, 1, 1, 3)
    assert along_axis(2.0, 4, None).shape == ()


# --- tie-free ratios ------------------------------------------------------------------------------------------


@given(st.integers(0, 127), st.integers(1, 255), st.integers(1, 255), st.floats(2.0**-8, 4.0, width=32))
def test_constructed_ratios_are_found(half: int, pa: int, pb: int, scale: float) -> None:
    q = 2 * half + 1
    sc = np.float32(scale)
    sa, sb = (np.float32(np.float64(sc) * p / q) for p in (pa, pb))
    found = sum_ratio(sa, sb, sc)
    if pa + pb > 8 * q:  # beyond what the error bound allows, only honesty is asked for
        assert found is None or found[0] <= q
        return
    assert found is not None
    assert [Fraction(p, found[0]) for p in found[1]] == [Fraction(pa, q), Fraction(pb, q)]


@settings(max_examples=200)
@given(
    st.one_of(st.floats(2.0**-7, 2.0, width=32), st.integers(1, 510).map(lambda p: p / 255)),
    st.one_of(st.floats(2.0**-7, 2.0, width=32), st.integers(1, 510).map(lambda p: p / 255)),
    st.integers(-255, 255),
    st.integers(-255, 255),
)
def test_accepted_ratios_never_come_near_a_tie(ra: float, rb: float, a: int, b: int) -> None:
    found = tie_free_ratio([np.float32(ra), np.float32(rb)])
    if found is None:
        return
    q, (pa, pb) = found
    exact = Fraction(a * pa + b * pb, q)
    given_ = a * Fraction(float(np.float32(ra))) + b * Fraction(float(np.float32(rb)))
    distance = abs(exact - math.floor(exact) - Fraction(1, 2))
    assert distance >= Fraction(1, 2 * q)
    assert abs(exact - given_) < distance
    assert int(add_requantize(np.asarray(a), np.asarray(b), pa, pb, q, 3)) == half_even(exact) + 3
    assert half_even(given_) == half_even(exact)


@settings(max_examples=200)
@given(st.integers(-255, 255), st.integers(-255, 255), st.integers(1, 2000), st.integers(0, 511))
def test_product_requantize_is_the_fraction(a: int, b: int, p: int, half: int) -> None:
    q = 2 * half + 1
    got = int(mul_requantize(np.asarray(a), np.asarray(b), p, q, -5))
    assert got == half_even(Fraction(a * b * p, q)) - 5


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        pytest.param([1.0, 1.0], (1, [1, 1]), id="one"),
        pytest.param([0.5, 1.0], None, id="a-half-ties"),
        pytest.param([1 / 3, 2 / 3], (3, [1, 2]), id="thirds"),
        pytest.param([0.6180339887], None, id="no-small-q"),
        pytest.param([0.0], None, id="zero"),
        pytest.param([math.nan, 1.0], None, id="nan"),
        pytest.param([], None, id="none"),
        pytest.param([1000 + 500 / 1023, 1000.0], None, id="error-above-the-margin"),
    ],
)
def test_tie_free_ratio(ratios: list[float], expected: tuple[int, list[int]] | None) -> None:
    assert tie_free_ratio([np.float32(r) for r in ratios]) == expected


# --- the same as onnxruntime ----------------------------------------------------------------------------------


def _operator(op: str, inputs: dict[str, Array], fed: dict[str, Array], kind: int, **attributes: Any) -> Array:
    """One QLinear operator on constants and feeds, with onnxruntime."""
    domain = "" if op in ("QLinearConv", "QLinearMatMul") else "com.microsoft"
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), ["y"], domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in fed.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(v, n) for n, v in inputs.items() if n not in fed],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return Session(model, optimisation=Optimisation.ALL).run(fed)["y"]


def _tie_heavy(b: int, c: int, rng: np.random.Generator) -> Array:
    """Accumulators that land on ties, next to ties, on and beyond both ends of 8 bits, and at the ends of int32."""
    near = np.arange(-600, 600, dtype=np.int64) * 2**c // (2 * b)  # acc*b/2^c in steps of a half
    ends = np.array([-(2**31) + 64, 2**31 - 64, 2**24, 2**24 + 1, -(2**24) - 1, 0, 1, -1])
    some = rng.integers(-(2**26), 2**26, 200)
    acc = np.concatenate([near - 1, near, near + 1, ends, some])
    return np.asarray(np.clip(acc, -(2**31), 2**31 - 1))


MULTIPLIERS = [
    (1, 1),
    (3, 2),
    (1, 4),
    (5, 3),
    (1, 16),
    (65, 16),
    (40503, 16),
    (3, 0),
    (255, 8),
    (2**23 - 1, 16),
]


@pytest.mark.parametrize(("b", "c"), MULTIPLIERS, ids=lambda v: str(v))
@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("op", ["QGemm", "QLinearConv"])
def test_onnxruntime_rescales_alike(op: str, kind: str, b: int, c: int) -> None:
    """The accumulator comes in as the bias, so that every int32 value can be tried."""
    rng = np.random.default_rng(b + c)
    acc = _tie_heavy(b, c, rng)
    multiplier = np.float32(b / 2**c)
    found_b, found_c = as_dyadic(linear_multiplier(np.float32(0.5), multiplier, np.float32(0.5)))
    for zero in (np.iinfo(kind).min, 3, np.iinfo(kind).max):
        x: Array = np.full((1, 1), zero, kind)
        half, stored = np.asarray(np.float32(0.5)), np.asarray(zero, kind)
        w: Array = np.zeros((acc.size, 1), np.int8)
        bias = acc.astype(np.int32)
        out_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        ends = {"ws": np.asarray(multiplier), "wz": np.asarray(np.int8(0))}
        out = {"ys": half, "yz": stored}
        if op == "QGemm":
            inputs = {"x": x, "xs": half, "xz": stored, "w": w, **ends, "b": bias, **out}
            got = _operator(op, inputs, {"x": x}, out_type, transB=1)
        else:
            x, w = x.reshape(1, 1, 1, 1), w.reshape(-1, 1, 1, 1)
            inputs = {"x": x, "xs": half, "xz": stored, "w": w, **ends, **out, "b": bias}
            got = _operator(op, inputs, {"x": x}, out_type)
        expected = requantize(acc, found_b, found_c, zero, np.iinfo(kind).min, np.iinfo(kind).max)
        assert np.array_equal(got.ravel(), expected)


@pytest.mark.parametrize(("b", "c"), MULTIPLIERS, ids=lambda v: str(v))
def test_onnxruntime_matmul_rescales_alike(b: int, c: int) -> None:
    rng = np.random.default_rng(7)
    x, w = rng.integers(0, 256, (200, 6), dtype=np.uint8), rng.integers(-64, 65, (6, 50), dtype=np.int8)
    scale = np.float32(b / 2**c)
    constants = {"xs": np.float32(1), "xz": np.uint8(120), "w": w, "ws": scale, "wz": np.int8(0)}
    inputs = {"x": x, **{k: np.asarray(v) for k, v in constants.items()}}
    inputs |= {"ys": np.asarray(np.float32(1)), "yz": np.asarray(np.uint8(100))}
    got = _operator("QLinearMatMul", inputs, {"x": x}, TensorProto.UINT8)
    acc = (x.astype(np.int64) - 120) @ w.astype(np.int64)
    expected = np.array([[min(max(half_even(Fraction(int(v) * b, 2**c)) + 100, 0), 255) for v in r] for r in acc])
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("q", [1, 3, 51, 255, 1023])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_onnxruntime_adds_and_multiplies_alike(op: str, q: int) -> None:
    """Every pair of 8-bit operands, ratios p/q near one."""
    rng = np.random.default_rng(q)
    a, b = (v.astype(np.uint8).reshape(256, 256) for v in np.divmod(np.arange(1 << 16), 256))
    sc = np.float32(0.0371)
    pa, pb = max(1, q * 2 // 3), q
    za, zb, zc = 120, int(rng.integers(0, 256)), 117
    if op == "QLinearAdd":
        sa, sb = (np.float32(np.float64(sc) * p / q) for p in (pa, pb))
        found = sum_ratio(sa, sb, sc)
    else:
        sa = np.float32(0.021)
        sb = np.float32(np.float64(sc) * pa / q / 50 / np.float64(sa))
        found = product_ratio(sa, sb, sc)
        if found is None:  # p/q/50 needs a q of its own
            sb = np.float32(np.float64(sc) / np.float64(sa) * max(1, q // 100) / q)
            found = product_ratio(sa, sb, sc)
    assert found is not None
    constants = {
        "as": sa,
        "az": np.uint8(za),
        "b": b,
        "bs": sb,
        "bz": np.uint8(zb),
        "cs": sc,
        "cz": np.uint8(zc),
    }
    inputs = {"a": a, **{k: np.asarray(v) for k, v in constants.items()}}
    got = _operator(op, inputs, {"a": a, "b": b}, TensorProto.UINT8)
    x, y = a.astype(np.int64) - za, b.astype(np.int64) - zb
    if op == "QLinearAdd":
        expected = add_requantize(x, y, found[1][0], found[1][1], found[0], zc)
    else:
        expected = mul_requantize(x, y, found[1][0], found[0], zc)
    assert np.array_equal(got, np.clip(expected, 0, 255))
