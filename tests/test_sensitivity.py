"""Sensitivities: what is measured with one layer narrow, ranks, the table's forms, the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import CNN, MODELS, Command, is_one_error
from passes_helpers import parse

from qcompile.compilation import open_data
from qcompile.context import Settings
from qcompile.cut_layer import CutLayer
from qcompile.errors import DataError, InputError
from qcompile.load import load_model
from qcompile.probing import measure_sources, measure_widths
from qcompile.runtime import Session
from qcompile.sensitivity import Sensitivity, spearman
from qcompile.sensitivity_run import model_sensitivity
from qcompile.survey import survey

DATA = str(MODELS / "digits_calib.npz")


@pytest.fixture(scope="module")
def found() -> tuple[Sensitivity, dict[str, Any]]:
    return model_sensitivity(CNN, DATA, samples=24, probes=16)


def test_wider_weights_cost_less_and_every_layer_is_there(found: tuple[Sensitivity, dict[str, Any]]) -> None:
    table, report = found
    assert [x.spec.op for x in table.layers] == ["Conv", "Conv", "Conv", "Conv", "Conv", "Gemm"]
    for layer in table.layers:
        assert [c.bits for c in layer.weights] == [2, 3, 4, 5, 6, 8]
        noise = [c.noise for c in layer.weights]
        assert noise[0] > noise[2] > noise[5] > 0
        assert layer.trace is not None and layer.trace.trace > 0
        assert [c.bits for c in layer.activations] == [4, 6, 8]
    assert report["sensitivity"]["rank_correlation"]["all"] > 0.7
    json.dumps(report, allow_nan=False)


def test_csv_holds_what_json_holds(found: tuple[Sensitivity, dict[str, Any]]) -> None:
    table, report = found
    rows = list(csv.DictReader(io.StringIO(table.as_csv())))
    entries = [(x["node"], c) for x in report["sensitivity"]["layers"] for c in x["widths"]]
    assert len(rows) == len(entries) == 36
    for row, (node, cost) in zip(rows, entries, strict=True):
        assert row["node"] == node
        assert float(row["kl"]) == cost["kl"]
        assert float(row["omega"]) == cost["omega"]


def test_a_cut_layer_gives_the_models_outputs_with_its_weights_and_with_others() -> None:
    feeds = [{"input": x[None]} for x in np.load(DATA)["input"][:3]]
    loaded = load_model(CNN)
    study = survey(loaded, Settings(), open_data(loaded, DATA, None, None, None, Settings()), samples=3).study
    whole = Session(study.graph.to_proto())
    for spec in study.layers:
        layer = CutLayer(study.graph, spec, feeds)
        for index, feed in enumerate(feeds):
            np.testing.assert_allclose(layer.run(index)["logits"], whole.run(feed)["logits"], rtol=1e-4, atol=1e-4)
        other = study.graph.copy()
        moved = (layer.weight * 0.5).astype(np.float32)
        other.constants[spec.weight].assign(moved)
        expected = Session(other.to_proto()).run(feeds[0])["logits"]
        np.testing.assert_allclose(layer.run(0, weight=moved)["logits"], expected, rtol=1e-4, atol=1e-4)
        doubled = layer.run(0, source=layer.inputs[0])["logits"]
        np.testing.assert_array_equal(doubled, layer.run(0)["logits"])
    assert measure_widths(study, 0, (32,))[0].noise == 0
    assert measure_sources(study, 0, (32,))[0].noise == 0


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    a = random.integers(0, 6, 40).astype(float)
    b = a + random.normal(size=40)
    assert spearman(a.tolist(), b.tolist()) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_tables_are_layers_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    text = (
        "g (int64[1,4] ids) => (float[1,2] y) { e = Gather (table, ids) flat = Flatten (e) y = Gemm <transB = 1> (flat, w, b) }"
    )
    model = parse(
        text,
        table=random.normal(size=(2048, 8)).astype(np.float32),
        w=random.normal(size=(2, 32)).astype(np.float32),
        b=np.zeros(2, np.float32),
    )
    path = tmp_path / "table.onnx"
    path.write_bytes(model.SerializeToString())
    np.savez(tmp_path / "ids.npz", ids=random.integers(0, 2048, (16, 4)))
    table, _ = model_sensitivity(path, tmp_path / "ids.npz", probes=8)
    assert [x.spec.kind for x in table.layers] == ["table", "linear"]
    assert table.layers[0].spec.weights == 2048 * 8
    assert table.layers[0].weights[0].noise > table.layers[0].weights[-1].noise


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        pytest.param({"loss": "mse"}, InputError, "--loss mse", id="loss"),
        pytest.param({"loss": "labels"}, DataError, "needs labelled samples", id="no labels"),
        pytest.param({"widths": "2,7"}, InputError, "--widths 7", id="width"),
        pytest.param({"tolerance": 0.0}, InputError, "--tolerance 0", id="tolerance"),
        pytest.param({"probes": 1}, InputError, "--probes 1", id="probes"),
        pytest.param({"samples": 0}, InputError, "--samples 0", id="samples"),
        pytest.param({"workers": 0}, InputError, "--workers 0", id="workers"),
        pytest.param({"max_seconds": 0.0}, InputError, "--max-seconds 0", id="seconds"),
        pytest.param({"exclude": ["/no/such"]}, InputError, "no node of the model matches", id="exclude"),
        pytest.param({"workers": 2, "scheduler": "tcp://x"}, InputError, "a cluster has its own workers", id="both"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        model_sensitivity(CNN, DATA, **options)


def test_the_command_writes_table_csv_and_json(command: Command, tmp_path: Path) -> None:
    csv_file, report = tmp_path / "s.csv", tmp_path / "s.json"
    args = ["sensitivity", CNN, "--data", DATA, "--samples", "8", "--widths", "4,8", "--probes", "8", "--no-activations"]
    status, out, err = command(*args, "--csv", str(csv_file), "--report", str(report))
    assert (status, err) == (0, "")
    assert "/classifier/Gemm" in out and "KL at 4" in out and "rank correlation" in out
    assert csv_file.read_text().count("\n") == 13
    layers = json.loads(report.read_text())["sensitivity"]["layers"]
    assert [[c["bits"] for c in x["widths"]] for x in layers] == [[4, 8]] * 6
    status, out, _ = command(*args, "--no-trace")
    assert status == 0 and "no traces" in out
    status, _, err = command("sensitivity", str(tmp_path / "none.onnx"), "--data", DATA)
    assert status == 2 and is_one_error(err)
