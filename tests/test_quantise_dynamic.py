"""passes.quantise_dynamic and passes.sum_residuals: form, numbers, fusion and refusals."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.context import Context, Settings
from qcompile.errors import ModelError
from qcompile.graph import Array, Graph
from qcompile.passes.quantise_dynamic import QuantiseDynamic
from qcompile.passes.sum_residuals import SumResiduals
from qcompile.runtime import Optimisation, Session

QKV = """agraph (float[B, L, 8] x) => (float[B, L, 6] a, float[B, L, 6] c)
{ p = MatMul(x, w)  a = Add(p, b)  c = MatMul(x, v) }"""


def quantise(model: onnx.ModelProto, **settings: object) -> tuple[Graph, Counter[str]]:
    graph = Graph.from_proto(model)
    pass_, context = QuantiseDynamic(), Context(Settings(**settings))  # type: ignore[arg-type]
    report = pass_.run(graph, context)
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    if report.rewrites:
        assert pass_.run(graph, context).rewrites == 0
    return graph, report.skipped


def optimised_ops(graph: Graph) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        Session(graph.to_proto(), optimised_path=path)
        return dict(Counter(n.op_type for n in onnx.load(path).graph.node))


def dynamic_product(x: Array, weight: Array, scale: Array) -> Array:
    """DynamicQuantizeLinear (ONNX specification) and the product, in float64 and int64."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    zero = int(np.clip(np.rint(-np.float32(low) / step), 0, 255))
    q = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.int64)
    product: Array = ((q - zero) @ weight.astype(np.int64)).astype(np.float64)
    return np.asarray(product * float(step) * scale.astype(np.float64))


def stored(graph: Graph) -> dict[str, Array]:
    return {name: c.array() for name, c in graph.constants.items()}


def test_products_of_one_tensor_share_its_quantisation_and_fuse() -> None:
    graph, skipped = quantise(parse(QKV, w=floats(8, 6), v=floats(8, 6, seed=1), b=floats(6, seed=2)))
    assert not skipped
    assert ops(graph) == {"DynamicQuantizeLinear": 1, "MatMulInteger": 2, "Cast": 2, "Mul": 4, "Add": 1}
    assert optimised_ops(graph) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2}


def test_one_reader_becomes_one_kernel() -> None:
    graph, _ = quantise(parse("agraph (float[B, L, 8] x) => (float[B, L, 6] y) { p = MatMul(x, w) y = Add(p, b) }",
                              w=floats(8, 6), b=floats(6)))  # fmt: skip
    assert optimised_ops(graph) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL], ids=["off", "all"])
