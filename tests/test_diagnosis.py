"""The diagnosis against onnxruntime on the whole models, numpy integers on one layer, and counts of integers at the ends."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from core_models import CORE, core_context, floats, images, model, node, run_core, sqnr
from onnx import ModelProto
from test_round_weights import stored

from qcompile.context import Context
from qcompile.diagnosis import clipping_ends, diagnose
from qcompile.errors import PassError
from qcompile.graph import Array, Graph
from qcompile.passes.diagnose import Diagnose
from qcompile.passes.refine_layers import RefineLayers
from qcompile.pipeline import compile_model
from qcompile.plan import LayerRecord, ScaleClass
from qcompile.printing import console, print_report
from qcompile.qparams import ACTIVATIONS
from qcompile.report_file import report_json
from qcompile.runtime import Optimisation, Session

CONV = "Conv <pads = [1, 1, 1, 1]>"
MODELS = Path(__file__).resolve().parents[1] / "models"


def source() -> ModelProto:
    """Relu, Relu6, a residual sum, a depthwise layer, and an end in float."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[n, 5] y) {{
        a = {CONV} (x, w0, b0)  r = Clip(a, zero, six)
        d = Conv <group = 8, pads = [1, 1, 1, 1]> (r, w1)  s = Relu(d)
        e = {CONV} (s, w2)  t = Add(e, r)  u = Relu(t)
        p = GlobalAveragePool(u)  f = Flatten(p)  y = Gemm(f, w3, b3) }}"""
    return model(
        text,
        zero=np.float32(0),
        six=np.float32(6),
        w0=floats(8, 3, 3, 3, seed=1),
        b0=floats(8) + 1,
        w1=floats(8, 1, 3, 3, seed=2),
        w2=floats(8, 8, 3, 3, seed=3) / 8,
        w3=floats(8, 5, seed=4),
        b3=floats(5),
    )


FEEDS = images(8)
READS = {"conv_0": "x", "conv_2": "r", "conv_4": "s", "gemm_9": "f"}  # node -> what it reads in the float model
WRITES = {"conv_0": "r", "conv_2": "s", "conv_4": "e", "gemm_9": "y"}  # node -> its output, folded Relu/Clip included


def diagnosed(**settings: object) -> tuple[Graph, Context, dict[str, LayerRecord]]:
    graph, context, _ = run_core(source(), FEEDS, **settings)
    context.diagnose = True
    assert Diagnose().run(graph, context).rewrites == 0
    assert context.plan is not None and context.plan.layers is not None
    return graph, context, {layer.node: layer for layer in context.plan.layers}


def tensors(proto: ModelProto, names: list[str], level: Optimisation) -> list[dict[str, Array]]:
    """Values of inner tensors for every feed, from onnxruntime on the whole model."""
    shown = ModelProto()
    shown.CopyFrom(proto)
    present = {o.name for o in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    session = Session(shown, optimisation=level)
    return [session.run(feed) for feed in FEEDS]


@pytest.mark.parametrize("bits", [8, 4])
def test_what_reaches_and_leaves_each_layer_is_what_the_whole_models_hold(bits: int) -> None:
    graph, _, layers = diagnosed(bits=bits)
    assert list(layers) == list(READS)
    names = [n for n in {**dict.fromkeys(READS.values()), **dict.fromkeys(WRITES.values())} if n != "x"]
    wanted = tensors(source(), names, Optimisation.OFF)
    made = graph.to_proto()
    readers = {n: graph_node.inputs[0].name for n in READS for graph_node in [node(graph, n)]}
    # The dequantised form of the input x has a name of its own; the others keep theirs.
    got = tensors(made, [*dict.fromkeys(readers.values()), *WRITES.values()], Optimisation.ALL)
    for name, layer in layers.items():
        x = [w.get(READS[name], f["x"]) for w, f in zip(wanted, FEEDS, strict=True)]
        assert layer.sqnr_in_db == pytest.approx(sqnr(x, [g[readers[name]] for g in got]), abs=1e-3)
        y = [w[WRITES[name]] for w in wanted]
        assert layer.sqnr_out_db == pytest.approx(sqnr(y, [g[WRITES[name]] for g in got]), abs=1e-3)
        assert layer.bits == bits
        assert layer.own_db is not None and layer.sqnr_out_db is not None


def quantised(x: Array, place: ScaleClass) -> Array:
    """QuantizeLinear of u8 in float64."""
    return np.clip(np.rint(x.astype(np.float64) / float(place.scale)) + place.zero_point, 0, 255)


@pytest.mark.parametrize("name", ["conv_0", "conv_2", "conv_4"])
def test_own_contribution_is_the_layer_alone_in_a_float_model(name: str) -> None:
    """A model made by hand: Q/DQ at both ends of one convolution on dequantised weights, fed with the float model's tensors."""
    _, context, layers = diagnosed(bits=4)
    assert context.plan is not None
    site = next(s for s in context.plan.linears if s.node.name == name)
    assert site.result is not None and site.stored is not None and site.weight_scale is not None
    weight = site.stored.array().astype(np.float32) * site.weight_scale.reshape(-1, 1, 1, 1)
    bias = site.node.inputs[2].producer.constant(0).array() * (site.source.scale * site.weight_scale)  # type: ignore[union-attr]
    text = f"""g (float[1, c, 8, 8] a) => (float[1, k, 8, 8] z) {{
        i = QuantizeLinear(a, sa, za)  b = DequantizeLinear(i, sa, za)
        c = Conv <pads = [1, 1, 1, 1], group = {8 if site.depthwise else 1}> (b, w, bias)
        q = QuantizeLinear(c, sz, zz)  z = DequantizeLinear(q, sz, zz) }}"""
    alone = model(
        text,
        w=weight,
        bias=bias.astype(np.float32),
        sa=site.source.scale,
        za=np.uint8(site.source.zero_point),
        sz=site.result.scale,
        zz=np.uint8(site.result.zero_point),
    )
    session = Session(alone, optimisation=Optimisation.OFF)
    wanted = tensors(source(), ["r", "s", "e"], Optimisation.OFF)
    x = [w.get(READS[name], f["x"]) for w, f in zip(wanted, FEEDS, strict=True)]
    got = [session.run({"a": value})["z"] for value in x]
    # Float sums may fall on the other side of a tie: one step in some thousand values.
    assert layers[name].own_db == pytest.approx(sqnr([w[WRITES[name]] for w in wanted], got), abs=0.02)


