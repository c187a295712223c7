"""The audit against what onnxruntime really does: every rule is seen on a model that breaks it, and on one that does not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from qcompile.audit import Audit, Left, audit, audit_optimised
from qcompile.errors import ModelError
from qcompile.runtime import Array

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
SCALE = 2.0**-4


@dataclass
class Build:
    """A small Q/DQ model, node by node; tensors are named after the node that makes them."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, values: object, elem_type: int | None = None) -> str:
        array = np.asarray(values)
        tensor = numpy_helper.from_array(array, name)
        if elem_type is not None:
            tensor = helper.make_tensor(name, elem_type, array.shape, array.ravel().tolist())
        self.constants.append(tensor)
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}_node", **attributes))
        return name

    def _scale(self, name: str, channels: int | None, zero: np.generic) -> list[str]:
        value = (
            SCALE**2 if isinstance(zero, np.int32) else SCALE
        )  # a bias has the scale of the products it is added to
        scale = np.float32(value) if channels is None else np.full(channels, value, np.float32)
        return [
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.full(np.shape(scale), zero)),
        ]

    def dequantize(self, x: str, zero: np.generic, channels: int | None = None, axis: int = 0) -> str:
        name = f"{x}_dq"
        return self.node("DequantizeLinear", [x, *self._scale(name, channels, zero)], name, axis=axis)

    def qdq(self, x: str, zero: np.generic = np.uint8(128), scale: float | None = None) -> str:
        name = f"{x}_q"
        self.node("QuantizeLinear", [x, *self._scale(name, None, zero)], name)
        if scale is None:
            return self.dequantize(name, zero)
        inputs = [name, self.constant(f"{name}_s", np.float32(scale)), self.constant(f"{name}_z", zero)]
        return self.node("DequantizeLinear", inputs, f"{name}_dq")

    def weight(self, shape: tuple[int, ...], axis: int = 0, dtype: type[np.generic] = np.int8) -> str:
        values = np.random.default_rng(0).integers(1, 100, shape).astype(dtype)
        return self.dequantize(self.constant("W", values), dtype(0), shape[axis], axis)

    def bias(self, channels: int) -> str:
        return self.dequantize(self.constant("B", np.arange(channels, dtype=np.int32)), np.int32(0), channels)

    def model(self, inputs: dict[str, list[int | str]], outputs: list[str]) -> onnx.ModelProto:
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "g", made, given, self.constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def conv(
    *,
    zero: np.generic = np.uint8(128),
    output_zero: np.generic | None = None,
    output: bool = True,
    weight: Callable[[Build], str] = lambda b: b.weight((4, 4, 3, 3)),
    bias: Callable[[Build], str] = lambda b: b.bias(4),
    op: str = "Conv",
    then: Callable[[Build, str], str] = lambda b, y: y,
    also: Callable[[Build, str], list[str]] = lambda b, y: [],
) -> onnx.ModelProto:
    b = Build()
    y = b.node(op, [b.qdq("x", zero), weight(b), bias(b)], "y", pads=[1, 1, 1, 1])
    extra = also(b, y)
    last = then(b, y)
    if output:
        last = b.qdq(last, zero if output_zero is None else output_zero)
    return b.model({"x": [1, 4, 8, 8]}, [last, *extra])


def linear(
    op: str = "MatMul",
    *,
    shape: tuple[int | str, ...] = (3, 16),
    zero: np.generic = np.uint8(128),
    quantised_input: bool = True,
    output: bool = True,
    weight: Callable[[Build], str] = lambda b: b.weight((16, 8), 1),
    then: Callable[[Build, str], str] = lambda b, y: y,
    bias: Callable[[Build], str] | None = None,
    **attributes: float,
) -> onnx.ModelProto:
    b = Build()
    inputs = [b.qdq("x", zero) if quantised_input else "x", weight(b), *([bias(b)] if bias else [])]
    last = then(b, b.node(op, inputs, "y", **attributes))
    return b.model({"x": list(shape)}, [b.qdq(last, zero) if output else last])


