"""Sparse models end to end: which layers, what they keep, every format, compressed storage, the report, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_models import core_context, float_outputs, floats, images, model, outputs, sqnr
from onnx import ModelProto, TensorProto, numpy_helper
from runtime_marks import needs_conv_integer

from qcompile import compile_model
from qcompile.audit import audit
from qcompile.cli import cli
from qcompile.command_group import run as run_command
from qcompile.context import Settings
from qcompile.errors import InputError, ModelError
from qcompile.graph import Array, Graph
from qcompile.interpret import Interpreter
from qcompile.layer_counts import count_layers, share_that_follows, totals
from qcompile.passes.pair_channels import PairChannels
from qcompile.passes.sparsify import Sparsify
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session
from qcompile.sparsity import Pattern, Rule, Share

MODELS = Path(__file__).resolve().parents[1] / "models"
DATA = str(MODELS / "digits_calib.npz")
CONV = "Conv <pads = [1, 1, 1, 1]>"


def source(classes: int = 5) -> ModelProto:
    text = f"""g (float[1, 4, 8, 8] x) => (float[n, {classes}] y) {{
        a = {CONV} (x, w0, b0)  r = Relu(a)  d = Conv <group = 16, pads = [1, 1, 1, 1]> (r, w1)  e = {CONV} (d, w2, b2)
        s = Relu(e)  m = Conv <group = 2> (s, w3)  t = Relu(m)  p = GlobalAveragePool(t)  f = Flatten(p)
        h = Gemm(f, w4, b4)  z = Relu(h)  y = Gemm <transB = 1> (z, w5) }}"""
    weights = {
        "w0": floats(16, 4, 3, 3, seed=1) / 4,
        "b0": floats(16),
        "w1": floats(16, 1, 3, 3, seed=2) / 3,
        "w2": floats(16, 16, 3, 3, seed=3) / 12,
        "b2": floats(16, seed=9),
        "w3": floats(64, 8, 1, 1, seed=4) / 3,
        "w4": floats(64, 32, seed=5) / 8,
        "b4": floats(32, seed=6),
        "w5": floats(classes, 32, seed=7) / 6,
    }
    return model(text, **weights)


FEEDS = images(24, channels=4)


def sparse(rule: str = "2:4", made: ModelProto | None = None, **settings: Any) -> tuple[Graph, Report, Any]:
    graph = Graph.from_proto(source() if made is None else made)
    context = core_context(FEEDS, sparsity=rule, **settings)
    report = Sparsify().run(graph, context)
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    assert Sparsify().run(graph, context).rewrites == 0
    return graph, report, context


def reduction_last(node: Any) -> Array:
    weight = node.constant(1).array()
    if node.op == "Conv":
        return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    return weight if node.attr("transB", 0) else weight.T


def test_layers_and_refusals() -> None:
    graph, report, context = sparse()
    assert [r.node for r in context.sparse] == ["conv_3", "conv_5", "gemm_9"]
    assert dict(report.refusals) == {
        "conv_0": "first layer: it reads the model's input",
        "conv_2": "depthwise: one input channel a group",
        "gemm_11": "fewer than 512 weights",
    }
    for node in graph.nodes:
        if node.name in {r.node for r in context.sparse}:
            blocks = reduction_last(node).reshape(-1, 4)
            assert (np.count_nonzero(blocks, axis=1) <= 2).all()
    assert all(r.zeros * 2 == r.weights for r in context.sparse)


def test_what_is_excluded_and_what_comes_last_stay_dense() -> None:
    _, report, context = sparse(made=source(classes=24), exclude=("conv_3",))
    assert [r.node for r in context.sparse] == ["conv_5", "gemm_9"]
    assert dict(report.refusals)["conv_3"] == "excluded by --exclude"
    assert dict(report.refusals)["gemm_11"] == "last layer: its outputs are the model's"


def test_a_large_last_layer_is_made_sparse() -> None:
    _, _, context = sparse(made=source(classes=64))
    assert "gemm_11" in {r.node for r in context.sparse}


def test_channels_that_do_not_divide_into_blocks() -> None:
    with pytest.raises(ModelError, match=r"--sparsity 3:5: no layer can be made sparse \(4 x .*blocks of 5"):
        sparse("3:5")


def test_a_weight_read_by_two_nodes_stays_dense() -> None:
    text = f"""g (float[1, 16, 8, 8] x) => (float[1, 16, 8, 8] y) {{
        a = {CONV} (x, w0)  b = {CONV} (a, w)  c = {CONV} (b, w)  d = {CONV} (c, w1)  y = {CONV} (d, w2) }}"""
    weights = {name: floats(16, 16, 3, 3, seed=i) / 12 for i, name in enumerate(["w0", "w", "w1", "w2"])}
    graph = Graph.from_proto(model(text, **weights))
    report = Sparsify().run(graph, core_context(images(4, channels=16), sparsity="2:4"))
    assert report.skipped["its weights are shared with another node, whose inputs differ"] == 2


@pytest.mark.parametrize("rule", ["2:4", "1:4", "0.5"])
def test_obs_keeps_more_than_the_others(rule: str) -> None:
    wanted = float_outputs(source(), FEEDS)
    kept = {c: sqnr(wanted, outputs(sparse(rule, criterion=c)[0], FEEDS)) for c in ("magnitude", "wanda", "obd", "obs")}
    assert max(kept, key=lambda c: kept[c]) == "obs"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_of_zeros_is_what_was_asked_for(scope: str) -> None:
    for criterion in ("magnitude", "wanda", "obd", "obs"):
        _, _, context = sparse("0.6", sparsity_scope=scope, criterion=criterion)
        zeros, weights = sum(r.zeros for r in context.sparse), sum(r.weights for r in context.sparse)
        assert abs(zeros / weights - 0.6) < 0.02
        own = [r.zeros / r.weights for r in context.sparse]
        assert (max(own) - min(own) < 0.05) == (scope == "layer")


def test_a_model_with_nothing_to_prune() -> None:
    tiny = model("g (float[1, 4] x) => (float[1, 2] y) { y = MatMul(x, w) }", w=floats(4, 2))
    with pytest.raises(ModelError, match=r"no layer can be made sparse \(1 x fewer than 512 weights\)"):
        Sparsify().run(Graph.from_proto(tiny), core_context([{"x": floats(1, 4)}], sparsity="2:4"))


# --- whole compilations ------------------------------------------------------------------------------------------------


def compiled(path: Path, name: str = "digits_cnn", **options: Any) -> dict[str, Any]:
    given = {"sparsity": "2:4", "data": DATA, "samples": 16, "latency": False, **options}
    return compile_model(MODELS / f"{name}.onnx", path, **given).report


def digits(count: int = 40) -> list[Array]:
    images_ = np.load(MODELS / "digits.npz")
    name = next(k for k in images_.files if not k.startswith(("calib", "labels")))
    return [images_[name][i : i + 1] for i in range(count)]


def run(path: Path, level: Optimisation = Optimisation.ALL) -> list[Array]:
    session = Session(path, optimisation=level)
    name = onnx.load(path).graph.input[0].name
    return [next(iter(session.run({name: x}).values())) for x in digits()]


@pytest.mark.parametrize(
    ("name", "bits", "format_"),
    [("digits_cnn", 8, "qdq"), ("digits_cnn", 4, "qoperator"), ("digits_vit", 8, "qoperator"), ("digits_vit", 4, "qdq")],
)
def test_compressed_files_give_the_same_bits(tmp_path: Path, name: str, bits: int, format_: str) -> None:
    small, dense = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    options: dict[str, Any] = {"bits": bits, "format": format_, "effort": "fast"}
    report = compiled(small, name, **options)
    compiled(dense, name, sparse_storage="dense", **options)
    assert any(n.op_type == "Sparse24" for n in onnx.load(small).graph.node)
    assert not any(f.name == "Sparse24" for f in onnx.load(dense).functions)
    for a, b in zip(run(small), run(dense), strict=True):
        assert a.tobytes() == b.tobytes()
    assert audit(small).not_fused == []
    assert audit(small).integer_weight_bytes == audit(dense).integer_weight_bytes
    first, second = count_layers(small), count_layers(dense)
    assert totals(first) == totals(second)
    for layer, other in zip(first, second, strict=True):
        assert (layer.matrix == other.matrix).all()
    sparse_ones = [layer for layer in first if layer.follows(Pattern(2, 4))]
    assert len(sparse_ones) >= len(report["sparsity"]["layers"])
    if bits == 8:
        assert np.abs(np.concatenate([x.matrix.ravel() for x in first if x.weight_bits == 8]).astype(int)).max() <= 127


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_weights_are_as_small_as_promised(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "small.onnx"
    compiled(path, bits=bits)
    stored = {i.name: i for i in onnx.load(path).graph.initializer}
    for node in onnx.load(path).graph.node:
        if node.op_type != "Sparse24":
            continue
        values, indices = (stored[name] for name in node.input)
        weights = int(np.prod(values.dims)) * 2
        assert values.data_type == (TensorProto.INT8 if bits == 8 else TensorProto.INT4)
        assert 8 * (len(values.raw_data) + len(indices.raw_data)) / weights == (5 if bits == 8 else 3)


@needs_conv_integer
def test_the_integer_format_and_the_interpreter_agree(tmp_path: Path) -> None:
    paths = {f: tmp_path / f"{f}.onnx" for f in ("qoperator", "integer")}
    for format_, path in paths.items():
        compiled(path, format=format_)
    name = onnx.load(paths["integer"]).graph.input[0].name
    interpreter = Interpreter(paths["qoperator"])
    for x, fused, integer in zip(digits(), run(paths["qoperator"]), run(paths["integer"]), strict=True):
        assert fused.tobytes() == integer.tobytes()
        assert next(iter(interpreter.run({name: x}).values())).tobytes() == fused.tobytes()


def test_the_same_file_twice(tmp_path: Path) -> None:
    for name in "ab":
        compiled(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_float_model_is_written_with_bits_32(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    report = compiled(path, bits=32)
    layers = count_layers(path)
    assert {x.weight_bits for x in layers} == {32}
    assert share_that_follows(layers, Pattern(2, 4)) == pytest.approx(report["sparsity"]["share_that_follows"])
    assert report["complexity"]["float"]["bops"] > 1.5 * report["complexity"]["quantised"]["bops"]
    assert report["nodes"]["quantised"] == 0


@pytest.mark.parametrize("rule", [Share(0.5), Pattern(1, 4)], ids=str)
def test_other_rules_compile(tmp_path: Path, rule: Rule) -> None:
    path = tmp_path / "m.onnx"
    report = compiled(path, sparsity=str(rule))
    zeros, weights = report["sparsity"]["zeros"], report["sparsity"]["weights"]
    assert abs(zeros / weights - rule.zeros) < 0.02
    if isinstance(rule, Pattern):
        assert report["sparsity"]["share_that_follows"] > 0.5


def test_weight_only_holds_zeros(tmp_path: Path) -> None:
    path = tmp_path / "w4.onnx"
    report = compiled(path, "digits_vit", bits=4, activations="float", symmetric=True, spelling="portable")
    assert report["sparsity"]["zeros"] > 0
    stored = {i.name: i for i in onnx.load(path).graph.initializer}
    found = 0
    for node in onnx.load(path).graph.node:
        if node.op_type == "DequantizeLinear" and stored[node.input[0]].data_type == TensorProto.INT4:
            integers = numpy_helper.to_array(stored[node.input[0]]).astype(np.int8).T
            found += integers.shape[1] % 4 == 0 and bool((np.count_nonzero(integers.reshape(-1, 4), axis=1) <= 2).all())
    assert found >= len(report["sparsity"]["layers"])


def test_without_data_only_magnitude(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--sparsity 2:4 --criterion obs: .*give --data, or --criterion magnitude"):
        compile_model(MODELS / "digits_vit.onnx", tmp_path / "m.onnx", sparsity="2:4")
    made = compile_model(MODELS / "digits_vit.onnx", tmp_path / "m.onnx", sparsity="2:4", criterion="magnitude", latency=False)
    assert made.report["sparsity"]["share_that_follows"] > 0.8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": "4:2"}, "--sparsity 4:2: N:M keeps N of every M"),
        ({"sparsity": 1.0}, "--sparsity 1.0: the share of zeros lies above 0 and below 1"),
        ({"sparsity": "2:4", "criterion": "hope"}, "--criterion hope: choose one of magnitude, wanda, obd, obs"),
        ({"sparsity": None, "criterion": "obd"}, "--criterion obd: .*give --sparsity with it"),
        ({"sparsity": None, "sparsity_scope": "global"}, "--sparsity-scope global: give --sparsity with it"),
        ({"sparsity_scope": "global"}, "--sparsity 2:4 --sparsity-scope global: N:M is the same in every layer"),
        ({"sparse_storage": "zip"}, "--sparse-storage zip: choose one of compressed, dense"),
        ({"sparsity": None, "bits": 32}, "--bits 32 writes a float model"),
        ({"bits": 32, "format": "integer"}, "--bits 32 --format integer: nothing is quantised"),
        ({"bits": 32, "inputs_as": "uint8"}, "--bits 32 --inputs-as uint8: nothing is quantised"),
        ({"bits": 32, "target": "arm"}, "--bits 32 --target arm: nothing is quantised"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        compiled(tmp_path / "m.onnx", **options)
    assert "\n" not in str(caught.value)


def test_inspect_says_which_layers_are_sparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    compiled(path)
    assert run_command(cli, ["inspect", str(path), "--sparsity"]) == 0
    printed = capsys.readouterr().out
    assert "% of the weights (depthwise aside) follow 2:4; " in printed
    assert "not 2:4 along the input channels" in printed
    assert run_command(cli, ["inspect", str(path), "--sparsity", "--require-sparsity", "0.5"]) == 0
    assert run_command(cli, ["inspect", str(MODELS / "digits_cnn.onnx"), "--sparsity", "2:4", "--require-sparsity", "0.5"]) == 3
    assert "0.0 % of the weights follow 2:4, less than 50 %" in capsys.readouterr().err
    assert run_command(cli, ["inspect", str(path), "--require-sparsity", "0.5"]) == 2
    assert "--require-sparsity goes with --sparsity" in capsys.readouterr().err
    assert run_command(cli, ["inspect", str(path), "--sparsity", "5:4"]) == 2


def test_models_that_hold_integers_already_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    compile_model(MODELS / "digits_cnn.onnx", path, data=DATA, latency=False, effort="fast")
    for options in ({"sparsity": "2:4"}, {"prune_channels": 0.3}):
        with pytest.raises(InputError, match=r"the model already holds Q/DQ, whose integers are kept; give the float model"):
            compile_model(path, tmp_path / "again.onnx", data=DATA, latency=False, **options)  # type: ignore[arg-type]


def test_channels_of_sparse_weights_keep_their_order() -> None:
    assert Settings(sparsity="2:4").blocked
    assert not Settings(sparsity="0.5").blocked
    graph = Graph.from_proto(source())
    context = core_context(FEEDS, sparsity="2:4")
    report = PairChannels().run(graph, context)
    assert (report.rewrites, dict(report.skipped)) == (0, {"N:M blocks of weights must stay together": 1})
