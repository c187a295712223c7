"""Each rule of wide integers alone, against int64 numbers made here, and each refusal by its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from passes_helpers import parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Node
from qcompile.interpret import Interpreter
from qcompile.passes._wide import INT32_MAX, Refusal, Wide, Wides, nearest_dyadic
from qcompile.passes._wide_arithmetic import ARITHMETIC
from qcompile.passes._wide_attention import product, softmax
from qcompile.passes._wide_linear import gemm
from qcompile.passes._wide_norms import layer_norm
from qcompile.passes._wide_tables import tabulated
from qcompile.runtime import Optimisation, Session

RULES: dict[str, Callable[[Wides, Node], Any]] = {
    **ARITHMETIC,
    "Gemm": gemm,
    "LayerNormalization": layer_norm,
    "MatMul": product,
    "Softmax": softmax,
    "Gelu": tabulated,
    "Log": tabulated,
}
STEPS = {"a": 2.0**-10, "b": 2.0**-10}


class Rule:
    """One node over wide inputs a and b (int32 graph inputs of the steps and bounds given), its result as the graph's output."""

    def __init__(self, text: str, bounds: dict[str, int], steps: dict[str, float] | None = None, **constants: Any) -> None:
        inputs = ", ".join(f"float[2, 5] {name}" for name in ("a", "b"))
        stored = {k: np.asarray(v) for k, v in constants.items()}
        model = parse(f"g ({inputs}) => (float[p, q] y) {{ {text} }}", 21, **stored)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        self.graph = Graph.from_proto(onnx.shape_inference.infer_shapes(model))
        samples: list[dict[str, Array]] = []
        self.wides = Wides(self.graph, Context(Settings(format="integer"), samples=samples))
        self.node = next(n for n in self.graph.nodes if n.outputs[0].name == "y")
        for value in self.graph.inputs:
            if value.name not in bounds:
                continue
            value.type = onnx.helper.make_tensor_type_proto(TensorProto.INT32, [2, 5])
            self.wides.of[value] = Wide(value, (steps or STEPS)[value.name], bounds[value.name])

    def lowered(self) -> Wide:
        RULES[self.node.op](self.wides, self.node)
        return self.wides.of[self.node.outputs[0]]

    def run(self, feeds: dict[str, Array]) -> tuple[Array, Wide]:
        """The integers of the result, the same with optimisation off, on, and in numpy integers."""
        wide = self.lowered()
        assert not isinstance(wide.integers, onnx.TensorProto)
        self.graph.outputs[:] = [wide.integers]  # type: ignore[list-item]
        self.graph.cleanup()
        self.graph.sort()
        model = self.graph.to_proto()
        given = {i.name: feeds[i.name] for i in model.graph.input}
        results = [next(iter(Session(model, optimisation=o).run(given).values())) for o in (Optimisation.OFF, Optimisation.ALL)]
        results.append(next(iter(Interpreter(model).run(given).values())))
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])
        assert results[0].dtype == np.int32
        assert int(np.abs(results[0].astype(np.int64)).max()) <= wide.bound <= INT32_MAX
        return results[0].astype(np.int64), wide


