"""Measuring two files: integer inputs, fixed results, what happens without data; and the report as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from qcompile.accuracy import Accuracy
from qcompile.bench import bench_models
from qcompile.check import judge, measure
from qcompile.checking import check_models
from qcompile.data import load_dataset
from qcompile.errors import DataError, InputError, ModelError
from qcompile.quantised_inputs import feeds_map, input_quantisation
from qcompile.report_file import check_report_path, file_record, report_json, write_report
from qcompile.samples import model_inputs

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
FLOAT = HEAD + "g (float[1, 3] x) => (float[1, 3] y) { y = Relu (x) }"
BYTES = HEAD + (
    "g (uint8[1, 3] x) => (float[1, 3] y) <float s = {0.25}, uint8 z = {128}> "
    "{ r = Identity (x) d = DequantizeLinear (r, s, z) y = Relu (d) }"
)
TOKENS = HEAD + "g (int64[1, 3] x) => (float[1, 3] y) { y = Cast <to = 1> (x) }"


def save(path: Path, text: str) -> Path:
    onnx.save(parser.parse_model(text), path)
    return path


@pytest.fixture
def float_model(tmp_path: Path) -> Path:
    return save(tmp_path / "float.onnx", FLOAT)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.npz"
    rows = np.array([[1.0, -2.0, 3.25], [40.0, 0.25, -40.0], [0.125, 0.375, 0.0]], np.float32)
    np.savez(path, x=rows, labels=np.array([2, 0, 1]))
    return str(path)


def test_integer_inputs_are_quantised_as_the_file_says(float_model: Path, data: str, tmp_path: Path) -> None:
    quantised = save(tmp_path / "q.onnx", BYTES)
    dataset = load_dataset(data, model_inputs(onnx.load(float_model)))
    accuracy = measure(float_model, quantised, dataset, latency=False).accuracy
    assert accuracy is not None
    # By hand: 40/0.25 + 128 = 288 saturates at 255 -> 31.75; 0.125/0.25 = 0.5 -> 0 and 0.375/0.25 = 1.5 -> 2 (half to even).
    exact = np.array([[1, 0, 3.25], [40, 0.25, 0], [0.125, 0.375, 0]])
    given = np.array([[1, 0, 3.25], [31.75, 0.25, 0], [0, 0.5, 0]])
    expected = 10 * math.log10((exact**2).sum() / ((exact - given) ** 2).sum())
    assert accuracy.sqnr_db == pytest.approx(expected, rel=1e-12)
    assert accuracy.samples == 3


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        pytest.param(
            "float[1, 3] y) <float s = {0.5}, uint8 z = {7}> { y = DequantizeLinear (x, s, z) }", (0.5, 7), id="DequantizeLinear"
        ),
        pytest.param("float[1, 3] y) <float s = {0.5}> { y = DequantizeLinear (x, s) }", (0.5, 0), id="no zero point"),
        pytest.param(
            "float[1, 3] y) <uint8 z = {7}> { s = Constant <value = float {0.5}> () y = DequantizeLinear (x, s, z) }",
            (0.5, 7),
            id="Constant node",
        ),
        pytest.param(
            "uint8[1, 3] y) <float s = {0.5}, uint8 z = {7}, float t = {2.0}> "
            "{ y = com.microsoft.QLinearAdd (x, s, z, x, t, z, t, z) }",
            (0.5, 7),
            id="QLinearAdd",
        ),
        pytest.param(
            "float[3] y) <float s = {0.5}, uint8 z = {7}, int64[1] n = {3}> "
            "{ r = Reshape (x, n) y = DequantizeLinear (r, s, z) }",
            (0.5, 7),
            id="behind a Reshape",
        ),
    ],
)
def test_scale_of_an_integer_input(body: str, parameters: tuple[float, int]) -> None:
    model = parser.parse_model(f"{HEAD} g (uint8[1, 3] x) => ({body}")
    found = input_quantisation(model, "x", Path("m.onnx"))
    assert (float(found.scale), found.zero_point) == parameters


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(
            "g (float[1, 3] z) => (float[1, 3] y) { y = Relu (z) }", "has inputs ['z'], the float model ['x']", id="name"
        ),
        pytest.param("g (int64[1, 3] x) => (float[1, 3] y) { y = Cast <to = 1> (x) }", "input 'x' is int64", id="type"),
        pytest.param("g (uint8[1, 3] x) => (float[1, 3] y) { y = Cast <to = 1> (x) }", "no node says which scale", id="no scale"),
        pytest.param(
            "g (uint8[1, 3] x, float s) => (float[1, 3] y) { y = DequantizeLinear (x, s) }", "has inputs ['s', 'x']", id="input"
        ),
        pytest.param(
            "g (uint8[1, 3] x) => (float[1, 3] y) <float[3] s = {1, 2, 3}> { y = DequantizeLinear <axis = 1> (x, s) }",
            "'s' holds 3 values",
            id="per channel",
        ),
        pytest.param(
            "g (uint8[1, 3] x) => (float[1, 3] y) <float o = {1}> { s = Exp (o) y = DequantizeLinear (x, s) }",
            "'s' is no constant",
            id="computed",
        ),
    ],
)
def test_inputs_that_do_not_pair_up(text: str, said: str, float_model: Path) -> None:
    inputs = model_inputs(onnx.load(float_model))
    with pytest.raises(ModelError) as caught:
        feeds_map(inputs, parser.parse_model(HEAD + text), Path("m.onnx"))
    assert said in str(caught.value)
    assert "m.onnx" in str(caught.value)


def test_equal_inputs_need_no_map(float_model: Path) -> None:
    model = onnx.load(float_model)
    assert feeds_map(model_inputs(model), model, float_model) is None


def test_each_sample_runs_once_and_is_reported(float_model: Path, data: str) -> None:
    seen: list[tuple[str, int, int | None]] = []
    dataset = load_dataset(data, model_inputs(onnx.load(float_model)))
    found = measure(float_model, float_model, dataset, rounds=1, progress=lambda *step: seen.append(step))
    assert seen == [("evaluate", 0, 3), ("evaluate", 1, 3), ("evaluate", 2, 3), ("latency", 0, None)]
    assert found.accuracy is not None
    assert found.accuracy.identical
    assert (found.accuracy.lost, found.accuracy.won) == (0, 0)
    assert found.latency is not None
    assert found.warnings == ()


def test_without_data_latency_is_measured_on_made_up_feeds(float_model: Path) -> None:
    found = measure(float_model, float_model, None, rounds=1)
    assert found.accuracy is None
    assert found.accuracy_json() is None
    assert found.latency_json() is not None
    assert found.size_json() == {"float": float_model.stat().st_size, "quantised": float_model.stat().st_size, "ratio": 1.0}


def test_without_data_token_inputs_have_no_latency(tmp_path: Path) -> None:
    model = save(tmp_path / "tokens.onnx", TOKENS)
    found = measure(model, model, None)
    assert found.latency is None
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("latency was not measured: input 'x' (int64)")
    with pytest.raises(DataError, match="token inputs need --data"):
        bench_models(model, model)


def accuracy(**changes: object) -> Accuracy:
    fields: dict[str, object] = {
        "samples": 1000, "sqnr_db": 20.0, "cosine": 1.0, "top1_agreement": 0.9, "metric": "top1", "float_score": 0.9,
        "quantised_score": 0.85, "drop_points": 5.0, "lost": 50, "won": 0, "identical": False,
    }  # fmt: skip
    return Accuracy(**{**fields, **changes})  # type: ignore[arg-type]


def test_judgement() -> None:
    assert judge(accuracy(), 1.0).outcome == "fail"
    assert judge(accuracy(), 10.0).outcome == "pass"
    assert judge(accuracy(), 5.0).outcome == "inconclusive"
    assert judge(accuracy(identical=True, lost=None, won=None, samples=1), 0.0).outcome == "pass"
    with pytest.raises(DataError, match="with labels"):
        judge(accuracy(lost=None, won=None), 1.0)


def test_report_of_a_check(float_model: Path, data: str) -> None:
    report = check_models(float_model, float_model, data, max_drop=0.5, samples=2, latency=False)
    assert set(report) == {
        "qcompile", "source", "output", "settings", "accuracy", "latency_ms", "size_bytes", "nodes", "fusion", "warnings",
        "verdict", "seconds", "peak_rss_mb", "gate", "baseline", "recipe",
    }  # fmt: skip
    assert report["accuracy"]["samples"] == 2
    assert {key: value for key, value in report["settings"].items() if value is not None and value is not False} == {
        "eval": data, "max_drop": 0.5, "samples": 2, "seed": 0, "on_inconclusive": "fail",
    }  # fmt: skip
    assert report["gate"]["outcome"] == "pass"
    assert report["nodes"] == {"quantised": 0, "float": 1, "float_ops": {"Relu": 1}}
    assert json.loads(report_json(report)) == report


def test_a_float_model_with_a_drop_limit_needs_labels_before_it_runs(float_model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), np.float32))
    with pytest.raises(DataError, match="holds no labels"):
        check_models(float_model, float_model, str(tmp_path / "d.npz"), max_drop=1.0)


# --- the report as a file ------------------------------------------------------------------------------------------


def test_json_is_stable() -> None:
    one = {"b": math.inf, "a": [np.float32(0.5), np.int64(3), (1, 2)], "p": Path("x/y")}
    other = {key: one[key] for key in ("p", "a", "b")}
    assert report_json(one) == report_json(other)
    assert json.loads(report_json(one)) == {"a": [0.5, 3, [1, 2]], "b": None, "p": str(Path("x/y"))}


@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["nan", "-inf"])
def test_json_refuses_what_no_report_holds(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        report_json({"sqnr_db": value})


def test_write_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old and longer than the new one")
    write_report({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    reference = tmp_path / "reference"
    reference.touch()
    assert path.stat().st_mode == reference.stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_write_keeps_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "r.json"
    link.symlink_to(tmp_path / "there" / "r.json")
    write_report({"a": 1}, link)
    assert link.is_symlink()
    assert json.loads((tmp_path / "there" / "r.json").read_text()) == {"a": 1}


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
def test_write_to_a_device() -> None:
    check_report_path("/dev/null")
    write_report({"a": 1}, "/dev/null")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda folder: folder, "a folder", id="folder"),
        pytest.param(lambda folder: folder / "no" / "r.json", "does not exist", id="no folder"),
        pytest.param(lambda folder: folder / "r.onnx", "the name of a model", id="model"),
    ],
)
def test_paths_that_are_refused(make: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        check_report_path(make(tmp_path))
    if said != "the name of a model":
        with pytest.raises(InputError, match="cannot be written"):
            write_report({}, make(tmp_path))


def test_file_record(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, example of SHA-256
    assert file_record(path) == {"path": str(path), "sha256": digest}
    with pytest.raises(ModelError, match="cannot be read"):
        file_record(tmp_path / "missing")
