"""The interpreter against onnxruntime, integer for integer: every operator of the promise, in both formats."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from integer_models import Array, Net, Tensor, dyadic_weight_scale
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import DataError, InputError, ModelError
from qcompile.integer_windows import Window, convolve, exact_matmul, max_pool
from qcompile.interpret import Interpreter
from qcompile.runtime import Optimisation, Session

SX, ZX = 0.0374, 121
SY, ZY = 0.0525, 118
BOTH = pytest.mark.parametrize("layout", ["qdq", "qoperator"])
# Powers of two make ties frequent: 1/2, 1/4, 3/8 ... of an integer; the last two are ordinary.
TIES = [(1, 1), (1, 2), (3, 3), (1, 4), (5, 5), (1, 3), (311, 16), (1207, 16)]


def levels(layout: str) -> list[Optimisation]:
    return [Optimisation.EXTENDED, Optimisation.ALL] + ([Optimisation.OFF] if layout == "qoperator" else [])


def samples(shape: tuple[int, ...], scale: float = SX, zero: int = ZX) -> list[Array]:
    """Random, saturating, and tie-heavy inputs: the last lie exactly between two integers."""
    rng = np.random.default_rng(3)
    ties = (rng.integers(-128, 128, shape) + 0.5).astype(np.float32) * np.float32(scale)
    extremes = rng.choice(np.array([-1e9, -zero * scale, 0.0, (255 - zero) * scale, 1e9]), shape)
    return [
        np.asarray(v, np.float32)
        for v in (rng.standard_normal(shape), ties, extremes, rng.uniform(-5, 5, shape), np.zeros(shape))
    ]


def same(model: onnx.ModelProto, feeds: list[dict[str, Array]], layout: str, exact: bool = True) -> Interpreter:
    """Assert equality with onnxruntime at every promised level, types and shapes included."""
    interpreter = Interpreter(model)
    sessions = [Session(model, optimisation=level) for level in levels(layout)]
    for feed in feeds:
        got = interpreter.run(feed)
        for session in sessions:
            expected = session.run(feed)
            assert list(got) == list(expected)
            for name, value in expected.items():
                assert got[name].dtype == value.dtype
                assert got[name].shape == value.shape
                assert np.array_equal(got[name], value), f"{np.sum(got[name] != value)} of {value.size} differ"
    if exact:
        assert interpreter.float_nodes == []
    return interpreter


def weights(shape: tuple[int, ...], limit: int = 63) -> Array:
    """|w| <= 63: products do not saturate in pairs on a machine without VNNI either."""
    return np.random.default_rng(5).integers(-limit, limit + 1, shape).astype(np.int8)


def bias(channels: int, spread: int = 3000) -> Array:
    return np.random.default_rng(6).integers(-spread, spread, channels).astype(np.int32)


# --- convolution ----------------------------------------------------------------------------------------------

CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "dense": ((1, 3, 9, 8), (8, 3, 3, 3), {}),
    "batch": ((3, 4, 6, 6), (8, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "1x1": ((2, 5, 7, 7), (8, 5, 1, 1), {}),
    "1x1-stride": ((1, 5, 7, 7), (8, 5, 1, 1), {"strides": [2, 2]}),
    "depthwise": ((1, 8, 9, 9), (8, 1, 3, 3), {"group": 8, "pads": [1, 1, 1, 1]}),
    "depthwise-stride": ((1, 8, 9, 9), (8, 1, 3, 3), {"group": 8, "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "multiplier": ((1, 4, 9, 9), (8, 1, 3, 3), {"group": 4}),
    "grouped": ((2, 6, 9, 9), (8, 3, 3, 3), {"group": 2, "pads": [1, 0, 1, 0]}),
    "asymmetric": ((1, 3, 9, 8), (8, 3, 3, 2), {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    "dilated": ((1, 3, 12, 11), (8, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 1, 2, 3]}),
    "same-upper": ((1, 3, 9, 8), (8, 3, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same-lower": ((1, 3, 8, 8), (8, 3, 3, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ((1, 3, 9, 8), (8, 3, 3, 3), {"auto_pad": "VALID"}),
    "1d": ((2, 3, 20), (8, 3, 5), {"pads": [2, 2], "strides": [2]}),
}


@BOTH
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_conv(case: tuple[Any, Any, dict[str, Any]], with_bias: bool, layout: str) -> None:
    shape, kernel, attributes = case
    net = Net(layout)
    x = net.input(list(shape), SX, ZX)
    y = net.linear(
        "Conv", x, weights(kernel), TIES, (SY, ZY), bias(8) if with_bias else None,
        kernel_shape=list(kernel[2:]), **attributes,
    )  # fmt: skip
    same(net.model(y.name), [{"x0": v} for v in samples(shape)], layout)


@BOTH
@pytest.mark.parametrize("multiplier", [(1, 1), (3, 4), (77, 16)], ids=str)
def test_conv_per_tensor_scale(multiplier: tuple[int, int], layout: str) -> None:
    net = Net(layout)
    x = net.input([1, 3, 6, 6], SX, ZX)
    y = net.linear("Conv", x, weights((8, 3, 3, 3)), [multiplier], (SY, 0), bias(8))
    same(net.model(y.name), [{"x0": v} for v in samples((1, 3, 6, 6))], layout)


@pytest.mark.parametrize("zero", [-128, 0, 7], ids=str)
def test_conv_int8_activations(zero: int) -> None:
    net = Net("qoperator", "int8")
    x = net.input([1, 3, 6, 6], SX, zero)
    y = net.linear("Conv", x, weights((8, 3, 3, 3)), TIES, (SY, zero), bias(8), pads=[1, 1, 1, 1])
    same(net.model(y.name), [{"x0": v} for v in samples((1, 3, 6, 6))], "qoperator")


@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_conv_with_a_clamp_that_is_the_range(op: str) -> None:
    """Zero point 0: the clamp is folded into the saturation, by the runtime and here."""
    net = Net("qdq")
    x = net.input([1, 3, 6, 6], SX, ZX)
    y = net.linear("Conv", x, weights((8, 3, 3, 3)), TIES, (SY, 0), bias(8), after="Relu")
    if op == "Clip":
        relu = next(n for n in net.nodes if n.op_type == "Relu")
        relu.op_type = "Clip"
        relu.input.extend([net.const(0.0), net.const(np.float32(SY) * 255)])
    same(net.model(y.name), [{"x0": v} for v in samples((1, 3, 6, 6))], "qdq")


def test_clamp_inside_the_range() -> None:
    """Here the runtime computes in float, so the oracle is the integer formula."""
    net = Net("qdq")
    x = net.input([1, 3, 6, 6], SX, ZX)
    y = net.linear("Conv", x, weights((8, 3, 3, 3)), TIES, (SY, 40), bias(8), after="Relu")
    relu = next(n for n in net.nodes if n.op_type == "Relu")
    with_relu = net.model(y.name)
    relu.op_type = "Clip"
    relu.input.extend([net.const(-1.0), net.const(2.0)])
    with_clip = net.model(y.name)
    relu.op_type = "Identity"
    del relu.input[1:]
    plain = net.model(y.name)
    for value in samples((1, 3, 6, 6)):
        expected = Interpreter(plain).run({"x0": value})[y.name]
        relued, clipped = (Interpreter(m).run({"x0": value})[y.name] for m in (with_relu, with_clip))
        assert np.array_equal(relued, np.maximum(expected, 40))
        low, high = 40 + round(-1.0 / SY), 40 + round(2.0 / SY)
        assert np.array_equal(clipped, np.clip(expected, low, high))


def test_average_pool_as_a_depthwise_convolution_of_ones() -> None:
    for layout in ("qdq", "qoperator"):
        net = Net(layout)
        x = net.input([1, 4, 6, 6], SX, ZX)
        ones = np.ones((4, 1, 2, 2), np.int8)
        y = net.linear("Conv", x, ones, [(1, 2)], (SX, ZX), group=4, strides=[2, 2])
        same(net.model(y.name), [{"x0": v} for v in samples((1, 4, 6, 6))], layout)


# --- products -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("transposed", [0, 1], ids=["B", "B-transposed"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_gemm(with_bias: bool, transposed: int, layout: str) -> None:
    net = Net(layout)
    x = net.input([5, 30], SX, ZX)
    w = weights((8, 30) if transposed else (30, 8))
    y = net.linear("Gemm", x, w, TIES, (SY, ZY), bias(8) if with_bias else None, transB=transposed)
    same(net.model(y.name), [{"x0": v} for v in samples((5, 30))], layout)


@BOTH
def test_gemm_that_ends_in_float(layout: str) -> None:
    """Logits: fl(acc) * fl(Sx*Sw), equal to the last bit."""
    net = Net(layout)
    x = net.input([5, 300], SX, ZX)
    y = net.linear("Gemm", x, weights((8, 300)), TIES, None, bias(8, 1 << 26), transB=1)
    model = net.model(y.name, types={y.name: TensorProto.FLOAT})
    same(model, [{"x0": v} for v in samples((5, 300))], layout)


@BOTH
@pytest.mark.parametrize("shape", [(5, 30), (2, 5, 30), (2, 3, 5, 30)], ids=str)
def test_matmul(shape: tuple[int, ...], layout: str) -> None:
    net = Net(layout)
    x = net.input(list(shape), SX, ZX)
    y = net.linear("MatMul", x, weights((30, 8)), TIES, (SY, ZY))
    same(net.model(y.name), [{"x0": v} for v in samples(shape)], layout)


@BOTH
def test_matmul_of_two_activations(layout: str) -> None:
    net = Net(layout)
    sy = 0.75
    a, b = net.input([2, 4, 6], 0.25, ZX), net.input([2, 6, 5], 0.75, 100)  # M = 1/4
    if layout == "qdq":
        y = net.q(net.node("MatMul", [net.dq(a), net.dq(b)]), sy, ZY)
    else:
        out = net.ends(Tensor("", sy, ZY))
        y = Tensor(net.node("QLinearMatMul", [a.name, *net.ends(a), b.name, *net.ends(b), *out]), sy, ZY)
    feeds = [{"x0": u, "x1": v} for u, v in zip(samples((2, 4, 6), 0.25), samples((2, 6, 5), 0.75), strict=True)]
    same(net.model(y.name), feeds, layout)


def test_qgemm_as_requantiser_of_a_full_int32_tensor() -> None:
    net = Net("qoperator")
    net.inputs.append(helper.make_tensor_value_info("acc", TensorProto.INT32, [40, 8]))
    x = Tensor(net.const(np.zeros((40, 1)), np.uint8), SX, 0)
    y = net.linear("Gemm", x, np.zeros((1, 8), np.int8), TIES, (SY, ZY), np.zeros((40, 8), np.int32))
    next(n for n in net.nodes if n.op_type == "QGemm").input[6] = "acc"
    acc = np.random.default_rng(0).integers(-4000, 4000, (40, 8)).astype(np.int32)
    same(net.model(y.name), [{"acc": acc}, {"acc": acc * 100000}], "qoperator")


def test_int4_weights_behind_a_cast() -> None:
    for layout in ("qdq", "qoperator"):
        net = Net(layout, opset=21)
        x = net.input([1, 3, 6, 6], SX, ZX)
        w = weights((8, 3, 3, 3), 7)
        y = net.linear("Conv", x, w, TIES, (SY, ZY), bias(8))
        index = next(i for i, t in enumerate(net.constants) if list(t.dims) == [8, 3, 3, 3])
        name = net.constants[index].name
        net.constants[index] = helper.make_tensor("packed", TensorProto.INT4, w.shape, w.ravel())
        net.nodes.insert(0, helper.make_node("Cast", ["packed"], [name], "unpack", to=TensorProto.INT8))
        same(net.model(y.name), [{"x0": v} for v in samples((1, 3, 6, 6))], layout)


# --- sums, products, pools ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("other", [(1, 6, 5, 5), (1, 6, 1, 1)], ids=["alike", "broadcast"])
def test_tie_free_pairs(other: tuple[int, ...], op: str, layout: str) -> None:
    q = 255
    sc = 0.0371
    sa = float(np.float32(sc * (201 if op == "Add" else 1) / q))
    sb = float(np.float32(sc * 143 / q)) if op == "Add" else float(np.float32(2.0))
    net = Net(layout)
    a, b = net.input([1, 6, 5, 5], sa, 100), net.input(list(other), sb, 130)
    y = net.pair(op, a, b, sc, 117)
    shapes = zip(samples((1, 6, 5, 5), sa, 100), samples(other, sb, 130), strict=True)
    same(net.model(y.name), [{"x0": u, "x1": v} for u, v in shapes], layout)


@BOTH
@pytest.mark.parametrize("size", [(4, 4), (7, 7), (1, 3)], ids=str)
def test_global_average_pool(size: tuple[int, int], layout: str) -> None:
    """The scale of the input is sought so that fl(Sx/fl(Sy*HW)) is dyadic."""
    count = np.float32(size[0] * size[1])
    sy = np.float32(0.0523)
    wide = sy * count
    target = np.float32(round(65536 / count) / 65536) if size != (4, 4) else np.float32(1 / 16)
    candidates = [np.float32(wide * target)]
    candidates += [np.nextafter(candidates[0], np.float32(t)) for t in (0, 9)]
    sx = next(s for s in candidates if np.float32(s / wide) == target)
    net = Net(layout)
    x = net.input([2, 6, *size], float(sx), ZX)
    y = net.pool(x, float(sy), 60)
    same(net.model(y.name), [{"x0": v} for v in samples((2, 6, *size))], layout)


# --- movement -------------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "reshape": lambda n, x: n.move("Reshape", x, n.const([0, -1, 2], np.int64)),
    "flatten": lambda n, x: n.move("Flatten", x, axis=2),
    "transpose": lambda n, x: n.move("Transpose", x, perm=[0, 2, 3, 1]),
    "squeeze": lambda n, x: n.move("Squeeze", x, n.const([0], np.int64)),
    "unsqueeze": lambda n, x: n.move("Unsqueeze", x, n.const([1, 5], np.int64)),
    "slice": lambda n, x: n.move("Slice", x, *(n.const(v, np.int64) for v in ([1, -1], [9, -99], [1, 3], [2, -1]))),
    "gather": lambda n, x: n.move("Gather", x, n.const([3, 0, -1], np.int64), axis=1),
    "max-pool": lambda n, x: n.move("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "max-pool-ceil": lambda n, x: n.move("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "max-pool-ceil-pad": lambda n, x: n.move(
        "MaxPool", x, kernel_shape=[3, 2], strides=[3, 2], pads=[1, 1, 1, 1], ceil_mode=1
    ),
    "max-pool-same": lambda n, x: n.move(
        "MaxPool", x, kernel_shape=[2, 3], strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "depth-to-space": lambda n, x: n.move("DepthToSpace", x, blocksize=2),
    "depth-to-space-crd": lambda n, x: n.move("DepthToSpace", x, blocksize=2, mode="CRD"),
    "resize": lambda n, x: n.move(
        "Resize", x, "", n.const([1, 1, 2, 2]), mode="nearest", coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "resize-half-pixel": lambda n, x: n.move("Resize", x, "", "", n.const([1, 8, 9, 13], np.int64)),
    "resize-align": lambda n, x: n.move(
        "Resize", x, "", "", n.const([1, 8, 9, 3], np.int64), coordinate_transformation_mode="align_corners",
        nearest_mode="ceil",
    ),
    "identity": lambda n, x: n.move("Identity", x),
    "pad": lambda n, x: (
        n.move("Pad", x, n.const([0, 1, 2, 0, 0, 0, 1, 3], np.int64), n.const(0.0))
        if n.layout == "qdq"
        else n.move("Pad", x, n.const([0, 1, 2, 0, 0, 0, 1, 3], np.int64), n.const(x.zero, n.kind))
    ),
    "pad-crop": lambda n, x: n.move("Pad", x, n.const([0, 0, -1, 0, 0, 0, 0, -2], np.int64)),
    "pad-reflect": lambda n, x: n.move("Pad", x, n.const([0, 0, 1, 2, 0, 0, 1, 0], np.int64), mode="reflect"),
    "pad-edge": lambda n, x: n.move("Pad", x, n.const([0, 0, 1, 2, 0, 0, 1, 0], np.int64), mode="edge"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_movement(move: Callable[[Net, Tensor], Tensor], layout: str) -> None:
    net = Net(layout)
    y = move(net, net.input([1, 8, 6, 7], SX, ZX))
    same(net.model(y.name), [{"x0": v} for v in samples((1, 8, 6, 7))], layout)


@BOTH
@pytest.mark.parametrize("op", ["Concat", "Max", "Min"])
def test_joins_on_one_scale(op: str, layout: str) -> None:
    net = Net(layout)
    a, b = net.input([1, 2, 3, 3], SX, ZX), net.input([1, 2, 3, 3], SX, ZX)
    attributes: dict[str, Any] = {"axis": 1} if op == "Concat" else {}
    if layout == "qdq":
        y = net.q(net.node(op, [net.dq(a), net.dq(b)], **attributes), SX, ZX)
    else:
        y = Tensor(net.node(op, [a.name, b.name], **attributes), SX, ZX)
    values = samples((1, 2, 3, 3))
    feeds = [{"x0": u, "x1": v} for u, v in zip(values, reversed(values), strict=True)]
    same(net.model(y.name), feeds, layout)


def test_qlinear_concat_with_unequal_zero_points_only() -> None:
    net = Net("qoperator")
    a, b = net.input([1, 2, 3], SX, ZX), net.input([1, 2, 3], SX, 100)
    ends = net.ends(Tensor("", SX, 90))
    parts = [a.name, *net.ends(a), b.name, *net.ends(b)]
    y = net.node("QLinearConcat", [*ends, *parts], domain="com.microsoft", axis=1)
    values = samples((1, 2, 3))
    same(net.model(y), [{"x0": u, "x1": v} for u, v in zip(values, reversed(values), strict=True)], "qoperator")


def test_scalar_shape_arithmetic() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (int32[N, 4] x) => (int32[M] y) <int64 zero = {0}, int64 four = {4}, int64[1] axes = {0}>
        {
            shape = Shape(x)
            n = Gather(shape, zero)
            total = Mul(n, four)
            target = Unsqueeze(total, axes)
            y = Reshape(x, target)
        }""")
    same(model, [{"x": np.arange(12, dtype=np.int32).reshape(3, 4)}], "qoperator")