def between(
    op: str, *, zero: np.generic = np.uint8(128), two: bool = False, **attributes: object
) -> onnx.ModelProto:
    """Q/DQ -> op -> Q/DQ, with another scale behind the op than before it."""
    b = Build()
    inputs = [b.qdq("x", zero), *([b.qdq("x2", zero)] if two else [])]
    y = b.node(op, inputs, "y", **attributes)
    q = b.node("QuantizeLinear", [y, b.constant("s", np.float32(0.1)), b.constant("z", zero)], "y_q")
    last = b.node("DequantizeLinear", [q, "s", "z"], "y_dq")
    return b.model({"x": [1, 4, 8, 8], **({"x2": [1, 4, 8, 8]} if two else {})}, [last])


def clip(b: Build, y: str, high: float) -> str:
    return b.node("Clip", [y, b.constant("low", np.float32(0)), b.constant("high", np.float32(high))], "clip")


def int4(b: Build, *, cast: bool) -> str:
    w = b.constant("W", np.ones((4, 4, 3, 3), np.int8), TensorProto.INT4)
    if cast:
        return b.dequantize(b.node("Cast", [w], "W8", to=TensorProto.INT8), np.int8(0), 4)
    inputs = [w, b.constant("Ws", np.full(4, SCALE, np.float32))]
    return b.node("DequantizeLinear", inputs, "W_dq", axis=0)


def blocked(b: Build) -> str:
    inputs = [b.constant("W", np.ones((16, 8), np.int8)), b.constant("Ws", np.ones((2, 8), np.float32))]
    return b.node("DequantizeLinear", inputs, "W_dq", axis=0, block_size=8)


def widened(b: Build) -> str:
    wide = b.node("Cast", [b.constant("W", np.ones((4, 4, 3, 3), np.int8))], "W32", to=TensorProto.FLOAT)
    return b.node("Mul", [wide, b.constant("Ws", np.float32(SCALE))], "W_dq")


def misscaled_bias(b: Build) -> str:
    inputs = [
        b.constant("B", np.arange(4, dtype=np.int32)),
        b.constant("Bs", np.full(4, 2 * SCALE**2, np.float32)),
    ]
    return b.node("DequantizeLinear", inputs, "B_dq", axis=0)


def float_bias(b: Build, channels: int = 8) -> str:
    return b.constant("B", np.linspace(-1, 1, channels, dtype=np.float32))


def add_bias(b: Build, y: str) -> str:
    return b.node("Add", [y, float_bias(b)], "sum")


def softmax_too(b: Build, y: str) -> list[str]:
    return [b.node("Softmax", [y], "softmax")]


GOOD: dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, int]]] = {
    "conv": (conv, {"QLinearConv": 1}),
    "conv-relu-in-range": (
        lambda: conv(zero=np.uint8(0), then=lambda b, y: b.node("Relu", [y], "relu")),
        {"QLinearConv": 1},
    ),
    "conv-clip-in-range": (
        lambda: conv(zero=np.uint8(0), then=lambda b, y: clip(b, y, 255 * SCALE)),
        {"QLinearConv": 1},
    ),
    "conv-int4-cast": (lambda: conv(weight=lambda b: int4(b, cast=True)), {"QLinearConv": 1}),
    "matmul": (linear, {"QLinearMatMul": 1}),
    "matmul-no-output-q": (lambda: linear(output=False), {"MatMulIntegerToFloat": 1}),
    "gemm": (lambda: linear("Gemm", bias=lambda b: b.bias(8)), {"QGemm": 1}),
    "gemm-no-output-q": (lambda: linear("Gemm", bias=lambda b: b.bias(8), output=False), {"QGemm": 1}),
    "add": (lambda: between("Add", two=True), {"QLinearAdd": 1}),
    "activation-product": (lambda: between("MatMul", two=True), {"QLinearMatMul": 1}),
}


@pytest.mark.parametrize(("make", "kernels"), GOOD.values(), ids=GOOD)
def test_a_good_model_has_no_finding(make: Callable[[], onnx.ModelProto], kernels: dict[str, int]) -> None:
    found = audit(make())
    assert (found.not_fused, found.leftover, found.float_ops) == ([], [], {})
    assert found.integer_ops == kernels
    assert found.float_weight_bytes == 0


