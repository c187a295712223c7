"""The interpreter: data movement, and where float begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from integer_models import Net, Tensor
from interpret_helpers import BOTH, SX, SY, TIES, ZX, ZY, bias, same, samples, weights
from onnx import TensorProto, helper

from qcompile.interpret import Interpreter
from qcompile.runtime import Optimisation, Session

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