def test_split_and_shape_arithmetic() -> None:
    net = Net("qdq")
    x = net.input(["n", 6, 4], SX, ZX)
    shape = net.node("Slice", [net.node("Shape", [x.name]), *(net.const([v], np.int64) for v in (0, 1))])
    target = net.node("Concat", [shape, net.const([-1], np.int64)], axis=0)
    net.nodes.append(helper.make_node("Split", [net.dq(x)], ["s0", "s1"], "split", axis=1))
    outs = [net.q(net.node("Reshape", [s, target]), SX, ZX).name for s in ("s0", "s1")]
    same(net.model(*outs), [{"x0": v} for v in samples((3, 6, 4))], "qdq")


# --- the ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
def test_quantize_as_onnxruntime(kind: str) -> None:
    net = Net("qdq", kind, opset=21)
    x = net.input([1, 2, 500], SX, 3)
    y = net.dq(x)
    model = net.model(x.name, y, types={y: TensorProto.FLOAT})
    same(model, [{"x0": v} for v in samples((1, 2, 500), SX, 3)], "qoperator")


def test_quantize_per_axis_and_without_zero_point() -> None:
    net = Net("qdq", opset=21)
    net.inputs.append(helper.make_tensor_value_info("x0", TensorProto.FLOAT, [2, 3, 4]))
    scales, zeros = net.const([0.1, 0.2, 0.3]), net.const([1, 2, 3], np.uint8)
    a = net.node("QuantizeLinear", ["x0", scales, zeros], axis=1)
    b = net.node("QuantizeLinear", ["x0", net.const(0.1)])
    c = net.node("QuantizeLinear", ["x0", net.const(0.1)], output_dtype=TensorProto.INT8)
    d = net.node("DequantizeLinear", [a, scales, zeros], axis=1)
    model = net.model(a, b, c, d, types={c: TensorProto.INT8, d: TensorProto.FLOAT})
    same(model, [{"x0": v} for v in samples((2, 3, 4))], "qoperator")


