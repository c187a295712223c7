"""Weights in integers, activations in float: the pattern, refusals, rounding, single nodes and mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_helpers import CNN, MODELS
from core_models import core_context, floats, model, node, run_registry, sqnr
from int4_files import unpacked

from qcompile import compile_model
from qcompile.context import Settings
from qcompile.cut_layer import LayerSpec
from qcompile.errors import InputError
from qcompile.graph import Array, Graph
from qcompile.layer_counts import count_layers
from qcompile.passes import PASSES
from qcompile.passes.store_weights import WRITTEN, StoreWeights
from qcompile.planner import Mixing, Planner
from qcompile.probing import WidthCost
from qcompile.recipe import recipe_of
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session
from qcompile.sensitivity import GroupSensitivity, LayerSensitivity, Sensitivity
from qcompile.source_groups import SourceGroup

DATA = str(MODELS / "digits_calib.npz")
VIT = str(MODELS / "digits_vit.onnx")
#: One layer behind a Tanh, whose output nothing computes in integers, and what becomes of its constants.
LAYERS = {
    "conv": ("s = Conv <pads = [1, 1, 1, 1]> (t, w)", {"w": (6, 4, 3, 3)}, 0),
    "conv-bias": ("s = Conv (t, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}, 0),
    "depthwise": ("s = Conv <group = 4> (t, w)", {"w": (8, 1, 3, 3)}, 0),
    "gemm": ("f = Flatten (t)  s = Gemm (f, w, b)", {"w": (64, 6), "b": (6,)}, 1),
    "gemm-rows": ("f = Flatten (t)  s = Gemm <transB = 1> (f, w)", {"w": (6, 64)}, 0),
    "matmul": ("s = MatMul (t, w)", {"w": (4, 6)}, 1),
    "matmul-bias": ("p = MatMul (t, w)  s = Add (p, b)", {"w": (4, 6), "b": (6,)}, 1),
}
CONV3D = "u = Unsqueeze (t, two)  s = Conv (u, w)"
REFUSED = {
    "transposed": ("s = ConvTranspose (t, w)", {"w": (4, 6, 3, 3)}, "transposed convolution"),
    "product": ("s = MatMul (t, t)", {}, "product of two activations"),
    "computed": ("v = Abs (w)  r = Add (v, x0)  s = Conv (t, r)", {"w": (6, 4, 3, 3)}, "weights are computed at run time"),
    "transA": ("f = Flatten (t)  s = Gemm <transA = 1> (f, w)", {"w": (1, 6)}, "Gemm with transA"),
    "rank": ("s = MatMul (t, w)", {"w": (4, 4, 6)}, "onnxruntime would round its activations"),
    "3d": (CONV3D, {"w": (6, 4, 1, 3, 3)}, "convolution over more than two dimensions"),
}


def behind_tanh(body: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    """x -> integer Conv -> Tanh -> the layer(s) of `body` -> y."""
    constants: dict[str, Any] = {name: floats(*shape, seed=i + 1) * 0.3 for i, (name, shape) in enumerate(shapes.items())}
    constants |= {"w0": floats(4, 3, 3, 3), "two": np.array([2], np.int64)} if "two" in body else {"w0": floats(4, 3, 3, 3)}
    inputs, extra = "float[1, 3, 6, 6] x", ", float[1] x0" if "x0" in body else ""
    outputs = "float[a, b]" if "Flatten" in body else "float[a, b, c, d, e]" if "two" in body else "float[a, b, c, d]"
    return model(
        f"g ({inputs}{extra}) => ({outputs} y) {{ c = Conv (x, w0)  t = Tanh (c)  {body}  y = Sigmoid (s) }}", **constants
    )


def feeds(source: Any, count: int = 16) -> list[dict[str, Array]]:
    extra = {"x0": np.zeros(1, np.float32)} if len(source.graph.input) > 1 else {}
    # Channels that go together: what plain rounding does not see.
    mixing = 1 + 0.3 * floats(3, 3, seed=99)
    return [
        {"x": np.einsum("ij,njhw->nihw", mixing, floats(1, 3, 6, 6, seed=s)).astype(np.float32), **extra} for s in range(count)
    ]


def layer_of(source: Any) -> str:
    names = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    return str([n.name for n in source.graph.node if n.op_type in names][-1])


def stored(graph: Graph, name: str) -> tuple[Array, Array, int]:
    """(integers, scale, axis) of what `name` multiplies by."""
    dequantise = node(graph, name).inputs[1].producer
    assert dequantise is not None and dequantise.op == "DequantizeLinear"
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in unpacked(graph.to_proto()).graph.initializer}
    return constants[dequantise.inputs[0].name], constants[dequantise.inputs[1].name], int(dequantise.attr("axis", 1))


@pytest.mark.parametrize("bits", [8, 3, 2])
@pytest.mark.parametrize(("body", "shapes", "axis"), LAYERS.values(), ids=LAYERS)
def test_integers_and_scales_are_those_of_rounding_to_nearest(
    body: str, shapes: dict[str, tuple[int, ...]], axis: int, bits: int
) -> None:
    source = behind_tanh(body, shapes)
    name = layer_of(source)
    graph = Graph.from_proto(source)
    context = core_context(feeds(source), effort="fast", node_bits=((name, bits),), node_activations=((name, 32),))
    for step in PASSES:
        step.run(graph, context)
        if isinstance(step, StoreWeights):
            break
    integers, scale, where = stored(graph, name)
    weight = next(onnx.numpy_helper.to_array(t) for t in source.graph.initializer if t.name == "w").astype(np.float64)
    weight = np.moveaxis(weight, axis, 0)  # a Gemm's are stored transposed
    assert where == 0
    assert scale.shape == weight.shape[:1]
    top = 2 ** (bits - 1) - 1
    steps = scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    np.testing.assert_array_equal(integers, np.clip(np.rint(weight / steps), -top, top))
    assert np.abs(integers).max() > 0.9 * top
    assert context.plan is not None and list(context.plan.stored.values()) == [bits]


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(("body", "shapes", "axis"), LAYERS.values(), ids=LAYERS)
def test_the_layer_computes_with_what_is_stored(body: str, shapes: dict[str, tuple[int, ...]], axis: int, bits: int) -> None:
    source = behind_tanh(body, shapes)
    name = layer_of(source)
    graph, _ = run_registry(source, feeds(source), node_bits=((name, bits),), node_activations=((name, 32),))
    made = graph.to_proto()
    onnx.checker.check_model(made, full_check=True)
    float_layer = Session(source)
    wanted = [float_layer.run(f)["y"] for f in feeds(source)]
    got = {}
    for level in (Optimisation.OFF, Optimisation.ALL):
        session = Session(made, optimisation=level)
        got[level] = [session.run(f)["y"] for f in feeds(source)]
        assert sqnr(wanted, got[level]) > (30 if bits == 8 else 20 if bits == 4 else 14)
    np.testing.assert_allclose(got[Optimisation.ALL], got[Optimisation.OFF], rtol=0, atol=2e-6)


def test_the_width_is_what_the_file_says(tmp_path: Path) -> None:
    source = behind_tanh(*LAYERS["conv"][:2])
    for bits in (8, 6, 5, 4, 3, 2):
        graph, _ = run_registry(source, feeds(source), node_bits=(("conv_2", bits),), node_activations=(("conv_2", 32),))
        graph.save(tmp_path / "m.onnx")
        counted = {x.node: (x.weight_bits, x.activation_bits) for x in count_layers(tmp_path / "m.onnx")}
        assert counted == {"conv_0": (8, 8), "conv_2": (bits, 32)}


def test_second_order_rounding_and_a_mean_error_of_zero() -> None:
    source = behind_tanh(*LAYERS["gemm"][:2])
    name, sample = layer_of(source), feeds(source, 200)
    errors, shifts = {}, {}
    weight, bias = (next(onnx.numpy_helper.to_array(t) for t in source.graph.initializer if t.name == n) for n in "wb")
    for effort in ("fast", "default"):
        asked = {"node_bits": ((name, 3),), "node_activations": ((name, 32),), "effort": effort}
        graph, context = Graph.from_proto(source), core_context(sample, **asked)
        for step in PASSES:
            step.run(graph, context)
            if isinstance(step, StoreWeights):
                break
        watched = graph.copy()
        watched.outputs = [v for v in watched.values() if v.name in ("f", node(watched, name).outputs[0].name)]
        session = Session(watched.to_proto(), optimisation=Optimisation.OFF)
        x = np.stack([session.run(s)["f"][0].astype(np.float64) for s in context.samples])
        integers, scale, _ = stored(graph, name)
        own_bias = node(graph, name).constant(2)
        assert own_bias is not None
        lost = x @ ((integers * scale.astype(np.float64)[:, None]).T - weight) + (own_bias.array() - bias)
        errors[effort], shifts[effort] = float(lost.var(axis=0).sum()), float(np.abs(lost.mean(axis=0)).max())
    assert errors["default"] < 0.85 * errors["fast"]
    assert shifts["default"] < 0.01 * np.sqrt(errors["default"])


def test_twice_in_a_row_rewrites_nothing_and_nothing_is_done_unasked() -> None:
    source = behind_tanh(*LAYERS["conv"][:2])
    for asked, count in (((("conv_2", 32),), 1), ((), 0)):
        graph, context = run_registry(source, feeds(source), node_activations=asked)
        again = StoreWeights().run(graph, context)
        assert again.rewrites == 0 and not again.refusals
        assert len(context.plan.stored if context.plan else {}) == count


@pytest.mark.parametrize(("body", "shapes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_says_why(body: str, shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    source = behind_tanh(body, shapes)
    name = layer_of(source)
    report = report_of_pass(source, node_activations=((name, 32),))
    assert report.rewrites == 0
    assert [(node, reason in said) for node, said in report.refusals] == [(name, True)]


def report_of_pass(source: Any, **settings: Any) -> Report:
    graph, context = Graph.from_proto(source), core_context(feeds(source), **settings)
    for step in PASSES:
        report = step.run(graph, context)
        if isinstance(step, StoreWeights):
            return report
    raise AssertionError("the pass is not in the registry")


def test_integers_that_another_layer_writes_are_told() -> None:
    text = "g (float[1, 3, 6, 6] x) => (float[a, b, c, d] y) { c = Conv (x, w0)  r = Relu (c)  y = Conv (r, w) }"
    source = model(text, w0=floats(4, 3, 3, 3), w=floats(6, 4, 3, 3))
    report = report_of_pass(source, node_activations=(("conv_2", 32),))
    assert report.rewrites == 1
    assert report.refusals == [("conv_2", WRITTEN)]


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_a_node_of_a_transformer(form: str, tmp_path: Path) -> None:
    layers = [x.node for x in count_layers(VIT)]
    chosen = layers[-1]
    nodes = {chosen: {"bits": 4, "activations": "float"}}
    report = compile_model(VIT, tmp_path / "m.onnx", format=form, data=DATA, nodes=nodes, latency=False).report
    counted = {x.node: (x.weight_bits, x.activation_bits) for x in count_layers(tmp_path / "m.onnx")}
    assert counted[chosen] == (4, 32)
    # Kernels sum by products with ones, which are no weights.
    assert {bits for name, bits in counted.items() if name != chosen and bits != (32, 32)} == {(8, 8)}
    rows = {p["name"]: p for p in report["passes"]}
    assert rows["store_weights"]["rewrites"] == 1
    assert {"node": chosen, "reason": "its activations stay float: only its weights are integers"} in rows["quantise"]["refusals"]
    compile_model(VIT, tmp_path / "again.onnx", latency=False, **recipe_of(report["recipe"], "report").compile_arguments())
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


ERRORS = {
    "nothing": ({"nodes": {"/pool/*": {"activations": "float"}}}, r"no such node multiplies by weights in float"),
    "integer": ({"format": "integer"}, r"--format integer: no float may stand between the ends"),
    "tensorrt": ({"target": "tensorrt"}, r"--target tensorrt: .*float = true"),
    "bits": ({"bits": 32}, r"--bits 32: nothing is quantised"),
    "word": ({"nodes": {"*": {"activations": "floats"}}}, r"activations is 'floats'; give one of 8, 6, 5, 4, 3, 2, or \"float\""),
    "mixed-integer": (
        {"bits": "mixed", "format": "integer", "activation_widths": "8,float", "limit": "bops=.5", "nodes": {}},
        r"--activation-widths float --format integer",
    ),
    "mixed-alone": (
        {"bits": "mixed", "activation_widths": "float", "limit": "bops=.5", "nodes": {}},
        r"--activation-widths float: no layer would compute in integers",
    ),
}


@pytest.mark.parametrize(("options", "said"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        compile_model(CNN, tmp_path / "m.onnx", **{"data": DATA, "nodes": {"/pointwise/*": {"activations": "float"}}, **options})


def test_without_samples_a_transformer_is_refused(tmp_path: Path) -> None:
    nodes = {count_layers(VIT)[-1].node: {"activations": "float"}}
    with pytest.raises(InputError, match="without samples all of them are quantised at run time"):
        compile_model(VIT, tmp_path / "m.onnx", nodes=nodes)


def test_mixed_precision_has_pairs_with_float_activations(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": "mixed", "mixed_by": "noise", "data": DATA, "latency": False, "widths": "4,8"}
    options |= {"limit": "bops=.9", "activation_widths": "8,float", "samples": 64}
    mixed = compile_model(VIT, tmp_path / "m.onnx", **options).report["mixed"]
    told = [(x["bits"], x["activation_bits"]) for x in mixed["layers"] if x["op"] != "Gather"]
    assert [(x.weight_bits, x.activation_bits) for x in count_layers(tmp_path / "m.onnx")] == told
    read = {a for b, a in told if b < 32}
    assert read == {8, 32}
    assert mixed["predicted"]["bops"] <= 0.9
    assert mixed["activation_widths"] == [8, 32]


def test_what_convolutions_write_has_integers_whatever_reads_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": "mixed", "mixed_by": "noise", "data": DATA, "latency": False, "samples": 64}
    mixed = compile_model(CNN, tmp_path / "m.onnx", limit="bops=2", activation_widths="8,float", **options).report["mixed"]
    told = [(x["bits"], x["activation_bits"]) for x in mixed["layers"]]
    assert [(x.weight_bits, x.activation_bits) for x in count_layers(tmp_path / "m.onnx")] == told
    # The last layer reads a pool, which can be float as well.
    assert [a for _, a in told] == [8] * (len(told) - 1) + [32]


def planner(**options: Any) -> Planner:
    """Two layers that read one group."""
    specs = [LayerSpec(f"l{i}", "Gemm", "linear", f"w{i}", None, 0, 100, 4) for i in range(2)]
    layers = tuple(LayerSensitivity(s, 1000, None, tuple(WidthCost(b, 1.0, 4.0**-b, 4.0**-b) for b in (4, 8))) for s in specs)
    source = SourceGroup(("t",), ("l0", "l1"), ("l0", "l1"), **options)
    costs = (WidthCost(8, 0.0, 1e-3, 1e-3), WidthCost(32, 0.0, 0.0, 0.0))
    found = Sensitivity(layers, 4, "kl", (GroupSensitivity(source, costs),))
    return Planner(found, Mixing((("bops", 5.0),), (4, 8), ("noise",), activations=(8, 32)), Settings(), 10_000)


def test_all_layers_in_float_are_no_answer() -> None:
    with pytest.raises(InputError, match="the limits let every layer read float"):
        planner().solve("noise", {"bops": 5.0})
    tight = planner().solve("noise", {"bops": 1.0})
    assert tight is not None and planner().activation_bits(tight) == {"l0": 8, "l1": 8}
    convolved = planner(convolved=True).solve("noise", {"bops": 5.0})
    assert convolved is not None and planner(convolved=True).activation_bits(convolved) == {"l0": 8, "l1": 8}
    uniform = planner().solve("uniform", {"bops": 5.0})
    assert uniform is not None and planner().activation_bits(uniform) == {"l0": 8, "l1": 8}