@pytest.mark.parametrize("target", ["any", "vnni"])
def test_the_numbers_are_those_of_the_definition(target: str, level: Optimisation) -> None:
    graph, _ = quantise(parse(QKV, w=floats(8, 6), v=floats(8, 6, seed=1), b=floats(6, seed=2)), target=target)
    x, constants = floats(2, 5, 8, seed=3), stored(graph)
    got = Session(graph.to_proto(), optimisation=level).run({"x": x})
    want = dynamic_product(x, constants["w_int8"], constants["w_scale"]) + constants["b"]
    np.testing.assert_allclose(got["a"], want, rtol=0, atol=2e-6 * np.abs(want).max())
    want = dynamic_product(x, constants["v_int8"], constants["v_scale"])
    np.testing.assert_allclose(got["c"], want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_weights_are_symmetric_near_and_obey_the_pair_rule() -> None:
    weight = np.abs(floats(64, 16)) + 1  # equal signs: free weights would break the rule
    graph, _ = quantise(parse("agraph (float[N, 64] x) => (float[N, 16] y) { y = MatMul(x, w) }", w=weight))
    q, scale = (stored(graph)[n] for n in ("w_int8", "w_scale"))
    pairs = q.astype(int).reshape(32, 2, 16).sum(axis=1)
    assert np.abs(pairs).max() <= 128
    assert q.dtype == np.int8
    error = weight - q * scale
    # clipping a pair costs at most half its excess: well below the weights themselves
    assert np.square(error).sum() < 0.01 * np.square(weight).sum()
    free, _ = quantise(parse("agraph (float[N, 64] x) => (float[N, 16] y) { y = MatMul(x, w) }", w=weight), target="vnni")
    q, scale = (stored(free)[n] for n in ("w_int8", "w_scale"))
    assert np.square(weight - q * scale).sum() < np.square(error).sum()


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("bias", ["b", ""], ids=["bias", "no bias"])
def test_gemm_with_everything(trans: int, beta: float, bias: str) -> None:
    weight = floats(6, 8) if trans else floats(8, 6)
    tail = f", {bias}" if bias else ""
    text = f"""agraph (float[N, 8] x) => (float[N, 6] y)
    {{ y = Gemm<alpha: float = 0.25, beta: float = {beta}, transB: int = {trans}>(x, w{tail}) }}"""
    model = parse(text, 21, w=weight, **({"b": floats(6, seed=4)} if bias else {}))
    graph, _ = quantise(model)
    x = floats(32, 8, seed=5)
    got, want = (Session(m).run({"x": x})["y"] for m in (graph.to_proto(), model))
    # two operands of 8 bits: errors of a percent of the output's deviation
    assert np.sqrt(np.mean(np.square(got - want))) < 0.02 * want.std()
    assert got.shape == want.shape


def test_a_computed_gemm_bias_keeps_its_beta() -> None:
    text = """agraph (float[N, 8] x, float[6] b) => (float[N, 6] y) { y = Gemm<beta: float = 2.0>(x, w, b) }"""
    model = parse(text, w=floats(8, 6))
    graph, _ = quantise(model)
    feed = {"x": floats(4, 8), "b": 100 * floats(6, seed=1)}
    got, want = (Session(m).run(feed)["y"] for m in (graph.to_proto(), model))
    np.testing.assert_allclose(got, want, atol=0.1)


REFUSED = [
    ("xt = Transpose(x)  a = Gemm<transA: int = 1>(xt, w)", {"w": floats(8, 6)}, "Gemm with transA"),
    ("a = MatMul(w, x)", {"w": floats(3, 4)}, "weights are the left operand"),
    ("xt = Transpose(x)  a = MatMul(x, xt)", {}, "product of two activations"),
    ("a = MatMul(x, w)", {"w": floats(2, 8, 6)}, "MatMul with weights of rank other than 2"),
    ("w = Relu(k)  a = Gemm(x, w)", {"k": floats(8, 6)}, "weights are computed at run time or not float32"),
    ("a = MatMul(x, w)", {"w": floats(8, 6)}, "excluded by --exclude"),
    ("a = Gemm(x, w)", {"w": floats(8, 6)}, "excluded by --exclude"),
]


@pytest.mark.parametrize(("extra", "constants", "reason"), REFUSED, ids=[f"{i}-{r[2]}" for i, r in enumerate(REFUSED)])
def test_refused(extra: str, constants: dict[str, Array], reason: str) -> None:
    text = "agraph (float[4, 8] x) => (float[4, 6] y, float[1] b) "
    text += f"{{ y = MatMul(x, v)  {extra}  f = Flatten<axis: int = 0>(a)  s = ReduceMax(f)  b = Reshape(s, one) }}"
    model = parse(text, 21, v=floats(8, 6, seed=1), one=np.array([1]), **constants)
    for node in model.graph.node:
        node.name = "out_product" if "a" in node.output else ""
    graph, skipped = quantise(model, exclude=("out*",) if "excluded" in reason else ())
    assert skipped == {reason: 1}
    assert ops(graph)["MatMulInteger"] == 1


def test_convolutions_stay_float() -> None:
    text = """agraph (float[N, 3, 4, 4] x) => (float[N, 5] y)
    { c = Conv(x, k)  f = Flatten(c)  y = MatMul(f, w) }"""
    graph, skipped = quantise(parse(text, k=floats(2, 3, 1, 1), w=floats(32, 5)))
    assert skipped == {"no data: a convolution needs static ranges; give --data": 1}
    assert ops(graph)["Conv"] == 1


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(ModelError, match="no node can be quantised without data"):
        quantise(parse("agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"))


NORM = """agraph (float[B, L, 8] x, float[B, L, 8] r) => (float[B, L, 8] y)
{ s = Add(x, r)  y = LayerNormalization<axis: int = -1>(s, g, b) }"""


def test_sum_blocks_the_fusion_and_keeps_the_bits() -> None:
    model = parse(NORM, g=floats(8), b=floats(8, seed=1))
    report, graph = check_pass(SumResiduals(), model, {"x": floats(2, 3, 8), "r": floats(2, 3, 8, seed=2)})
    assert report.rewrites == 1
    assert ops(graph) == {"Sum": 1, "LayerNormalization": 1}
    assert "SkipLayerNormalization" not in optimised_ops(graph)


def test_sum_leaves_constants_and_other_readers_alone() -> None:
    text = NORM.replace("Add(x, r)", "Add(x, c)").replace("=> (", "=> (float[B, L, 8] t, ").replace("{", "{ t = Add(x, r)")
    model = parse(text, g=floats(8), b=floats(8, seed=1), c=floats(8))
    report, graph = check_pass(SumResiduals(), model, {"x": floats(2, 3, 8), "r": floats(2, 3, 8, seed=2)})
    assert report.rewrites == 0
    assert ops(graph)["Add"] == 2


def test_sum_leaves_double_alone() -> None:
    model = parse(NORM.replace("float[", "double["), g=floats(8).astype(np.float64), b=floats(8, seed=1).astype(np.float64))
    report, _ = check_pass(SumResiduals(), model, {"x": floats(2, 3, 8).astype(float), "r": floats(2, 3, 8).astype(float)})
    assert dict(report.skipped) == {"not float32": 1}