def test_uint8_graph_input_and_int32_end() -> None:
    net = Net("qoperator")
    x = net.input([4, 6], SX, ZX, integer=True)
    acc = net.node("MatMulInteger", [x.name, net.const(weights((6, 5)), np.int8), net.const(ZX, np.uint8)])
    y = net.node("DequantizeLinear", [acc, net.const([0.1, 0.2, 0.3, 0.4, 0.5])], axis=1)
    model = net.model(acc, y, types={acc: TensorProto.INT32, y: TensorProto.FLOAT})
    feed = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    same(model, [{"x0": feed}], "qoperator")


def test_float_head_is_named() -> None:
    net = Net("qdq")
    x = net.input([5, 30], SX, ZX)
    y = net.linear("Gemm", x, weights((30, 8)), TIES, None, bias(8))
    head = net.node("Softmax", [y.name], name="head")
    model = net.model(head, types={head: TensorProto.FLOAT})
    interpreter = same(model, [{"x0": v} for v in samples((5, 30))], "qdq", exact=False)
    assert interpreter.float_nodes == ["head"]


def test_float_in_the_middle_runs_and_is_named() -> None:
    net = Net("qdq")
    x = net.input([2, 5, 30], SX, ZX)
    norm = net.node("LayerNormalization", [net.dq(x), net.const(np.ones(30)), net.const(np.zeros(30))], name="norm")
    y = net.linear("MatMul", net.q(norm, SX, ZX), weights((30, 8)), TIES, (SY, ZY))
    interpreter = same(net.model(y.name), [{"x0": samples((2, 5, 30))[0]}], "qdq", exact=False)
    assert interpreter.float_nodes == ["norm"]


