"""The interpreter: plain integer operators, intermediate tensors, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from integer_models import Array, Net, dyadic_weight_scale
from interpret_helpers import BOTH, SX, SY, TIES, ZX, ZY, bias, same, samples, weights
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import DataError, InputError, ModelError
from qcompile.interpret import Interpreter
from qcompile.runtime import Session

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
