"""Networks of one quantised operator each, and how they are lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from integer_models import Net
from onnx import ModelProto, TensorProto

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.rewrite import Report

FLOAT = TensorProto.FLOAT
Build = Callable[[Net], str]


def lower(model: ModelProto, **settings: str) -> tuple[Report, Graph]:
    graph = Graph.from_proto(model)
    context = Context(Settings(**{"format": "qoperator", **settings}))  # type: ignore[arg-type]
    report = LowerQOperator().run(graph, context)
    checked = graph.to_proto()
    for output in checked.graph.output:
        output.type.tensor_type.shape.SetInParent()  # the checker asks for a shape, which these models leave open
    onnx.checker.check_model(checked)
    assert LowerQOperator().run(graph, context).rewrites == 0, "a second run rewrote something"
    return report, graph


def weights(*shape: int, seed: int = 1) -> Array:
    """int8 weights that no kernel saturates on: |w| <= 64."""
    return np.random.default_rng(seed).integers(-64, 65, shape).astype(np.int8)


def bias(count: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).integers(-3000, 3000, count).astype(np.int32)


HALVES = [(1 << 15, 16), (3, 10), (1, 9)]  # M of three channels


def conv(net: Net) -> str:
    x = net.input([1, 4, 7, 7], 0.05, 120)
    attributes: dict[str, Any] = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "kernel_shape": [3, 3]}
    return net.linear("Conv", x, weights(3, 4, 3, 3), HALVES, (0.02, 3), bias(3), **attributes).name


def conv_without_bias(net: Net) -> str:
    x = net.input([2, 4, 6, 6], 0.05, 0)
    return net.linear("Conv", x, weights(3, 4, 1, 1), [(5, 8)], (0.02, 130)).name


def conv_grouped(net: Net) -> str:
    x = net.input([1, 6, 5, 5], 0.05, 9)
    return net.linear("Conv", x, weights(3, 2, 3, 3), HALVES, (0.02, 3), bias(3), group=3, auto_pad="SAME_UPPER").name


def conv_1d(net: Net) -> str:
    x = net.input([1, 3, 20], 0.05, 9)
    return net.linear("Conv", x, weights(3, 3, 5), HALVES, (0.02, 3), bias(3)).name


def gemm(net: Net) -> str:
    x = net.input([5, 8], 0.05, 77)
    return net.linear("Gemm", x, weights(8, 3), HALVES, (0.02, 3), bias(3)).name


def gemm_transposed(net: Net) -> str:
    x = net.input(["N", 8], 0.05, 77)
    return net.linear("Gemm", x, weights(3, 8), HALVES, (0.02, 3), transB=1).name


def gemm_float(net: Net) -> str:
    x = net.input(["N", 8], 0.05, 77)
    return net.linear("Gemm", x, weights(3, 8), HALVES, None, bias(3), transB=1).name


def gemm_float_without_bias(net: Net) -> str:
    x = net.input([5, 8], 0.05, 77)
    return net.linear("Gemm", x, weights(8, 3), [(5, 12)], None).name


def matmul(net: Net) -> str:
    x = net.input([2, 5, 8], 0.05, 77)
    return net.linear("MatMul", x, weights(8, 3), HALVES, (0.02, 3)).name


def add(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([1, 3, 4, 4], 0.05 * 100 / 255, 12)
    return net.pair("Add", a, b, 0.05, 128).name


def add_broadcast(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([3, 1, 1], 0.05, 12)
    return net.pair("Add", a, b, 0.05 * 255 / 300, 128).name


def multiply(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([1, 3, 1, 1], 1 / 255, 0)
    return net.pair("Mul", a, b, 0.05, 128).name


def pool(net: Net) -> str:
    x = net.input([2, 3, 4, 4], 0.05, 77)
    return net.pool(x, 0.05, 80).name


def concat(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([1, 2, 4, 4], 0.05, 77)
    if net.layout == "qdq":
        return net.q(net.node("Concat", [net.dq(a), net.dq(b)], axis=1), 0.05, 77).name
    return net.node("Concat", [a.name, b.name], axis=1)


def movements(net: Net) -> str:
    x = net.input([1, 3, 6, 6], 0.05, 77)
    pooled = net.move("MaxPool", x, kernel_shape=[2, 2])
    turned = net.move("Transpose", pooled, perm=[0, 2, 1, 3])
    return net.move("Reshape", turned, net.const([0, -1], np.int64)).name


def chain(net: Net) -> str:
    x = net.input(["N", 3, 8, 8], 0.05, 77)
    left = net.linear("Conv", x, weights(3, 3, 3, 3), HALVES, (0.02, 3), bias(3), pads=[1, 1, 1, 1])
    right = net.linear("Conv", x, weights(3, 3, 1, 1, seed=5), [(7, 12)], (0.02, 128), bias(3))
    total = net.pair("Add", left, right, 0.02 * 255 / 200, 60)
    pooled = net.pool(total, total.scale / 4, 50)
    rows = net.move("Flatten", pooled)
    return net.linear("Gemm", rows, weights(4, 3), [(3, 9)], None, bias(4), transB=1).name


CASES: dict[str, tuple[Build, dict[str, int]]] = {
    "conv": (conv, {"QLinearConv": 1}),
    "conv_without_bias": (conv_without_bias, {"QLinearConv": 1}),
    "conv_grouped": (conv_grouped, {"QLinearConv": 1}),
    "conv_1d": (conv_1d, {"QLinearConv": 1}),
    "gemm": (gemm, {"QGemm": 1}),
    "gemm_transposed": (gemm_transposed, {"QGemm": 1}),
    "gemm_float": (gemm_float, {"QGemm": 1}),
    "gemm_float_without_bias": (gemm_float_without_bias, {"QGemm": 1}),
    "matmul": (matmul, {"QLinearMatMul": 1}),
    "add": (add, {"QLinearAdd": 1}),
    "add_broadcast": (add_broadcast, {"QLinearAdd": 1}),
    "mul": (multiply, {"QLinearMul": 1}),
    "pool": (pool, {"QLinearGlobalAveragePool": 1}),
    "concat": (concat, {"Concat": 1}),
    "movements": (movements, {"MaxPool": 1, "Transpose": 1, "Reshape": 1}),
    "chain": (chain, {"QLinearConv": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "Flatten": 1, "QGemm": 1}),
}