@pytest.mark.parametrize("op", ["Conv", "Add", "GlobalAveragePool"])
def test_results_that_the_runtime_leaves_in_float_are_named(op: str) -> None:
    net = Net("qdq")
    x = net.input([1, 3, 6, 6], SX, ZX)
    if op == "Conv":
        w = [net.const(weights((8, 3, 3, 3)), np.int8), net.const(0.01), net.const(0, np.int8)]
        y = net.node("Conv", [net.dq(x), net.node("DequantizeLinear", w)], name="last")
    else:
        y = net.node(op, [net.dq(x)] * (2 if op == "Add" else 1), name="last")
    model = net.model(y, types={y: TensorProto.FLOAT})
    interpreter = Interpreter(model)
    feed = {"x0": samples((1, 3, 6, 6))[0]}
    np.testing.assert_allclose(interpreter.run(feed)[y], Session(model).run(feed)[y], rtol=1e-5, atol=1e-5)
    assert interpreter.float_nodes == ["last"]


def test_requantised_concat_of_unequal_scales_is_named() -> None:
    net = Net("qdq")
    a, b = net.input([1, 2, 3], SX, ZX), net.input([1, 2, 3], SY, ZY)
    y = net.q(net.node("Concat", [net.dq(a), net.dq(b)], axis=1), SX, ZX)
    net.nodes[-1].name = "again"
    interpreter = Interpreter(net.model(y.name))
    interpreter.run({"x0": samples((1, 2, 3))[0], "x1": samples((1, 2, 3))[1]})
    assert interpreter.float_nodes == ["again"]


