"""Ties: models whose ranges make every scale a power of two, in all formats, against integers computed here."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exactness_helpers import (
    Ints,
    assert_exact,
    integer_weights,
    signed,
    tie_feed,
    unsigned,
    with_ranges,
)
from onnx import ModelProto, numpy_helper
from passes_helpers import parse

from qcompile.graph import Array

# --- ties: models whose ranges make every scale a power of two ------------------------------------------------


def constants(model: ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def node_of(model: ModelProto, op: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in model.graph.node if n.op_type == op)
    return found


def half_even(acc: Ints, multiplier: Array, zero_point: int) -> tuple[Array, float]:
    """Round acc * M half to even in integers: the uint8 values, and the share of exact ties among all that do not saturate."""
    b = np.asarray(multiplier, np.float64) * 65536
    assert np.array_equal(b, np.rint(b)), "a multiplier is not b / 2^16"
    quotient, rest = np.divmod(acc * b.astype(np.int64), 65536)
    tie = rest == 32768
    rounded = quotient + ((rest > 32768) | (tie & (quotient % 2 == 1))) + zero_point
    inside = (rounded > 0) & (rounded < 255)
    return np.clip(rounded, 0, 255).astype(np.uint8), float((tie & inside).mean())


def convolve(x: Ints, w: Ints, group: int) -> Ints:
    """Convolution of padded `x` [N, C, H, W] with `w` [M, C/group, kh, kw], stride 1, no padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    xs, ws = np.split(windows, group, axis=1), np.split(w, group, axis=0)
    return np.concatenate([np.einsum("nchwij,mcij->nmhw", a, b) for a, b in zip(xs, ws, strict=True)], axis=1)


KINDS = {"dense_3x3": (4, 4, 3, 1), "dense_1x1": (16, 8, 1, 1), "depthwise_3x3": (8, 1, 3, 8), "grouped_3x3": (8, 2, 3, 4)}


@pytest.mark.parametrize("source", ["signed", "unsigned"])
@pytest.mark.parametrize("result", ["signed", "relu"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_ties_of_convolutions(kind: str, source: str, result: str) -> None:
    rng = np.random.default_rng(7)
    channels, depth, size, group = KINDS[kind]
    integers = integer_weights(rng, (channels, depth, size, size), 0, 1)
    # Sw = 2^-7 .. 2^-10 and 3 * 2^-9 (M = 3/4 * 2^-1): multipliers 1/2, 1/4, 1/8, 3/8
    scales = np.resize([2.0**-7, 2.0**-8, 2.0**-9, 3 * 2.0**-9], channels)
    offset = rng.integers(-9, 10, channels)
    model = parse(
        f"""g (float[N, {depth * group}, 9, 9] x) => (float[N, {channels}, p, p] y) {{
            c = Conv<group: int = {group}, pads: ints = [{size // 2}, {size // 2}, {size // 2}, {size // 2}]>(x, w, b)
            y = {"Relu" if result == "relu" else "Identity"}(c)
        }}""",
        w=(integers * scales.reshape(-1, 1, 1, 1)).astype(np.float32),
        b=(offset * scales * 2.0**-4).astype(np.float32),
    )
    ends = signed(-10) if result == "signed" else unsigned(-10)
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4) if source == "signed" else unsigned(-4), "y": ends, "c": ends})
    feed = {"x": tie_feed(rng, (3, depth * group, 9, 9), -4, -3 if source == "signed" else 0, 3)}
    y = assert_exact(qdq, qoperator, [feed])[0]["y"]

    values, node = constants(qoperator), node_of(qoperator, "QLinearConv")
    sx, zx, w, sw, sy, zy = (values[node.input[i]] for i in (1, 2, 3, 4, 6, 7))
    np.testing.assert_array_equal(w, integers, err_msg="the weights are not those that make ties")
    x = np.clip(np.rint(feed["x"] / sx) + zx, 0, 255).astype(np.int64) - int(zx)
    edge = size // 2
    acc = convolve(np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge))), w.astype(np.int64), group)
    acc += values[node.input[8]].astype(np.int64).reshape(1, -1, 1, 1)
    expected, ties = half_even(acc, (sx * sw / sy).reshape(1, -1, 1, 1), int(zy))
    assert ties > 0.05, f"only {ties:.1%} ties: the test says nothing"
    np.testing.assert_array_equal(y / sy + zy, expected)