NOT_FUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "no-output-q": (
        lambda: conv(output=False),
        "Conv",
        "Conv without an output QuantizeLinear: it is an output of the graph",
    ),
    "no-output-q-then-float": (
        lambda: conv(output=False, then=lambda b, y: b.node("Softmax", [y], "softmax")),
        "Conv",
        "Conv without an output QuantizeLinear: Softmax reads it in float",
    ),
    "relu-inside-range": (
        lambda: conv(then=lambda b, y: b.node("Relu", [y], "relu")),
        "Conv",
        "Relu before the QuantizeLinear cuts inside the quantised range",
    ),
    "clip-inside-range": (
        lambda: conv(zero=np.uint8(0), then=lambda b, y: clip(b, y, 6)),
        "Conv",
        "Clip before the QuantizeLinear cuts inside the quantised range",
    ),
    "gemm-relu-inside-range": (
        lambda: linear("Gemm", bias=lambda b: b.bias(8), then=lambda b, y: b.node("Relu", [y], "relu")),
        "Gemm",
        "Relu before the QuantizeLinear cuts inside the quantised range",
    ),
    "output-also-read": (
        lambda: conv(also=softmax_too),
        "Conv",
        "its output goes not only to QuantizeLinear: Softmax reads it in float",
    ),
    "output-also-given": (
        lambda: conv(also=lambda b, y: [y]),
        "Conv",
        "its output goes not only to QuantizeLinear: it is an output of the graph",
    ),
    "16-bit-activations": (lambda: conv(zero=np.uint16(0)), "Conv", "16-bit activations"),
    "16-bit-activations-matmul": (lambda: linear(zero=np.uint16(0)), "MatMul", "16-bit activations"),
    "16-bit-activation-product": (
        lambda: between("MatMul", zero=np.uint16(0), two=True),
        "MatMul",
        "16-bit activations",
    ),
    "int4-without-cast": (
        lambda: conv(weight=lambda b: int4(b, cast=False)),
        "Conv",
        "INT4 weight W behind DequantizeLinear: put Cast(to=INT8) in front of it",
    ),
    "int16-weight": (
        lambda: conv(weight=lambda b: b.weight((4, 4, 3, 3), dtype=np.int16)),
        "Conv",
        "INT16 weight W",
    ),
    "blocked-weight": (lambda: linear(weight=blocked), "MatMul", "weight W has one scale a block of 8"),
    "weight-folded-to-float": (
        lambda: conv(weight=widened),
        "Conv",
        "weight W is widened to float without a DequantizeLinear",
    ),
    "float-input": (
        lambda: linear("Gemm", quantised_input=False, bias=lambda b: b.bias(8)),
        "Gemm",
        "its input x is not quantised",
    ),
    "gemm-float-bias": (
        lambda: linear("Gemm", bias=float_bias, output=False),
        "Gemm",
        "bias B is not a DequantizeLinear of int32",
    ),
    "gemm-alpha": (lambda: linear("Gemm", bias=lambda b: b.bias(8), alpha=0.5), "Gemm", "alpha = 0.5"),
    "gemm-beta": (lambda: linear("Gemm", bias=lambda b: b.bias(8), beta=0.25), "Gemm", "beta = 0.25"),
    "bias-scale": (
        lambda: conv(bias=misscaled_bias),
        "Conv",
        "the scale of bias B_dq is not the input's scale times the weight's",
    ),
    "conv-transpose": (
        lambda: conv(op="ConvTranspose", weight=lambda b: b.weight((4, 4, 3, 3), 1)),
        "ConvTranspose",
        "ConvTranspose never fuses",
    ),
    "matmul-add-static": (
        lambda: linear(shape=(2, 3, 16), then=add_bias, output=False),
        "MatMul",
        "MatMul + Add on static shapes became a float Gemm",
    ),
}


@pytest.mark.parametrize(("make", "op", "reason"), NOT_FUSED.values(), ids=NOT_FUSED)
def test_a_node_that_did_not_fuse_is_named_with_its_reason(
    make: Callable[[], onnx.ModelProto], op: str, reason: str
) -> None:
    found = audit(make())
    assert [(left.node, left.op) for left in found.not_fused] == [("y_node", op)]
    assert reason in found.not_fused[0].reason
    assert "not known" not in found.not_fused[0].reason
    beside = {left.reason for left in found.leftover}
    assert beside == {f"{op} y_node did not fuse: {found.not_fused[0].reason}"}