def test_int4_straight_into_dequantize_is_float_work() -> None:
    net = Net("qdq", opset=21)
    net.inputs.append(helper.make_tensor_value_info("x0", TensorProto.FLOAT, [2, 8]))
    w = weights((8, 6), 7)
    net.constants.append(helper.make_tensor("packed", TensorProto.INT4, w.shape, w.ravel()))
    scales = np.linspace(0.1, 0.6, 12).reshape(2, 6)
    blocked = net.node("DequantizeLinear", ["packed", net.const(scales)], axis=0, block_size=4)
    by_axis = net.node("DequantizeLinear", ["packed", net.const(scales[0])], axis=1)
    y = net.node("Add", [net.node("MatMul", ["x0", blocked]), net.node("MatMul", ["x0", by_axis])], name="sum")
    model = net.model(y, types={y: TensorProto.FLOAT})
    interpreter = Interpreter(model)
    feed = {"x0": samples((2, 8))[0]}
    expected = Session(model, optimisation=Optimisation.OFF).run(feed)[y]
    np.testing.assert_allclose(interpreter.run(feed)[y], expected, rtol=1e-6)
    assert "sum" in interpreter.float_nodes


# --- integer operators ----------------------------------------------------------------------------------------

INTEGER_TEXT = {
    "rescale": """
        agraph (int32[N, 8] x) => (int32[N, 8] y)
        <int32 b = {311}, int32 low = {-60000}, int32 high = {60000}, int32 offset = {33554432},
         uint32 c = {9}, uint32 half = {255}, uint32 one = {1}, uint32 two = {2}, int32 k = {65536}>
        {
            limited = Clip(x, low, high)
            p = Mul(limited, b)
            up = Add(p, offset)
            u = Cast<to = 12>(up)
            whole = BitShift<direction = "RIGHT">(u, c)
            odd = Mod(whole, two)
            sum0 = Add(u, half)
            sum1 = Add(sum0, odd)
            shifted = BitShift<direction = "RIGHT">(sum1, c)
            s = Cast<to = 6>(shifted)
            y = Sub(s, k)
        }""",
    "arithmetic": """
        agraph (int32[N, 8] x) => (int32[N, 8] y, int32[N, 1] total, int32[N, 1] top)
        <int32 seven = {7}, int32 minus = {-3}, int64[1] axis = {1}>
        {
            d = Div(x, seven)
            m = Mod(x, minus)
            f = Mod<fmod = 1>(x, minus)
            a = Abs(d)
            n = Neg(m)
            s = Sign(x)
            mx = Max(a, n, f)
            mn = Min(mx, x)
            less = Less(mn, s)
            y = Where(less, mn, a)
            total = ReduceSum(d, axis)
            top = ReduceMax<axes = [1]>(x)
        }""",
    "products": """
        agraph (int32[4, 8] x) => (int32[4, 4] y, bool[4, 8] z)
        <int32 limit = {5}, int32 zero = {0}>
        {
            small = Mod(x, limit)
            t = Transpose<perm = [1, 0]>(small)
            y = MatMul(small, t)
            a = Greater(small, zero)
            b = Equal(small, zero)
            c = Or(a, b)
            d = Not(a)
            e = Xor(c, d)
            z = And(c, e)
        }""",
}