@pytest.mark.parametrize("trans", [0, 1], ids=["w", "transposed"])
def test_ties_of_gemm_and_its_float_end(trans: int) -> None:
    """h is an output as well as the second Gemm's input: its DequantizeLinear stays for the graph's end."""
    rng = np.random.default_rng(8)
    first, second = integer_weights(rng, (12, 16), 0, 1), integer_weights(rng, (5, 12), 0, 1)
    scales = np.resize([2.0**-7, 2.0**-8, 2.0**-9], 12)
    weight = (first * scales[:, None]).astype(np.float32)
    model = parse(
        f"""g (float[N, 16] x) => (float[N, 12] h, float[N, 5] y) {{
            h = Gemm<transB: int = {trans}>(x, w, b)
            y = Gemm<transB: int = 1>(h, v)
        }}""",
        w=weight if trans else weight.T.copy(),
        b=(rng.integers(-9, 10, 12) * scales * 2.0**-4).astype(np.float32),
        v=(second * 2.0**-7).astype(np.float32),
    )
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4), "h": signed(-10)})
    feed = {"x": tie_feed(rng, (200, 16), -4, -3, 3)}
    result = assert_exact(qdq, qoperator, [feed])[0]
    values = constants(qoperator)
    nodes = [n for n in qoperator.graph.node if n.op_type == "QGemm"]
    assert [len(n.input) for n in nodes] == [9, 7]
    sx, zx, w, sw, bias, sy, zy = (values[nodes[0].input[i]] for i in (1, 2, 3, 4, 6, 7, 8))
    x = np.clip(np.rint(feed["x"] / sx) + zx, 0, 255).astype(np.int64) - int(zx)
    acc = x @ (w.T if trans else w).astype(np.int64) + bias
    expected, ties = half_even(acc, sx * sw / sy, int(zy))
    assert ties > 0.1
    np.testing.assert_array_equal(result["h"] / sy + zy, expected)
    sh, w, sw, bias = (values[nodes[1].input[i]] for i in (1, 3, 4, 6))
    acc = (expected.astype(np.int64) - int(zy)) @ w.T.astype(np.int64) + bias
    np.testing.assert_array_equal(result["y"], acc.astype(np.float32) * (sh * sw), err_msg="not fl(acc) * fl(Sx*Sw)")


def test_ties_of_global_average_pool() -> None:
    rng = np.random.default_rng(9)
    model = parse(
        """g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] c, float[N, 8, 1, 1] p, float[N, 3] y) {
            c = Conv(x, w)
            p = GlobalAveragePool(c)
            f = Flatten(p)
            y = Gemm<transB: int = 1>(f, v)
        }""",
        w=(integer_weights(rng, (8, 8, 1, 1), 0, 1) * 2.0**-7).astype(np.float32),
        v=rng.normal(size=(3, 8)).astype(np.float32),
    )
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4), "c": signed(-5), "p": signed(-8)})
    feed = {"x": tie_feed(rng, (400, 8, 4, 4), -4, -2, 2)}
    result = assert_exact(qdq, qoperator, [feed])[0]
    values, node = constants(qoperator), node_of(qoperator, "QLinearGlobalAveragePool")
    sx, sy, zy = (values[node.input[i]] for i in (1, 3, 4))
    acc = np.rint(result["c"] / sx).astype(np.int64).sum(axis=(2, 3), keepdims=True)
    expected, ties = half_even(acc, sx / (sy * np.float32(16)), int(zy))
    assert ties > 0.1
    np.testing.assert_array_equal(result["p"] / sy + zy, expected)


@pytest.mark.parametrize(("left", "right", "total"), [(-5, -5, -4), (-5, -6, -5), (-4, -7, -5)])
def test_every_pair_of_an_add_without_ties(left: int, right: int, total: int) -> None:
    """With the ratios 2^k that these ranges ask for, up to half of the sums would tie; the solver must have moved them."""
    model = parse(
        """g (float[1, 1, 256, 256] a, float[1, 1, 256, 256] b) =>
             (float[1, 1, 256, 256] l, float[1, 1, 256, 256] r, float[1, 1, 256, 256] s, float[1, 2, 256, 256] y) {
            l = Conv(a, one)
            r = Conv(b, one)
            s = Add(l, r)
            y = Conv(s, two)
        }""",
        one=np.ones((1, 1, 1, 1), np.float32),
        two=np.asarray([1.0, -0.5], np.float32).reshape(2, 1, 1, 1),
    )
    ranges = {
        "a": signed(left),
        "l": signed(left),
        "b": signed(right),
        "r": signed(right),
        "s": signed(total),
        "y": signed(total),
    }
    qdq, qoperator, _ = with_ranges(model, ranges)
    values, node = constants(qoperator), node_of(qoperator, "QLinearAdd")
    sl, sr, ss, zs = (values[node.input[i]] for i in (1, 4, 6, 7))
    grid = np.arange(-128, 128, dtype=np.int64)
    feed = {
        "a": (np.repeat(grid, 256).reshape(1, 1, 256, 256) * sl).astype(np.float32),
        "b": (np.tile(grid, 256).reshape(1, 1, 256, 256) * sr).astype(np.float32),
    }
    result = assert_exact(qdq, qoperator, [feed])[0]
    a, b = np.rint(result["l"] / sl).astype(np.int64), np.rint(result["r"] / sr).astype(np.int64)
    assert len(np.unique(a * 1000 + b)) > 55_000
    q = next(
        q
        for q in range(1, 1024, 2)
        if all(abs(float(s) / float(ss) * q - round(float(s) / float(ss) * q)) < 1e-4 for s in (sl, sr))
    )
    pa, pb = round(float(sl) / float(ss) * q), round(float(sr) / float(ss) * q)
    assert not ((2 * (a * pa + b * pb)) % (2 * q) == q).any()
    expected = np.clip((2 * (a * pa + b * pb) + q) // (2 * q) + int(zs), 0, 255)
    np.testing.assert_array_equal(np.rint(result["s"] / ss) + zs, expected)
