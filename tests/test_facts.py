"""`qcompile inspect`: facts of a file against the file itself, as tables and as JSON; bad input."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from qcompile import compile_model
from qcompile.cli import cli
from qcompile.command_group import run
from qcompile.errors import InputError, ModelError
from qcompile.facts import facts

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, CALIBRATION = MODELS / "digits_cnn.onnx", str(MODELS / "digits_calib.npz")
QUICK: dict[str, Any] = {"data": CALIBRATION, "effort": "fast", "latency": False}


def save(path: Path, text: str) -> Path:
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]>\n{text}'), path)
    return path


def test_a_float_model() -> None:
    found = facts(CNN)
    model = onnx.load(CNN)
    assert found["opsets"] == {"ai.onnx": model.opset_import[0].version}
    assert found["parameters"] == sum(prod(t.dims) for t in model.graph.initializer)
    assert found["inputs"] == [{"name": "input", "type": "float", "shape": ["N", 1, 8, 8]}]
    assert found["file"]["size_bytes"] == CNN.stat().st_size
    assert found["macs"]["total"] == sum(layer["macs"] for layer in found["macs"]["layers"]) > 1_000_000
    assert (found["quantisation"], found["rescales"]["count"], found["nodes_at_run_time"]["quantised"]) == ([], 0, 0)
    assert facts(CNN, {"N": 3})["macs"]["total"] == 3 * found["macs"]["total"]


@pytest.mark.parametrize("format", ["qdq", "qoperator"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_files(format: str, bits: int, tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "q.onnx", **QUICK, format=format, bits=bits)
    found = facts(made.path)
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.path).graph.initializer}
    assert found["quantisation"]
    for entry in found["quantisation"]:
        assert 0 < entry["scale_low"] <= entry["scale_high"]
        assert (entry["channels"] == 1) <= (entry["scale_low"] == entry["scale_high"])
    assert {entry["type"] for entry in found["quantisation"]} >= {"uint8", "int8"}
    assert found["nodes_at_run_time"] == made.report["nodes"]
    assert found["fusion"] == made.report["fusion"]
    assert found["rescales"]["exact"] == found["rescales"]["count"] > 0
    zeros = sum(int((a == 0).sum()) for a in constants.values() if a.size >= 64)
    total = sum(a.size for a in constants.values() if a.size >= 64)
    assert found["sparsity"]["zeros"] == pytest.approx(zeros / total)
    assert found["metadata"]["qcompile.source_sha256"] == made.report["source"]["sha256"]


def test_sparsity_and_unknown_sizes(tmp_path: Path) -> None:
    weight = ", ".join(["0", "1"] * 32)
    path = save(
        tmp_path / "m.onnx", f"g (float[N, 8] x) => (float[N, 8] y) <float[8, 8] w = {{{weight}}}> {{ y = MatMul (x, w) }}"
    )
    found = facts(path, {"N": 5})
    assert found["sparsity"] == {"zeros": 0.5, "values": 64, "tensors": [{"tensor": "w", "zeros": 0.5, "values": 64}]}
    assert found["macs"] == {
        "total": 320,
        "inputs": {"x": [5, 8]},
        "layers": [
            {"node": "y", "op": "MatMul", "macs": 320, "parameters": 64, "weight_shape": [8, 8], "output_shape": [5, 8]},
        ],
    }
    with pytest.raises(InputError, match="--dim M: no input has a dimension of that name; there are: N"):
        facts(path, {"M": 2})


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", "g (float[2, 3] x, float[4, 5] z) => (float[a, b] y) { y = MatMul (x, z) }")
    found = facts(path)
    assert found["macs"]["total"] is None and "onnxruntime" in found["macs"]["reason"]
    with pytest.raises(ModelError, match="cannot be read"):
        facts(tmp_path / "none.onnx")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = compile_model(CNN, tmp_path / "q.onnx", **QUICK)
    assert run(cli, ["inspect", str(made.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts(made.path)))
    assert run(cli, ["inspect", str(made.path), "--layers", "--dim", "N=2"]) == 0
    out = capsys.readouterr().out
    assert "quantisation parameters" in out and "[2, 32, 8, 8]" in out
    assert run(cli, ["inspect", str(made.path)]) == 0
    out = capsys.readouterr().out
    assert "opset ai.onnx 21" in out and "multiply-accumulates: 1.29 M at input [1, 1, 8, 8]" in out
    assert "nodes at run time: 8 integer, 0 float" in out
    for args, said in (
        (["--json", "--nodes"], "--json prints everything"),
        (["--json", "--sparsity"], "--json prints everything"),
        (["--json", "--export-2:4", "layers"], "--json prints everything"),
        (["--dim", "N"], "--dim N: give NAME=SIZE"),
        (["--dim", "N=0"], "--dim N=0"),
        (["--dim", "M=2"], "no input has a dimension"),
    ):
        assert run(cli, ["inspect", str(made.path), *args]) == 2
        assert said in capsys.readouterr().err


def test_zero_points_by_channel_are_no_one_number(tmp_path: Path) -> None:
    text = "g (uint8[2, 3] x) => (float[2, 3] y) <float[3] s = {0.5, 1, 2}, uint8[3] z = {1, 2, 3}> "
    path = save(tmp_path / "m.onnx", text + "{ y = DequantizeLinear <axis = 1> (x, s, z) }")
    (entry,) = facts(path)["quantisation"]
    assert (entry["channels"], entry["scale_low"], entry["scale_high"], entry["zero_point"]) == (3, 0.5, 2.0, None)
    assert np.isfinite(entry["scale_high"])
