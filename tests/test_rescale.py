"""The written-out rescale against fractions: every tie, both ends of int32, every c; with optimisation off and on."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from qcompile.dyadic import linear_multiplier
from qcompile.graph import Array, Graph, Value
from qcompile.kernels import DyadicRescale, RatioRescale
from qcompile.kernels._protocol import Kernel
from qcompile.passes._rescale import common_shift, dyadic_rescale, ratio_rescale
from qcompile.passes.lower_integer import shadow
from qcompile.runtime import Optimisation, Session

EXTREMES = [-(2**31), -(2**31) + 1, -(2**30), -1, 0, 1, 2**30, 2**31 - 1]


@cache
def _examples(dtype: str) -> dict[str, DyadicRescale]:
    """A kernel of each form."""
    made = [DyadicRescale((b,), (c,), zero, dtype) for b, c in ((1, 1), (513, 10), (4, 1)) for zero in (0, 1)]
    return {kernel.name: kernel for kernel in made}


@cache
def sessions(kind: str, elem_type: int) -> tuple[Session, Session]:
    """A call with everything fed at run time: optimisation off, and on. kind: RatioRescale, or a form of DyadicRescale."""
    kinds = {"RatioRescale": TensorProto.INT32}
    dtype = "uint8" if elem_type == TensorProto.UINT8 else "int8"
    kernel: Kernel = RatioRescale(1, 1, 0, dtype) if kind == "RatioRescale" else _examples(dtype)[kind]
    call = kernel.node(["x"], ["y"], constants=["b", "c", "zero"])
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.INT32, ["n", "m"]),
        helper.make_tensor_value_info("b", TensorProto.INT32, [] if kind == "RatioRescale" else ["n", 1]),
        helper.make_tensor_value_info("c", kinds.get(kind, TensorProto.UINT32), []),
        helper.make_tensor_value_info("zero", TensorProto.INT32, []),
    ]
    graph = helper.make_graph([call], "g", inputs, [helper.make_tensor_value_info("y", elem_type, ["n", "m"])])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[kernel.lower()], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return Session(model, optimisation=Optimisation.OFF), Session(model)


def half_even(value: Fraction) -> int:
    return round(value)  # Python rounds fractions half to even


def around_ties(b: int, c: int) -> list[int]:
    """Accumulators whose product lies at, just below and just above a half, and at the ends of 8 bits."""
    found = []
    for target in (0, 1, 2, 3, 127, 128, 255, 256, 257):
        middle = Fraction(2 * target + 1, 2) * Fraction(1 << c, b)
        found += [int(middle) + d for d in (-1, 0, 1)]
    return [v for a in found for v in (a, -a) if abs(v) < 2**31]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), c=st.integers(1, 20), unsigned=st.booleans())
def test_dyadic_rescale_is_the_fraction(data: st.DataObject, c: int, unsigned: bool) -> None:
    most = min(1 << (c + 8), (1 << 24) - 1)
    numbers = st.one_of(st.integers(1, 64), st.integers(1, most), st.integers(1, 1 << c), st.just(most))
    factors = data.draw(st.lists(numbers, min_size=1, max_size=4))
    low, high = (0, 255) if unsigned else (-128, 127)
    zero = data.draw(st.integers(low, high))
    rows = []
    for b in factors:
        reach = min(2**31 - 1, 300 * (1 << c) // b + 2)
        drawn = data.draw(st.lists(st.integers(-reach, reach), min_size=20, max_size=20))
        row = [*EXTREMES, *around_ties(b, c), *drawn]
        rows.append(row)
    width = min(len(r) for r in rows)
    x = np.asarray([r[:width] for r in rows], np.int32)
    expected = [
        [min(max(half_even(Fraction(int(v) * b, 1 << c)) + zero, low), high) for v in row]
        for row, b in zip(x, factors, strict=True)
    ]
    feeds = {"x": x, "b": np.asarray(factors, np.int32)[:, None], "c": np.uint32(c), "zero": np.int32(zero)}
    feeds = {k: np.asarray(v) for k, v in feeds.items()}
    form = DyadicRescale(tuple(factors), (c,), zero, "uint8" if unsigned else "int8", axis=-2).name
    for session in sessions(form, TensorProto.UINT8 if unsigned else TensorProto.INT8):
        np.testing.assert_array_equal(session.run(feeds)["y"].astype(np.int64), expected)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), half_q=st.integers(0, 511), unsigned=st.booleans())
def test_ratio_rescale_is_the_fraction(data: st.DataObject, half_q: int, unsigned: bool) -> None:
    q = 2 * half_q + 1
    p = data.draw(st.one_of(st.integers(1, 256 * q), st.just(256 * q), st.just(1)))
    low, high = (0, 255) if unsigned else (-128, 127)
    zero = data.draw(st.integers(low, high))
    reach = 300 * q // p + 2
    x = np.asarray([[*EXTREMES, *data.draw(st.lists(st.integers(-reach, reach), min_size=40, max_size=40))]], np.int32)
    expected = [[min(max(half_even(Fraction(int(v) * p, q)) + zero, low), high) for v in x[0]]]
    feeds = {"x": x, "b": np.asarray(p, np.int32), "c": np.asarray(q, np.int32), "zero": np.asarray(zero, np.int32)}
    for session in sessions("RatioRescale", TensorProto.UINT8 if unsigned else TensorProto.INT8):
        np.testing.assert_array_equal(session.run(feeds)["y"].astype(np.int64), expected)


def built(kind: str, unsigned: bool = True) -> ModelProto:
    graph = Graph.from_proto(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Identity", ["x"], ["t"])],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.INT32, ["n"])],
                [helper.make_tensor_value_info("t", TensorProto.INT32, ["n"])],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=7,
        )
    )
    elem_type = TensorProto.UINT8 if unsigned else TensorProto.INT8
    result = Value("y", helper.make_tensor_type_proto(elem_type, ["n"]))
    if kind == "dyadic":
        dyadic_rescale(graph, graph.inputs[0], np.asarray(3, np.int32), 2, 5, result, elem_type, "n", {"source": "conv"})
    else:
        ratio_rescale(graph, graph.inputs[0], 10**9, 3, 5, result, elem_type, "n", {"source": "conv"})
    graph.outputs = [result]
    graph.cleanup()
    return graph.to_proto()


@pytest.mark.parametrize("unsigned", [True, False], ids=["u8", "s8"])
@pytest.mark.parametrize("kind", ["dyadic", "ratio"])
def test_the_call_holds_its_body_and_its_source(kind: str, unsigned: bool) -> None:
    model = built(kind, unsigned)
    onnx.checker.check_model(model)
    node = next(n for n in model.graph.node if n.domain == "qcompile")
    assert {p.key: p.value for p in node.metadata_props} == {"qcompile.source": "conv"}
    assert model.ir_version >= 8 and [f.name for f in model.functions] == [node.op_type] and model.functions[0].doc_string
    x = np.asarray([-(2**31), -3, -2, -1, 0, 1, 2, 3, 2**31 - 1], np.int32)
    low, high = (0, 255) if unsigned else (-128, 127)
    scale = Fraction(3, 4) if kind == "dyadic" else Fraction(256)  # 10^9/3 saturates as 256 does
    expected = [min(max(half_even(int(v) * scale) + 5, low), high) for v in x]
    for run in (Session(model).run, lambda f: {"y": onnx.reference.ReferenceEvaluator(model).run(None, f)[0]}):
        np.testing.assert_array_equal(run({"x": x})["y"].astype(int), expected)


@pytest.mark.parametrize(
    ("multiplier", "b", "c"),
    [
        (np.float32(0.5), 1, 1),
        (np.float32(3), 6, 1),
        (np.asarray([0.5, 0.75, 2.0**-16], np.float32), [1 << 15, 3 << 14, 1], 16),
        (np.asarray([1000.0, 2.0**-4], np.float32), [256 << 4, 1], 4),  # beyond 256 every accumulator saturates
        (np.float32(2**23), 512, 1),
        (np.asarray([1000.0, 2.0**-16], np.float32), [2**24 - 1, 1], 16),  # 256 less 2^-16: 255.99998 rounds to 256 as well
    ],
    ids=["half", "whole", "channels", "capped", "capped_alone", "capped_finest"],
)
def test_one_shift_for_all_channels(multiplier: Array, b: object, c: int) -> None:
    got_b, got_c = common_shift(np.asarray(multiplier))
    assert got_b.dtype == np.int32 and got_c == c
    np.testing.assert_array_equal(got_b, np.asarray(b))


@settings(max_examples=60, deadline=None)
@given(half_q=st.integers(0, 511), left=st.integers(1, 4000), right=st.integers(1, 4000))
def test_the_shadow_of_a_sum_rounds_as_the_sum(half_q: int, left: int, right: int) -> None:
    q = 2 * half_q + 1
    factors = shadow([left, right], q)
    if factors is None:
        assert left + right > 8 * q or min(left, right) * 2**21 < q or q > 900, "refused without need"
        return
    a, b = np.meshgrid(np.arange(-255, 256, dtype=np.int64), np.arange(-255, 256, dtype=np.int64))
    exact = (2 * (a * left + b * right) + q) // (2 * q)
    total = a * factors[0] + b * factors[1]
    assert np.abs(total).max() < 2**31
    np.testing.assert_array_equal((total + (1 << 19)) >> 20, exact)
    assert not (total % (1 << 20) == 1 << 19).any(), "a tie: half to even would matter"


def test_multipliers_of_a_layer_need_no_float() -> None:
    """b / 2^c is the float32 multiplier to the last bit."""
    rng = np.random.default_rng(0)
    sw = np.exp2(rng.integers(-9, 3, 50)).astype(np.float32) * rng.integers(1, 63, 50).astype(np.float32)
    multiplier = linear_multiplier(np.float32(0.25), sw, np.float32(4))
    b, c = common_shift(multiplier)
    assert all(Fraction(float(m)) == Fraction(int(v), 1 << c) for m, v in zip(multiplier, b, strict=True))