@pytest.mark.parametrize("text", INTEGER_TEXT.values(), ids=INTEGER_TEXT.keys())
def test_integer_operators(text: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    x = np.random.default_rng(0).integers(-70000, 70000, (4, 8)).astype(np.int32)
    x[0, 0] = 0
    same(model, [{"x": x}], "qoperator")


def test_table_of_256_entries() -> None:
    net = Net("qoperator", opset=17)
    x = net.input([3, 50], SX, ZX)
    table = net.const(np.random.default_rng(1).integers(0, 256, 256), np.uint8)
    index = net.node("Reshape", [net.node("Cast", [x.name], to=TensorProto.INT32), net.const([-1], np.int64)])
    y = net.node("GatherElements", [table, index], axis=0)
    z = net.node("Gather", [table, net.node("Cast", [x.name], to=TensorProto.INT32)])
    same(net.model(y, z), [{"x0": v} for v in samples((3, 50))], "qoperator")


@pytest.mark.parametrize("group", [1, 4], ids=["dense", "depthwise"])
def test_conv_integer(group: int) -> None:
    net = Net("qoperator")
    x = net.input([1, 4, 6, 6], SX, ZX)
    w = weights((8, 4 // group, 3, 3)).astype(np.uint8)
    inputs = [x.name, net.const(w, np.uint8), net.const(ZX, np.uint8), net.const(9, np.uint8)]
    y = net.node("ConvInteger", inputs, group=group, pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    model = net.model(y, types={y: TensorProto.INT32})
    same(model, [{"x0": v} for v in samples((1, 4, 6, 6))], "qoperator")


def test_model_local_functions_are_inlined() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "qcompile" : 1]>
        agraph (int32[N] x) => (int32[N] y) { y = qcompile.twice(x) }
        <domain: "qcompile", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }""")
    same(model, [{"x": np.arange(5, dtype=np.int32)}], "qoperator")
    assert len(model.functions) == 1


# --- refusals -------------------------------------------------------------------------------------------------


def _inexact(layout: str, op: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    net = Net(layout)
    shape = (1, 6, 7, 7)
    x = net.input(list(shape), SX, ZX)
    if op == "Conv":
        y = net.linear("Conv", x, weights((8, 6, 3, 3)), [(1, 2)] * 8, (SY, ZY), bias(8))
        for t in net.constants:
            if list(t.dims) == [8] and t.data_type == TensorProto.FLOAT:
                scales = numpy_helper.to_array(t) * np.float32(1.01)
                t.CopyFrom(numpy_helper.from_array(scales, t.name))
    elif op == "GlobalAveragePool":
        y = net.pool(x, SY, ZY)
    else:
        y = net.pair(op, x, x, 0.123456, 3)
    named = {"Conv": ("Conv", "QLinearConv"), "Add": ("Add", "QLinearAdd"), "Mul": ("Mul", "QLinearMul")}
    for node in net.nodes:
        if node.op_type in named.get(op, (op, f"QLinear{op}")):
            node.name = "the_node"
    return net.model(y.name), {"x0": samples(shape)[0]}


@BOTH
@pytest.mark.parametrize(
    ("op", "why"),
    [
        ("Conv", "8 of 8 rescale multipliers are not b/2"),
        ("Add", "is not p/q with one odd q"),
        ("Mul", "is not p/q with one odd q"),
        ("GlobalAveragePool", "1 of 1 rescale multipliers"),
    ],
    ids=["conv", "add", "mul", "pool"],
)
def test_an_inexact_rescale_is_refused_or_rounded_in_float(op: str, why: str, layout: str) -> None:
    model, feed = _inexact(layout, op)
    with pytest.raises(ModelError, match=rf"the_node.*{why}"):
        Interpreter(model).run(feed)
    relaxed = Interpreter(model, strict=False)
    got, expected = (r.run(feed) for r in (relaxed, Session(model)))
    assert relaxed.float_nodes == ["the_node"]
    for name, value in expected.items():
        assert np.abs(got[name].astype(int) - value).max() <= (1 if op in ("Add", "Mul") else 0)


def _text(body: str, inputs: str = "float[2, 3] x", output: str = "y", opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> g ({inputs}) => ({output}) {body}'
    )


@pytest.mark.parametrize(
    ("model", "feed", "message"),
    [
        pytest.param(
            _text("<int32 zero = {0}> { y = Div(x, zero) }", "int32[2] x", "int32[2] y"),
            np.ones(2, np.int32), "y.*Div.*division by zero", id="division",
        ),
        pytest.param(
            _text("<int32 zero = {0}> { y = Mod(x, zero) }", "int32[2] x", "int32[2] y"),
            np.ones(2, np.int32), "division by zero", id="modulo",
        ),
        pytest.param(
            _text('<uint32 s = {32}> { y = BitShift<direction = "LEFT">(x, s) }', "uint32[2] x", "uint32[2] y"),
            np.ones(2, np.uint32), "shift by 32 bits", id="shift",
        ),
        pytest.param(
            _text("{ y = ReduceSum(x) }", "int32[2] x", "int32[1] y"),
            np.full(2, 2**31 - 1, np.int32), "a sum leaves int32", id="sum",
        ),
        pytest.param(
            _text("{ y = MatMul(x, x) }", "int32[2, 2] x", "int32[2, 2] y"),
            np.full((2, 2), 2**20, np.int32), "a sum leaves int32", id="matmul",
        ),
        pytest.param(
            _text("<int64[1] i = {3}> { y = Gather(x, i) }", "int32[2] x", "int32[1] y"),
            np.ones(2, np.int32), "an index lies outside", id="index",
        ),
        pytest.param(
            _text("<int64[1] s = {5}> { y = Reshape(x, s) }", "int32[2] x", "int32[5] y"),
            np.ones(2, np.int32), "cannot be reshaped", id="reshape",
        ),
        pytest.param(
            _text("<float s = {0.0}> { y = QuantizeLinear(x, s) }", output="uint8[2, 3] y"),
            np.ones((2, 3), np.float32), "a scale is zero", id="scale",
        ),
        pytest.param(
            _text("{ y = Add(x, absent) }", output="float[2, 3] y"),
            np.ones((2, 3), np.float32), "'absent' is not there", id="unknown-tensor",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_run(model: onnx.ModelProto, feed: Array, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Interpreter(model).run({"x": feed})


def test_not_a_number_is_refused() -> None:
    model = _text("<float s = {0.5}> { y = QuantizeLinear(x, s) }", output="uint8[2, 3] y")
    with pytest.raises(DataError, match="NaN"):
        Interpreter(model).run({"x": np.full((2, 3), np.nan, np.float32)})


def test_feeds_and_outputs_are_checked() -> None:
    interpreter = Interpreter(_text("{ y = Relu(x) }", output="float[2, 3] y"))
    x = np.ones((2, 3), np.float32)
    with pytest.raises(InputError, match="'x' is not fed"):
        interpreter.run({})
    with pytest.raises(InputError, match="float64, the model takes float32"):
        interpreter.run({"x": x.astype(np.float64)})
    with pytest.raises(InputError, match="'z' is not an input"):
        interpreter.run({"x": x, "z": x})
    with pytest.raises(InputError, match="no tensor 'q'"):
        interpreter.run({"x": x}, outputs=["q"])


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x08 this is no model")
    for name in ("absent.onnx", "broken.onnx"):
        with pytest.raises(ModelError, match=f"{name}: cannot be read"):
            Interpreter(tmp_path / name)


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch)
    infos = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", 1, [1]),
    ]
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", 1, None)])
    with pytest.raises(ModelError, match=r"choice \(If\): control flow"):
        Interpreter(helper.make_model(graph))


def test_bias_with_another_scale_is_refused() -> None:
    net = Net("qdq")
    x = net.input([5, 30], SX, ZX)
    y = net.linear("Gemm", x, weights((30, 8)), TIES, (SY, ZY), bias(8))
    third = [n for n in net.nodes if n.op_type == "DequantizeLinear"][2]
    third.input[1] = net.const(np.full(8, 0.1))
    with pytest.raises(ModelError, match="the scale of the bias"):
        Interpreter(net.model(y.name)).run({"x0": samples((5, 30))[0]})


def test_accumulator_beyond_int32_is_refused() -> None:
    net = Net("qoperator")
    x = net.input([5, 30], SX, ZX)
    y = net.linear("Gemm", x, np.full((30, 8), 127, np.int8), TIES, (SY, ZY), np.full(8, 2**31 - 1, np.int32))
    with pytest.raises(ModelError, match="accumulator leaves int32"):
        Interpreter(net.model(y.name)).run({"x0": np.full((5, 30), 9, np.float32)})


def test_qlinear_concat_of_unequal_scales_is_refused() -> None:
    net = Net("qoperator")
    a, b = net.input([1, 2, 3], SX, ZX), net.input([1, 2, 3], SY, ZX)
    parts = [a.name, *net.ends(a), b.name, *net.ends(b)]
    y = net.node("QLinearConcat", [*net.ends(a), *parts], domain="com.microsoft", axis=1)
    with pytest.raises(ModelError, match="unequal scales"):
        Interpreter(net.model(y)).run({f"x{i}": samples((1, 2, 3))[i] for i in range(2)})


# --- intermediate tensors, windows ----------------------------------------------------------------------------


def test_intermediate_tensors() -> None:
    net = Net("qdq")
    x = net.input([1, 3, 6, 6], SX, ZX)
    w = weights((8, 3, 3, 3))
    y = net.linear("Conv", x, w, TIES, (SY, ZY), bias(8))
    conv = next(n for n in net.nodes if n.op_type == "Conv")
    feed = {"x0": samples((1, 3, 6, 6))[0]}
    got = Interpreter(net.model(y.name)).run(feed, outputs=[x.name, conv.input[0], conv.output[0], y.name])
    integers = got[x.name].astype(np.int64) - ZX
    assert np.array_equal(got[conv.input[0]], integers.astype(np.float32) * np.float32(SX))
    windows = np.lib.stride_tricks.sliding_window_view(integers, (3, 3), axis=(2, 3))
    acc = np.einsum("nchwij,mcij->nmhw", windows, w.astype(np.int64)) + bias(8).reshape(-1, 1, 1)
    scales = np.array([dyadic_weight_scale(SX, SY, b, c) for b, c in TIES], np.float32) * np.float32(SX)
    assert np.array_equal(got[conv.output[0]], acc.astype(np.float32) * scales.reshape(-1, 1, 1))


def test_large_convolution_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """im2col cut into rows gives the same as in one piece."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-255, 256, (2, 6, 11, 10)), rng.integers(-127, 128, (4, 3, 3, 2))
    attributes = {"strides": [2, 1], "pads": [1, 0, 2, 1]}
    window = Window.from_attributes(attributes, (3, 2), (11, 10))
    whole = convolve(x, w, window, 2)
    monkeypatch.setattr("qcompile.integer_windows._IM2COL_BYTES", 1)
    assert np.array_equal(convolve(x, w, window, 2), whole)


def test_exact_matmul_in_both_ranges() -> None:
    rng = np.random.default_rng(0)
    for limit in (2**20, 2**29):  # float64 product, then int64 product
        a, b = rng.integers(-limit, limit, (3, 4, 5)), rng.integers(-limit, limit, (3, 5, 6))
        assert np.array_equal(exact_matmul(a, b), np.matmul(a.astype(object), b.astype(object)).astype(np.int64))
    with pytest.raises(ModelError, match="beyond int64"):
        exact_matmul(np.full((1, 4), 2**31), np.full((4, 1), 2**31))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({}, "does not fit"), ({"pads": [-1, 0, 0, 0]}, "negative pads")],
    ids=["too-large", "negative"],
)
def test_windows_that_do_not_fit(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Window.from_attributes(attributes, (9, 9), (4, 4))


def test_convolution_checks() -> None:
    window = Window.from_attributes({}, (1, 1), (2, 2))
    with pytest.raises(ModelError, match="do not fit 3 input channels"):
        convolve(np.zeros((1, 3, 2, 2), int), np.zeros((2, 2, 1, 1), int), window)
    with pytest.raises(ModelError, match="beyond 2"):
        convolve(np.full((1, 1, 2, 2), 2**31), np.full((1, 1, 1, 1), 2**31), window)


def test_max_pool_padding_never_wins() -> None:
    x = np.full((1, 1, 2, 2), -128, np.int8)
    window = Window.from_attributes({"pads": [1, 1, 1, 1]}, (2, 2), (2, 2))
    assert np.array_equal(max_pool(x, window), np.full((1, 1, 3, 3), -128))


def test_mobilenet_like_convolutions_take_about_a_second() -> None:
    """A pointwise and a depthwise layer of MobileNetV1's size, times their number; generous for a busy machine."""
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (1, 192, 28, 28))
    point, depth = rng.integers(-127, 128, (192, 192, 1, 1)), rng.integers(-127, 128, (192, 1, 3, 3))
    started = time.perf_counter()
    convolve(x, point, Window.from_attributes({}, (1, 1), (28, 28)))
    convolve(x, depth, Window.from_attributes({"pads": [1, 1, 1, 1]}, (3, 3), (28, 28)), 192)
    assert 11 * (time.perf_counter() - started) < 5