def extremes(bound: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    values = rng.integers(-bound, bound, (2, 5), endpoint=True)
    values[0, :3] = (bound, -bound, bound if seed else -bound)
    return values.astype(np.int32)


CASES: dict[str, tuple[str, Callable[[Any, Any], Any], dict[str, Any]]] = {
    "Add": ("y = Add(a, b)", lambda a, b: a + b, {}),
    "Sub": ("y = Sub(a, b)", lambda a, b: a - b, {}),
    "Sum": ("y = Sum(a, b, a)", lambda a, b: a + b + a, {}),
    "Add constant": ("y = Add(a, c)", lambda a, b: a + 0.75, {"c": np.float32(0.75)}),
    "Mul": ("y = Mul(a, b)", lambda a, b: a * b, {}),
    "Mul number": ("y = Mul(a, c)", lambda a, b: a * 0.37, {"c": np.float32(0.37)}),
    "Mul negative": ("y = Mul(a, c)", lambda a, b: a * -3.0, {"c": np.float32(-3)}),
    "Div number": ("y = Div(a, c)", lambda a, b: a / 7.0, {"c": np.float32(7)}),
    "Neg": ("y = Neg(a)", lambda a, b: -a, {}),
    "Relu": ("y = Relu(a)", lambda a, b: np.maximum(a, 0), {}),
    "Max": ("y = Max(a, b)", np.maximum, {}),
    "Min": ("y = Min(a, b)", np.minimum, {}),
    "Clip": ("y = Clip(a, l, h)", lambda a, b: np.clip(a, -0.5, 2), {"l": np.float32(-0.5), "h": np.float32(2)}),
    "Clip below": ("y = Clip(a, l)", lambda a, b: np.maximum(a, 0.25), {"l": np.float32(0.25)}),
    "Pow": ("y = Pow(a, c)", lambda a, b: a**2, {"c": np.float32(2)}),
    "ReduceMean": ("y = ReduceMean(a, x)", lambda a, b: a.mean(1, keepdims=True), {"x": np.array([1])}),
    "ReduceSum": ("y = ReduceSum<keepdims = 0>(a, x)", lambda a, b: a.sum(0), {"x": np.array([0])}),
    "Concat": ("y = Concat<axis = 0>(a, b)", lambda a, b: np.concatenate([a, b]), {}),
    "Transpose": ("y = Transpose(a)", lambda a, b: a.T, {}),
}


@pytest.mark.parametrize("bits", [12, 20, 30])
@pytest.mark.parametrize("case", list(CASES))
def test_a_rule_keeps_its_bound_at_the_ends_of_its_operands(case: str, bits: int) -> None:
    """bits: of the operands; results that need more than 32 bits are rounded, to 2^-13 of the largest, and never wrap."""
    text, real, constants = CASES[case]
    bound = 2**bits - 1
    feeds = {"a": extremes(bound, 0), "b": extremes(bound, 1)}
    got, wide = Rule(text, {"a": bound, "b": bound}, **constants).run(feeds)
    expected = np.asarray(real(*(feeds[k].astype(np.float64) * STEPS[k] for k in "ab")))
    assert got.shape == expected.shape
    largest = float(np.abs(expected).max())
    clipped = (INT32_MAX + 1) // 2 * wide.scale if case in ("Sum", "Sub", "Add") else np.inf
    limit = max(wide.scale * 1.01, largest * 2.0**-13)
    kept = np.abs(expected) < clipped
    assert kept.any()
    np.testing.assert_allclose((got * wide.scale)[kept], expected[kept], rtol=1e-6, atol=limit)


def test_operands_of_other_steps_are_rescaled_with_room() -> None:
    """An epsilon beside large numbers does not set the step: nothing may be clipped."""
    rule = Rule("y = Add(a, b)", {"a": 2**30, "b": 2**10}, {"a": 1.0, "b": 2.0**-30})
    feeds = {"a": extremes(2**30, 0), "b": extremes(2**10, 1)}
    got, wide = rule.run(feeds)
    expected = feeds["a"].astype(np.float64) + feeds["b"] * 2.0**-30
    np.testing.assert_allclose(got * wide.scale, expected, rtol=0, atol=2 * wide.scale)


def test_a_mean_of_counted_tokens_is_an_integer_division() -> None:
    rule = Rule("y = Div(a, b)", {"a": 2**29, "b": 7}, {"a": 0.25, "b": 1.0})
    a = extremes(2**29, 0)
    b = np.array([[1, 2, 3, 7, 0], [5, 4, 0, 1, 2]], np.int32)
    got, wide = rule.run({"a": a, "b": b})
    n = np.maximum(b.astype(np.int64), 1)
    np.testing.assert_array_equal(got, np.sign(a.astype(np.int64)) * ((2 * np.abs(a.astype(np.int64)) + n) // (2 * n)))
    assert wide.scale == 0.25


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "add of floats": ("y = Add(a, b)", "it reads a float tensor", {}),
    "product of floats": ("y = Mul(a, b)", "it reads a float tensor", {}),
    "cube": ("y = Pow(a, c)", "Pow with another exponent than 2", {"c": np.float32(3)}),
    "division by zero": ("y = Div(w, c)", "it divides by 0", {"c": np.float32(0)}),
    "division by a table": ("y = Div(w, c)", "divides by a tensor", {"c": np.float32([40000, 0.3, -2, 1, 1])}),
    "infinite constant": ("y = Add(w, c)", "it reads a constant that is not finite", {"c": np.float32(np.inf)}),
    "double constant": ("y = Mul(w, c)", "not float32", {"c": np.ones(5, np.float64)}),
    "cast to double": ("y = Cast<to = 11>(b)", "it converts between floats", {}),
    "computed limit": ("y = Clip(w, c)", "it clips to a number that is not stored", {"c": np.float32(np.nan)}),
    "matmul of floats": ("y = MatMul(w, b)", "an operand is float", {}),
    "gemm of floats": ("y = Gemm(w, b)", "an operand is float", {}),
    "gelu of floats": ("y = Gelu(b)", "its input is not quantised", {}),
    "log of float": ("y = Log(b)", "its input is not quantised", {}),
    "norm axis": ("y = LayerNormalization<axis = 0>(w, c)", "more than the last axis", {"c": np.ones((2, 5), np.float32)}),
    "norm gamma": ("y = LayerNormalization(w, b)", "its scale or bias is computed at run time", {}),
    "softmax axis": ("y = Softmax<axis = 0>(w)", "not along the last axis", {}),
    "softmax of floats": ("y = Softmax(b)", "it reads a float tensor", {}),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_has_no_rule_is_refused_with_its_reason(case: str) -> None:
    text, reason, constants = REFUSED[case]
    wide = "w" in text.split("(", 1)[1]
    rule = Rule(text.replace("(w", "(a"), {"a": 1000} if wide else {}, {"a": 1e-3}, **constants)
    with pytest.raises(Refusal, match=reason):
        rule.lowered()


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40], ids=["fine", "coarse"])
def test_scales_outside_a_kernel(scale: float) -> None:
    rule = Rule("y = Softmax(a)", {"a": 1000}, {"a": scale})
    with pytest.raises(Refusal, match="outside the kernel's domain"):
        rule.lowered()


def test_rescales_too_far_apart() -> None:
    for ratio in (1.0, 0.75, 2.0**-30, 3.0 * 2**20):
        b, c = nearest_dyadic(ratio)
        assert b / 2**c == ratio and 1 <= b < 2**24
    for ratio in (2.0**-40, 2.0**25):
        with pytest.raises(Refusal, match="too far apart"):
            nearest_dyadic(ratio)
