"""Benchmarks: what is measured of each model, multiply-accumulates by hand, batches, cold starts, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from qcompile.bench import bench_models, operator_times
from qcompile.cli import cli
from qcompile.cold_start import measure_cold_starts, measure_here
from qcompile.command_group import run
from qcompile.errors import DataError, InputError, ModelError
from qcompile.latency import median_interval
from qcompile.macs import count_macs, sized_feeds
from qcompile.samples import model_inputs

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, VIT = MODELS / "digits_cnn.onnx", MODELS / "digits_vit.onnx"
HEAD = '<ir_version: 9, opset_import: ["" : 17]>\n'


def save(path: Path, text: str) -> Path:
    onnx.save(parser.parse_model(HEAD + text), path)
    return path


CASES = [
    pytest.param(
        "g (float[N, 3, 8, 8] x) => (float[N, m, p, q] y) <float[6, 3, 3, 3] w> { y = Conv <strides = [2, 2], pads = P> (x, w) }",
        (2, 3, 8, 8), 2 * 6 * 16 * 27, id="conv",
    ),
    pytest.param(
        "g (float[1, 4, 8, 8] x) => (float[1, m, p, q] y) <float[4, 1, 3, 3] w> { y = Conv <group = 4> (x, w) }",
        (1, 4, 8, 8), 4 * 36 * 9, id="depthwise",
    ),
    pytest.param(
        "g (float[1, 4, 5, 5] x) => (float[1, m, p, q] y) <float[4, 3, 2, 2] w> { y = ConvTranspose (x, w) }",
        (1, 4, 5, 5), 4 * 25 * 3 * 4, id="transposed",
    ),
    pytest.param("g (float[2, 7, 5] x) => (float[2, 7, 7] y) { t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t) }",
                 (2, 7, 5), 2 * 7 * 7 * 5, id="two activations"),
    pytest.param("g (float[5, 2] x) => (float[2, 3] y) <float[3, 5] w> { y = Gemm <transA = 1, transB = 1> (x, w) }",
                 (5, 2), 2 * 3 * 5, id="gemm"),
    pytest.param("g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }", (2, 3), 0, id="none"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shape", "macs"), CASES)
def test_multiply_accumulates(text: str, shape: tuple[int, ...], macs: int, tmp_path: Path) -> None:
    text = text.replace("pads = P", "pads = [1, 1, 1, 1]")
    for initializer in ("float[6, 3, 3, 3] w", "float[4, 1, 3, 3] w", "float[4, 3, 2, 2] w", "float[3, 5] w"):
        if initializer in text:
            size = int(np.prod([int(n) for n in initializer[6:-3].split(",")]))
            text = text.replace(initializer, f"{initializer} = {{{', '.join(['1'] * size)}}}")
    path = save(tmp_path / "m.onnx", text)
    assert sum(layer.macs for layer in count_macs(path, {"x": np.ones(shape, np.float32)})) == macs


def test_quantised_files_count_what_their_float_model_does(tmp_path: Path) -> None:
    from qcompile import compile_model

    feeds = {"input": np.zeros((1, 1, 8, 8), np.float32)}
    wanted = [layer.macs for layer in count_macs(CNN, feeds)]
    for format in ("qoperator", "qdq"):
        options: dict[str, Any] = {"data": str(MODELS / "digits_calib.npz"), "effort": "fast", "latency": False}
        made = compile_model(CNN, tmp_path / f"{format}.onnx", format=format, **options)
        found = [layer.macs for layer in count_macs(made.path, feeds)]
        assert found[1:] == wanted[1:]
        assert found[0] >= wanted[0]  # the first layer is widened


def test_feeds_of_symbolic_dimensions() -> None:
    model = parser.parse_model(f"{HEAD}g (float[N, 3, h] x, int64[N, t] ids) => (float[N] y) {{ y = Relu (x) }}")
    feeds = sized_feeds(model_inputs(model), {"t": 16, "h": 2})
    assert {name: array.shape for name, array in feeds.items()} == {"x": (1, 3, 2), "ids": (1, 16)}
    assert feeds["ids"].dtype == np.int64


def test_a_bench_of_three_models(tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(CNN.read_bytes())
    found = bench_models(CNN, copy, CNN, data_spec=str(MODELS / "digits.npz"), seconds=0.02, rounds=2)
    assert [Path(row["path"]) for row in found["models"]] == [CNN, copy, CNN]
    assert found["peak_gops"] > 0 and "latency_ms" not in found
    first = found["models"][0]
    assert first["latency_ms"]["low"] <= first["latency_ms"]["median"] <= first["latency_ms"]["high"]
    assert first["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert first["macs"] == sum(layer.macs for layer in count_macs(CNN, {"input": np.zeros((1, 1, 8, 8), np.float32)}))
    assert first["peak_share"] == pytest.approx(2 * first["macs"] / first["latency_ms"]["median"] / 1e6 / found["peak_gops"])
    assert {o["op"] for o in first["operators"]} >= {"Conv", "Gemm"}
    assert sum(o["share"] for o in first["operators"]) == pytest.approx(1)
    assert first["cold_start"]["load_ms"] > 0 and first["cold_start"]["peak_rss_mb"] > first["cold_start"]["model_rss_mb"] >= 0
    json.dumps(found)


def test_no_rounds_are_refused() -> None:
    with pytest.raises(InputError, match="rounds 0: give a whole number from 1 on"):
        bench_models(CNN, rounds=0, seconds=1)


def test_batches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 1, "seconds": 0.01, "cold": False, "profile": False}
    one, four = (bench_models(CNN, CNN, batch=batch, **options) for batch in (None, 4))
    assert four["models"][0]["macs"] == 4 * one["models"][0]["macs"]
    assert (four["models"][0]["cold_start"], four["models"][0]["operators"]) == (None, None)
    assert four["latency_ms"]["threads"] == 1 and four["size_bytes"]["ratio"] == 1
    fixed = save(tmp_path / "f.onnx", "g (float[1, 3] x) => (float[1, 3] y) { y = Relu (x) }")
    assert bench_models(fixed, batch=1, **options)["models"][0]["macs"] == 0
    with pytest.raises(DataError, match="--batch 2: the first dimension of input 'x' is fixed"):
        bench_models(fixed, batch=2, **options)


def test_intervals_of_a_median() -> None:
    low, high, confidence = median_interval([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert (low, high) == (1.0, 8.0)
    assert confidence == pytest.approx(1 - 2 / 2**8)


def test_operators_of_models_whose_runs_are_alike() -> None:
    times = {o.op: o for o in operator_times(CNN, {"input": np.zeros((1, 1, 8, 8), np.float32)}, runs=3)}
    assert times["Conv"].calls == 5
    assert all(o.ms >= 0 for o in times.values())


def test_inputs_of_any_name_reach_the_process(tmp_path: Path) -> None:
    """`file` is an argument of the function that writes the sample."""
    path = save(tmp_path / "m.onnx", "g (float[1, 3] file) => (float[1, 3] y) { y = Relu (file) }")
    (found,) = measure_cold_starts([path], [{"file": np.zeros((1, 3), np.float32)}], rounds=1)
    assert found.load_ms > 0


def test_cold_starts_that_fail(tmp_path: Path) -> None:
    broken = tmp_path / "b.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"b\.onnx: the process that loads it ended with status 1"):
        measure_cold_starts([broken], [{}], rounds=1)
    assert measure_here(CNN, {"input": np.zeros((1, 1, 8, 8), np.float32)}, 1).load_ms > 0


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        pytest.param({"models": ()}, InputError, "no model", id="none"),
        pytest.param({"seconds": 0.0}, InputError, "--seconds 0", id="seconds"),
        pytest.param({"batch": 0}, InputError, "--batch 0", id="batch"),
        pytest.param({"models": (CNN, "none.onnx")}, ModelError, "cannot be read", id="missing"),
        pytest.param({"models": (CNN, VIT), "data_spec": "no.npz"}, DataError, "no such file", id="data"),
    ],
)
def test_refusals(call: dict[str, Any], error: type[Exception], said: str) -> None:
    models = call.pop("models", (CNN,))
    with pytest.raises(error, match=said):
        bench_models(*models, **call)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = [
        "bench",
        str(CNN),
        str(CNN),
        str(CNN),
        "--rounds",
        "1",
        "--no-cold",
        "--no-profile",
        "--report",
        str(tmp_path / "b.json"),
    ]
    assert run(cli, args) == 0
    assert capsys.readouterr().out.count("digits_cnn.onnx") == 3
    assert len(json.loads((tmp_path / "b.json").read_text())["models"]) == 3
    assert run(cli, [*args, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert run(cli, ["bench"]) == 2
