"""Where two models part: planted scales on three models, renamed tensors, float against quantised, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from qcompile import compile_model
from qcompile.cli import cli
from qcompile.command_group import run
from qcompile.diff import Difference, decibels, diff_models
from qcompile.errors import DataError, ModelError
from qcompile.graph import Graph
from qcompile.matching import Matching

MODELS = Path(__file__).resolve().parents[1] / "models"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
CNN, VIT = MODELS / "digits_cnn.onnx", MODELS / "digits_vit.onnx"
DIGITS, CALIBRATION = str(MODELS / "digits.npz"), str(MODELS / "digits_calib.npz")
LINEAR = ("Conv", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "QGemm")


def compiled(source: Path, path: Path, data: str = CALIBRATION, **options: Any) -> Path:
    return compile_model(source, path, data=data, effort="fast", latency=False, **options).path


Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A compiled model as `compiled` makes it, once for all tests that damage a copy of it."""
    made: dict[tuple[object, ...], Path] = {}

    def call(source: Path, data: str = CALIBRATION, **options: Any) -> Path:
        key = (source, data, *sorted(options.items()))
        if key not in made:
            made[key] = compiled(source, tmp_path_factory.mktemp("good") / "good.onnx", data, **options)
        return made[key]

    return call


def plant(source: Path, target: Path, which: int, *, weights: bool, factor: float = 1.5) -> str:
    """Multiply one scale of a linear node by `factor`: of its weights, or of its result. Gives the node's name."""
    model = onnx.load(source)
    constants = {t.name: t for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    linear = [n for n in model.graph.node if n.op_type in LINEAR]
    linear = [n for n in linear if _of_constants(n, makers, constants)]
    node = linear[which % len(linear)]
    if node.op_type.startswith("Q"):
        name = node.input[4] if weights else node.input[6]
    elif weights:
        name = makers[node.input[1]].input[1]
    else:
        reader = next(n for n in model.graph.node if node.output[0] in n.input and n.op_type == "QuantizeLinear")
        name = reader.input[1]
    scale = constants[name]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), name))
    onnx.save(model, target)
    return node.name or node.output[0]


