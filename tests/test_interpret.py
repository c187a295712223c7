"""The interpreter against onnxruntime, integer for integer: every operator of the promise, in both formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from integer_models import Net, Tensor
from interpret_helpers import BOTH, SX, SY, TIES, ZX, ZY, bias, same, samples, weights
from onnx import TensorProto, helper

from qcompile.interpret import Interpreter

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