# What onnxruntime did not do with these is stated by hand: versions differ in whether they fuse them.
LEFT_BY_HAND: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "int8-activations": (lambda: conv(zero=np.int8(0)), "INT8 activations: on x86 use UINT8"),
    "mixed-activations": (
        lambda: conv(output_zero=np.int8(0)),
        "INT8 and UINT8 activations around one operator",
    ),
    "conv-float-bias": (
        lambda: conv(bias=lambda b: float_bias(b, 4)),
        "bias B is not a DequantizeLinear of int32",
    ),
    "nothing-to-blame": (conv, "not known (onnxruntime"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT_BY_HAND.values(), ids=LEFT_BY_HAND)
def test_reasons_that_depend_on_the_version(make: Callable[[], onnx.ModelProto], reason: str) -> None:
    model = make()
    found = audit_optimised(model, model)
    assert [left.node for left in found.not_fused] == ["y_node"]
    assert found.not_fused[0].reason.startswith(reason)


LEFTOVER: dict[str, tuple[Callable[[], onnx.ModelProto], set[str], str]] = {
    **{
        f"no-kernel-{op.lower()}": (
            lambda op=op, two=two: between(op, two=two),  # type: ignore[misc]
            {"x_q_dq_node", "y_q_node", *(["x2_q_dq_node"] if two else [])},
            f"{op}: onnxruntime has no integer kernel for it",
        )
        for op, two in {
            "Sub": True,
            "Div": True,
            "Tanh": False,
            "Gelu": False,
            "Erf": False,
            "Sqrt": False,
        }.items()
    },
    "16-bit-add": (
        lambda: between("Add", two=True, zero=np.uint16(0)),
        {"x_q_dq_node", "x2_q_dq_node", "y_q_node"},
        "16-bit activations",
    ),
    "relu-alone": (
        lambda: between("Relu"),
        {"x_q_dq_node", "y_q_node"},
        "Relu y_node: fold it into the quantised range",
    ),
    "moved-between-scales": (
        lambda: between("Transpose", perm=[0, 2, 3, 1]),
        {"x_q_dq_node", "y_q_node"},
        "Transpose between two different scales",
    ),
    "pooled-between-scales": (
        lambda: between("MaxPool", kernel_shape=[2, 2]),
        {"x_q_dq_node", "y_q_node"},
        "MaxPool between two different scales",
    ),
    "float-bias-behind-matmul": (
        lambda: linear(shape=("N", "L", 16), then=add_bias),
        {"sum_q_node"},
        "Add sum_node reads the float constant B",
    ),
    "float-weight": (
        lambda: linear(weight=lambda b: b.constant("W", np.ones((16, 8), np.float32))),
        {"x_q_dq_node", "y_q_node"},
        "MatMul y_node reads the float constant W",
    ),
}


@pytest.mark.parametrize(("make", "nodes", "reason"), LEFTOVER.values(), ids=LEFTOVER)
def test_quantisation_left_at_run_time_is_named_with_its_reason(
    make: Callable[[], onnx.ModelProto], nodes: set[str], reason: str
) -> None:
    found = audit(make())
    assert found.not_fused == []
    assert {left.node for left in found.leftover} == nodes
    assert all(left.reason.startswith(reason) for left in found.leftover)


def test_layer_normalization_between_integers_has_no_kernel() -> None:
    b = Build()
    y = b.node("LayerNormalization", [b.qdq("x"), b.constant("gamma", np.ones(8, np.float32))], "y")
    found = audit(b.model({"x": [2, 8]}, [b.qdq(y)]))
    assert {left.reason for left in found.leftover} == {
        "LayerNormalization: onnxruntime has no integer kernel for it"
    }
    assert found.float_ops == {"LayerNormalization": 1}


def test_two_operators_without_quantisation_between_them() -> None:
    b = Build()
    y = b.node("Add", [b.qdq("x"), b.qdq("x2")], "y")
    z = b.node("Mul", [y, b.qdq("x3")], "z")
    found = audit(b.model({"x": [2, 8], "x2": [2, 8], "x3": [2, 8]}, [b.qdq(z)]))
    assert {left.reason for left in found.leftover} == {
        "no QuantizeLinear and DequantizeLinear between y_node, z_node"
    }