def _of_constants(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type.startswith("Q"):
        return node.input[3] in constants
    maker = makers.get(node.input[1])
    return maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in constants


def names(point: Any) -> str:
    return str(point.layer)


@pytest.mark.parametrize("format", ["qdq", "qoperator"])
@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("source", [CNN, VIT], ids=["cnn", "vit"])
def test_a_planted_weight_scale_is_found(source: Path, which: int, format: str, good: Compile, tmp_path: Path) -> None:
    sound = good(source, format=format)
    layer = plant(sound, tmp_path / "bad.onnx", which, weights=True)
    found = diff_models(sound, tmp_path / "bad.onnx", DIGITS)
    assert found.first is not None and found.worst is not None
    assert (names(found.first), names(found.worst)) == (layer, layer)
    assert found.first.constants and found.first.constants[0][1] == pytest.approx(0.5, rel=1e-3)
    assert found.first.sqnr_db == pytest.approx(found.first.own_db)


@pytest.mark.parametrize("which", [0, 2])
def test_a_planted_activation_scale_is_found(which: int, tmp_path: Path) -> None:
    good = compiled(CNN, tmp_path / "good.onnx")
    layer = plant(good, tmp_path / "bad.onnx", which, weights=False)
    found = diff_models(good, tmp_path / "bad.onnx", DIGITS)
    assert found.first is not None
    assert names(found.first) == layer


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")
@pytest.mark.parametrize("task", ["mobilenet_v1", "resnet20_cifar10", "minilm_sst2"])
@pytest.mark.parametrize("which", [2, 11])
def test_a_planted_scale_in_a_real_model_is_found(task: str, which: int, good: Compile, tmp_path: Path) -> None:
    tasks = ZOO / "tasks.py"
    sound = good(ZOO / task / "model.onnx", f"{tasks}:{task}_calib", samples=8)
    layer = plant(sound, tmp_path / "bad.onnx", which, weights=True)
    found = diff_models(sound, tmp_path / "bad.onnx", f"{tasks}:{task}_eval", samples=4)
    assert found.first is not None and found.worst is not None
    assert (names(found.first), names(found.worst)) == (layer, layer)


def renamed(source: Path, target: Path) -> None:
    """Every node and inner tensor under another name."""
    model = onnx.load(source)
    graph = model.graph
    kept = {v.name for v in (*graph.input, *graph.output)}
    new: dict[str, str] = {}

    def fresh(name: str) -> str:
        return name if not name or name in kept else new.setdefault(name, f"t{len(new)}")

    for tensor in graph.initializer:
        tensor.name = fresh(tensor.name)
    for index, node in enumerate(graph.node):
        node.name = f"n{index}"
        node.input[:] = [fresh(n) for n in node.input]
        node.output[:] = [fresh(n) for n in node.output]
    del graph.value_info[:]
    onnx.save(model, target)


@pytest.mark.parametrize("source", [CNN, VIT], ids=["cnn", "vit"])
def test_models_of_other_names_are_matched_by_their_structure(source: Path, tmp_path: Path) -> None:
    good = compiled(source, tmp_path / "good.onnx")
    renamed(good, tmp_path / "same.onnx")
    same = diff_models(good, tmp_path / "same.onnx", DIGITS)
    assert same.first is None and same.worst is None
    assert all(p.identical for p in same.points)
    first, second = Graph.load(good), Graph.load(tmp_path / "same.onnx")
    assert len(Matching(first, second).nodes) == len(first.nodes)
    layer = plant(good, tmp_path / "bad.onnx", 2, weights=True)
    renamed(tmp_path / "bad.onnx", tmp_path / "other.onnx")
    found = diff_models(good, tmp_path / "other.onnx", DIGITS)
    assert found.first is not None
    assert names(found.first) == layer


def test_a_float_model_against_its_quantised_form(tmp_path: Path) -> None:
    quantised = compiled(CNN, tmp_path / "q.onnx", target="vnni")  # `any` reorders channels
    found = diff_models(CNN, quantised, DIGITS, samples=4)
    convs = {n.name for n in onnx.load(CNN).graph.node if n.op_type == "Conv"}
    assert len(convs & {names(p) for p in found.points}) >= 3
    assert all(p.sqnr_db is not None and p.sqnr_db > 15 for p in found.points if not p.identical)
    assert diff_models(CNN, quantised, DIGITS, samples=4, within_db=10.0).first is None
    assert (found.samples, found.within_db) == (4, None)


def test_an_input_that_both_worlds_have_left_behind(tmp_path: Path) -> None:
    """B clips behind its input, and quantises: what leads to the second tensor in B starts at an input that A has long freed."""
    a = save(tmp_path / "a.onnx", "g (float[1, 3] x) => (float[1, 3] y) { u = Relu (x) v = Exp (u) y = Neg (v) }")
    text = "{ u = Relu (x) w = Sqrt (u) p = Identity (x) v = Add (w, p) y = Neg (v) }"
    b = save(tmp_path / "b.onnx", f"g (float[1, 3] x) => (float[1, 3] y) {text}")
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), np.float32))
    found = diff_models(a, b, str(tmp_path / "d.npz"))
    assert [p.op for p in found.points] == ["Relu", "Neg"] or [p.op for p in found.points] == ["Relu"]
    assert found.points[0].identical


def test_a_model_against_itself() -> None:
    found = diff_models(CNN, CNN, DIGITS, samples=2)
    assert found.first is None and found.points
    assert json.loads(json.dumps(found.as_json()))["first"] is None


def test_decibels() -> None:
    one = [np.array([3.0, 4.0])]
    assert decibels(one, one) is None
    assert decibels(one, [np.array([3.0, 3.5])]) == pytest.approx(20)
    assert decibels([np.array([1.0, -np.inf])], [np.array([1.1, -np.inf])]) == pytest.approx(20)
    assert decibels(one, [np.array([3.0, np.nan])]) == -math.inf