def test_own_contribution_of_a_layer_that_ends_in_float_in_integers() -> None:
    _, context, layers = diagnosed(bits=4)
    assert context.plan is not None
    site = context.plan.linears[-1]
    assert site.weight_scale is not None
    q, scale = stored(site)
    bias = site.node.inputs[2].producer.constant(0).array().astype(np.int64)  # type: ignore[union-attr]
    wanted = tensors(source(), ["f"], Optimisation.OFF)
    integers = [quantised(w["f"], site.source).astype(np.int64) - site.source.zero_point for w in wanted]
    got = [(i @ q.astype(np.int64).T + bias) * (float(site.source.scale) * scale.astype(np.float64)) for i in integers]
    assert layers["gemm_9"].own_db == pytest.approx(sqnr([w["y"] for w in wanted], got), abs=1e-3)


def test_saturation_counts_the_integers_at_the_ends_that_clip() -> None:
    """Ranges narrowed by hand, so that much is clipped; the zero end of Relu and the six of Relu6 are not counted."""
    graph, context, _ = run_core(source(), FEEDS, until="dyadic_scales")
    plan = context.plan
    assert plan is not None
    narrowed = {s.node.name: s for s in plan.linears}
    for name in ("conv_2", "conv_4"):
        place = narrowed[name].result
        assert place is not None and place.scale_const is not None
        place.scale = np.float32(place.scale / 4)
        place.scale_const.assign(np.asarray(place.scale))
    for step in CORE[4:]:
        step.run(graph, context)
    context.diagnose = True
    Diagnose().run(graph, context)
    assert plan.layers is not None
    layers = {layer.node: layer for layer in plan.layers}
    made = graph.to_proto()
    quantisers = {n.name: n.outputs[0].name for n in graph.nodes if n.op == "QuantizeLinear"}
    got = tensors(made, list(quantisers.values()), Optimisation.ALL)

    def share(tensor: str, *ends: int) -> float:
        values = np.concatenate([g[quantisers[tensor + "_q"]].ravel() for g in got])
        return float(np.isin(values, ends).mean())

    assert layers["conv_0"].saturation == 0.0  # Relu6, whose range ends at 0 and 6
    assert share("r", 0) > 0.05  # though zeros are many
    assert layers["conv_2"].saturation == share("s", 255) > 0.005
    assert layers["conv_4"].saturation == share("e", 0, 255) > 0.01
    assert layers["gemm_9"].saturation == share("p", 255)  # its input, which Flatten only moves


@pytest.mark.parametrize(
    ("zero_point", "floor", "ceiling", "ends"),
    [
        pytest.param(0, None, None, [255], id="zero-end-of-a-positive-tensor"),
        pytest.param(128, None, None, [0, 255], id="both-signs"),
        pytest.param(255, None, None, [0], id="negative-tensor"),
        pytest.param(0, 0.0, float("inf"), [255], id="relu"),
        pytest.param(0, 0.0, 25.5, [], id="relu6"),
        pytest.param(0, 0.0, 25.58, [], id="relu6-within-a-step"),
        pytest.param(0, 0.0, 25.62, [255], id="relu6-in-a-narrower-range"),
        pytest.param(100, -10.0, 15.5, [], id="clip"),
        pytest.param(100, -10.2, 15.5, [0], id="clip-with-a-narrowed-floor"),
    ],
)
def test_which_ends_clip(zero_point: int, floor: float | None, ceiling: float | None, ends: list[int]) -> None:
    place = ScaleClass(0, floor=floor, ceiling=ceiling, scale=np.float32(0.1), zero_point=zero_point)
    assert clipping_ends(place, ACTIVATIONS["any"]) == ends