def test_a_rescale_with_no_operator() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s1 = {0.1}, float s2 = {0.3}, uint8 z1 = {3}, uint8 z2 = {9}>
        {
            a = QuantizeLinear (x, s1, z1)
            b = DequantizeLinear (a, s1, z1)
            c = QuantizeLinear (b, s2, z2)
            y = DequantizeLinear (c, s2, z2)
        }
    """)
    found = audit_optimised(model, model)
    assert [left.node for left in found.leftover] == ["b", "c"]
    assert {left.reason for left in found.leftover} == {
        "a rescale from one scale to another with no operator to carry it"
    }


def test_floats_at_the_ends_and_beside_kept_operators_are_no_finding() -> None:
    """x -> Mul (normalise) -> Q .. QLinearConv .. DQ -> Softmax; and a residual that stays float."""
    b = Build()
    image = b.node("Mul", ["x", b.constant("by", np.float32(1 / 255))], "image")
    y = b.node("Conv", [b.qdq(image), b.weight((4, 4, 3, 3)), b.bias(4)], "y", pads=[1, 1, 1, 1])
    residual = b.node("Add", [b.qdq(y), image], "residual")
    found = audit(b.model({"x": [1, 4, 8, 8]}, [b.node("Softmax", [residual], "head")]))
    assert (found.not_fused, found.leftover) == ([], [])
    assert found.integer_ops == {"QLinearConv": 1}
    assert found.float_ops == {"Add": 1, "Mul": 1, "Softmax": 1}


def test_a_float_model_has_no_finding_and_float_weights_only() -> None:
    b = Build()
    w = b.constant("W", np.ones((16, 8), np.float32))
    found = audit(b.model({"x": [3, 16]}, [b.node("MatMul", ["x", w], "y")]))
    assert found == Audit({}, {"MatMul": 1}, [], [], 0, 16 * 8 * 4)


def test_dynamic_quantisation_counts_as_integer() -> None:
    b = Build()
    b.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]))
    b.node("MatMulInteger", ["xq", b.constant("W", np.ones((16, 8), np.int8)), "xz"], "acc")
    b.node("Mul", ["xs", b.constant("Ws", np.float32(SCALE))], "s")
    b.node("Mul", [b.node("Cast", ["acc"], "wide", to=TensorProto.FLOAT), "s"], "y")
    assert audit(b.model({"x": [3, 16]}, ["y"])) == Audit({"DynamicQuantizeMatMul": 1}, {}, [], [], 128, 0)


def test_operators_on_integer_tensors_are_integer_operators_and_moves_are_none() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (int32[2, 8] x, float[2, 8] f) => (int32[8, 2] y, int64[2] shape, float[8, 2] moved)
        {
            a = Add (x, x)
            b = Mul (a, x)
            y = Transpose (b)
            shape = Shape (f)
            moved = Transpose (f)
        }
    """)
    found = audit(model)
    assert (found.integer_ops, found.float_ops) == ({"Add": 1, "Mul": 1}, {})


@pytest.mark.parametrize(
    ("make", "integer_bytes", "float_bytes"),
    [
        pytest.param(conv, 4 * 4 * 3 * 3, 0, id="int8"),
        pytest.param(lambda: conv(output=False), 0, 4 * 4 * 3 * 3 * 4, id="int8-read-as-float"),
        pytest.param(
            lambda: conv(weight=lambda b: int4(b, cast=True)), 4 * 4 * 3 * 3, 0, id="int4-in-int8-kernel"
        ),
    ],
)
def test_weight_bytes_are_what_the_kernel_reads(
    make: Callable[[], onnx.ModelProto], integer_bytes: int, float_bytes: int
) -> None:
    found = audit(make())
    assert (found.integer_weight_bytes, found.float_weight_bytes) == (integer_bytes, float_bytes)


def test_a_shared_weight_counts_once() -> None:
    b = Build()
    w = b.constant("W", np.ones((8, 8), np.float32))
    y = b.node("Relu", [b.node("MatMul", ["x", w], "a")], "r")
    found = audit(b.model({"x": [3, 8]}, [b.node("MatMul", [y, w], "y")]))
    assert (found.float_ops["MatMul"], found.float_weight_bytes) == (2, 8 * 8 * 4)