def save(path: Path, text: str) -> Path:
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]>\n{text}'), path)
    return path


def test_models_with_nothing_in_common_and_other_inputs(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx", "g (float[1, 3] x) => (float[1, 3] y) { y = Relu (x) }")
    b = save(tmp_path / "b.onnx", "g (float[1, 3] x) => (float[1, 3] y) { y = Exp (x) }")
    c = save(tmp_path / "c.onnx", "g (float[1, 3] z) => (float[1, 3] y) { y = Relu (z) }")
    d = save(
        tmp_path / "d.onnx",
        "g (float[1, 3] x) => (float[1, n] y) <int64[2] s = {0, 0}> { t = Concat <axis = 1> (x, x) y = Relu (t) }",
    )
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), np.float32))
    data = str(tmp_path / "d.npz")
    for other, error, said in (
        (b, ModelError, "no tensor of the one was found in the other"),
        (c, ModelError, "has inputs"),
        (tmp_path / "none.onnx", ModelError, "cannot be read"),
        (d, ModelError, "no tensor of the one was found"),
    ):
        with pytest.raises(error, match=said):
            diff_models(a, other, data)
    with pytest.raises(DataError, match="no such file"):
        diff_models(a, a, "none.npz")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = compiled(CNN, tmp_path / "good.onnx")
    layer = plant(good, tmp_path / "bad.onnx", 1, weights=True)
    report = tmp_path / "d.json"
    args = ["diff", str(good), str(tmp_path / "bad.onnx"), "--eval", DIGITS]
    assert run(cli, [*args, "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert f"they part first at Conv {layer}; constants that differ: " in out
    assert f"most is added at Conv {layer}: " in out
    assert json.loads(report.read_text())["first"]["layer"] == layer
    assert run(cli, [*args, "--all", "--samples", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(out.splitlines())
    assert run(cli, ["diff", str(good), str(good), "--eval", DIGITS]) == 0
    assert "the models agree bit for bit" in capsys.readouterr().out
    assert run(cli, [*args, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert run(cli, ["diff", str(good), str(good)]) == 2
    assert run(cli, ["diff", str(good), str(good), "--eval", "none"]) == 2


def test_results_are_plain() -> None:
    assert Difference((), None, None, 1, (1, 1), None).as_json()["points"] == []


def test_a_layer_of_zeros_is_0_db_and_not_within_any_limit(tmp_path: Path) -> None:
    """Signal and error are alike there: 0 dB, which is a number and no missing one."""
    a = save(tmp_path / "a.onnx", "g (float[1, 3] x) => (float[1, 3] y) <float[1] c = {2}> { r = Relu (x)  y = Mul (r, c) }")
    b = save(tmp_path / "b.onnx", "g (float[1, 3] x) => (float[1, 3] y) <float[1] c = {0}> { r = Relu (x)  y = Mul (r, c) }")
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), np.float32))
    found = diff_models(a, b, str(tmp_path / "d.npz"), within_db=20.0)
    assert found.first is not None and found.first.op == "Mul"
    assert found.first.sqnr_db == 0.0


def test_values_that_are_not_finite_can_be_reported(tmp_path: Path) -> None:
    text = "g (float[1, 3] x) => (float[1, 3] y) <float[1] c = {{{}}}> {{ m = Mul (x, c)  r = Sqrt (m)  y = Neg (r) }}"
    a, b = (save(tmp_path / f"{name}.onnx", text.format(c)) for name, c in (("a", 2), ("b", -2)))
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), np.float32))
    report = tmp_path / "r.json"
    assert run(cli, ["diff", str(a), str(b), "--eval", str(tmp_path / "d.npz"), "--report", str(report), "--quiet"]) == 0
    points = {p["op"]: p for p in json.loads(report.read_text())["points"]}
    assert (points["Mul"]["finite"], points["Sqrt"]["finite"], points["Sqrt"]["sqnr_db"]) == (True, False, None)
    same = diff_models(b, b, str(tmp_path / "d.npz"))
    assert same.first is None and all(p.finite and p.own_db is None for p in same.points)