def test_a_symmetric_type_has_two_ends() -> None:
    assert clipping_ends(ScaleClass(0, scale=np.float32(0.1)), ACTIVATIONS["tensorrt"]) == [-128, 127]


@pytest.mark.parametrize("target", ["any", "vnni", "arm", "tensorrt"])
def test_every_target(target: str) -> None:
    _, _, layers = diagnosed(target=target)
    assert list(layers) == list(READS)
    for layer in layers.values():
        assert layer.own_db is not None and layer.own_db > 20


def test_method_and_gain() -> None:
    _, _, fast = diagnosed(effort="fast")
    assert {(layer.method, layer.gain_db) for layer in fast.values()} == {("nearest", None)}
    graph, context, _ = run_core(source(), FEEDS, until="integer_bias", bits=4)
    assert context.plan is not None
    context.diagnose = True
    RefineLayers().run(graph, context)
    learned = [s for s in context.plan.linears if s.method != "nearest"]
    assert learned
    assert all(s.gain_db is None or s.gain_db > 0 for s in learned)
    assert any(s.gain_db is not None for s in learned)


def test_a_dead_layer_has_no_error_and_is_never_the_worst() -> None:
    text = "g (float[n, 4] x) => (float[n, 3] y) { a = Gemm(x, w0)  r = Relu(a)  y = Gemm(r, w1, b) }"
    proto = model(text, w0=np.zeros((4, 6), np.float32), w1=floats(6, 3), b=np.zeros(3, np.float32))
    graph, context, _ = run_core(proto, [{"x": floats(2, 4)}])
    (first, last) = diagnose(graph, context, 4)
    assert (first.own_db, first.sqnr_out_db, last.own_db) == (None, None, None)
    assert first.sqnr_in_db is not None
    report_json({"layers": [first.as_json(), last.as_json()]})
    stream = io.StringIO()
    print_report({"layers": [first.as_json(), last.as_json()]}, console(stream))
    assert "costs most" not in stream.getvalue()


def test_no_more_samples_than_asked_for_and_nothing_twice() -> None:
    graph, context, _ = run_core(source(), FEEDS)
    few = diagnose(graph, context, 1)
    kept = core_context(FEEDS[:1])
    kept.plan, kept.float_graph, kept.samples = context.plan, context.float_graph, context.samples[:1]
    assert few == diagnose(graph, kept, 16)
    context.diagnose = True
    assert context.plan is not None
    context.plan.layers = few
    Diagnose().run(graph, context)
    assert context.plan.layers is few


def test_nothing_is_measured_unless_asked() -> None:
    graph, context, _ = run_core(source(), FEEDS)
    assert context.plan is not None
    Diagnose().run(graph, context)
    assert context.plan.layers is None
    assert diagnose(graph, core_context(FEEDS), 4) == []


def test_the_graph_stays_as_it_is() -> None:
    graph, context, _ = run_core(source(), FEEDS)
    before = graph.to_proto().SerializeToString(deterministic=True)
    diagnose(graph, context, 4)
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_a_plan_that_does_not_fit_its_graph_is_named() -> None:
    graph, context, _ = run_core(source(), FEEDS, until="quantise")
    assert context.plan is not None
    context.plan.linears[0].node.inputs[0] = graph.inputs[0]
    with pytest.raises(PassError, match="node 'conv_0': an input is not dequantised"):
        diagnose(graph, context, 4)


@pytest.mark.parametrize("format", ["qdq", "qoperator"])
def test_the_report_has_the_layers_and_the_file_the_same_bytes(format: str, tmp_path: Path) -> None:
    def compiled(name: str, **options: bool) -> tuple[bytes, dict[str, object]]:
        data = str(MODELS / "digits_calib.npz")
        made = compile_model(
            MODELS / "digits_cnn.onnx", tmp_path / name, data=data, samples=24, bits=4, format=format, latency=False, **options
        )
        return made.path.read_bytes(), made.report

    plain, without = compiled("a.onnx")
    measured, report = compiled("b.onnx", diagnose=True)
    assert plain == measured
    assert "layers" not in without
    layers = json.loads(report_json(report))["layers"]
    assert len(layers) > 3
    for layer in layers:
        assert set(layer) == {
            "node", "op", "bits", "activation_bits", "weights", "sqnr_in_db", "sqnr_out_db", "own_db", "method", "gain_db",
            "range", "saturation",
        }  # fmt: skip
        assert layer["op"] in ("Conv", "Gemm")
        assert 0 <= layer["saturation"] < 0.1
        low, high = layer["range"]
        assert low <= 0 <= high
    names = {n.name for n in onnx.load(MODELS / "digits_cnn.onnx").graph.node}
    assert {layer["node"] for layer in layers} <= names
    stream = io.StringIO()
    print_report(report, console(stream))
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("costs most: ")]
    worst = sorted(layers, key=lambda layer: layer["own_db"])[:3]
    assert len(lines) == 3
    for line, layer in zip(lines, worst, strict=True):
        assert f"{layer['op']} {layer['node']} (4 bits): {layer['own_db']:.2f} dB alone" in line