def test_nodes_inside_a_branch_are_audited() -> None:
    b = Build()
    y = b.node("Conv", [b.qdq("x"), b.weight((4, 4, 3, 3)), b.bias(4)], "y", pads=[1, 1, 1, 1])
    branch = b.model({"x": [1, 4, 8, 8]}, [y]).graph
    del branch.input[:]
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "other",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    outer = Build()
    outer.node("If", ["which"], "out", then_branch=branch, else_branch=other)
    model = outer.model({"x": [1, 4, 8, 8]}, ["out"])
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    found = audit(model)
    assert [(left.node, left.op) for left in found.not_fused] == [("y_node", "Conv")]
    assert found.not_fused[0].reason.startswith("Conv without an output QuantizeLinear")
    assert found.float_ops["Conv"] == 1


def test_nodes_inside_a_function_are_audited() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[3, 16] x) => (float[3, 8] y)
        <float s = {0.1}, uint8 z = {3}, float ws = {0.1}, int8 wz = {0}>
        { y = local.layer (x, s, z, ws, wz, W, s2, z2) }
        <opset_import: ["" : 21], domain: "local">
        layer (x, s, z, ws, wz, W, s2, z2) => (y) {
            xq = QuantizeLinear (x, s, z)
            xd = DequantizeLinear (xq, s, z)
            w = DequantizeLinear (W, ws, wz)
            m = MatMul (xd, w)
            t = Tanh (m)
            q = QuantizeLinear (t, s2, z2)
            y = DequantizeLinear (q, s2, z2)
        }
    """)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones((16, 8), np.int8), "W"),
            numpy_helper.from_array(np.float32(0.2), "s2"),
            numpy_helper.from_array(np.uint8(1), "z2"),
        ]
    )
    found = audit(model)
    assert (found.integer_ops, found.float_ops) == ({"MatMulIntegerToFloat": 1}, {"Tanh": 1})
    assert [(left.op, left.reason) for left in found.leftover] == [
        ("QuantizeLinear", "Tanh: onnxruntime has no integer kernel for it")
    ]


def test_a_path_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="w.bin", size_threshold=100)
    assert (tmp_path / "w.bin").stat().st_size >= 128
    assert audit(path) == audit(str(path)) == audit(linear())
    assert list(scratch.iterdir()) == []


def test_a_nameless_node_is_named_by_its_output() -> None:
    model = conv(output=False)
    for node in model.graph.node:
        node.name = ""
    assert [left.node for left in audit(model).not_fused] == ["y"]


def test_findings_are_in_the_order_of_the_graph_and_deterministic() -> None:
    b = Build()
    first = b.node("Conv", [b.qdq("x"), b.weight((4, 4, 3, 3)), b.bias(4)], "first", pads=[1, 1, 1, 1])
    soft = b.node("Tanh", [first], "tanh")
    second = b.node("Conv", [b.qdq(soft), "W_dq", "B_dq"], "second", pads=[1, 1, 1, 1])
    model = b.model({"x": [1, 4, 8, 8]}, [second])
    found = audit(model)
    assert [left.node for left in found.not_fused] == ["first_node", "second_node"]
    assert found == audit(model)


@pytest.mark.parametrize("content", [None, b"no model at all"], ids=["missing", "garbage"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: cannot be read as an ONNX model"):
        audit(path)


def test_a_model_that_onnxruntime_refuses() -> None:
    b = Build()
    b.node("NoSuchOperator", ["x"], "y")
    with pytest.raises(ModelError, match="onnxruntime cannot load it"):
        audit(b.model({"x": [1]}, ["y"]))


def _stored_weights(model: onnx.ModelProto) -> dict[str, Array]:
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = {n.input[1] for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    return {name: stored[name] for name in read if name in stored}


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["resnet8_cifar10", "minilm_sst2", "ad_autoencoder"])
def test_real_float_models_have_no_finding(task: str) -> None:
    path = ZOO / task / "model.onnx"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    found = audit(path)
    assert (found.not_fused, found.leftover, found.integer_weight_bytes) == ([], [], 0)
    assert found.float_weight_bytes == sum(w.nbytes for w in _stored_weights(onnx.load(path)).values())


def test_left_is_hashable_and_compares_by_value() -> None:
    assert len({Left("n", "Conv", "r"), Left("n", "Conv", "r")}) == 1
