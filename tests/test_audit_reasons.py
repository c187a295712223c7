"""Every rule of the fusion is seen on a model that breaks it; that a model which keeps them has no finding is in test_audit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from audit_models import (
    Build,
    add_bias,
    between,
    blocked,
    clip,
    conv,
    float_bias,
    int4,
    linear,
    misscaled_bias,
    no_zero_point,
    softmax_too,
    widened,
)

from qcompile.audit import audit, audit_optimised

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


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
    "gemm-no-zero-point": (
        lambda: linear("Gemm", bias=lambda b: b.bias(8), weight=no_zero_point),
        "Gemm",
        "DequantizeLinear W_dq_node has no zero_point",
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
def test_a_node_that_did_not_fuse_is_named_with_its_reason(make: Callable[[], onnx.ModelProto], op: str, reason: str) -> None:
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
    assert {left.reason for left in found.leftover} == {"LayerNormalization: onnxruntime has no integer kernel for it"}
    assert found.float_ops == {"LayerNormalization": 1}


def test_two_operators_without_quantisation_between_them() -> None:
    b = Build()
    y = b.node("Add", [b.qdq("x"), b.qdq("x2")], "y")
    z = b.node("Mul", [y, b.qdq("x3")], "z")
    found = audit(b.model({"x": [2, 8], "x2": [2, 8], "x3": [2, 8]}, [b.qdq(z)]))
    assert {left.reason for left in found.leftover} == {"no QuantizeLinear and DequantizeLinear between y_node, z_node"}
