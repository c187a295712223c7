"""The pipeline end to end on a real model: same bytes, a whole report, limits enforced, nothing left behind on failure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
import qcompile.pipeline as pipeline
from qcompile.context import Context
from qcompile.errors import DataError, InputError, LimitError, ModelError
from qcompile.graph import Graph, Value
from qcompile.passes import passes_for
from qcompile.pipeline import Compiled, compile_model
from qcompile.report_file import report_json
from qcompile.rewrite import Lossy, Pass, Promise, Report
from qcompile.runtime import Optimisation, Session

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN = MODELS / "digits_cnn.onnx"
CALIBRATION = str(MODELS / "digits_calib.npz")
EVALUATION = str(MODELS / "digits.npz")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(calibration of 24 samples, evaluation of 60 with labels): enough to see everything, in little time."""
    folder = tmp_path_factory.mktemp("data")
    whole = np.load(EVALUATION)
    np.savez(folder / "calibration.npz", input=np.load(CALIBRATION)["input"][:24])
    np.savez(folder / "evaluation.npz", input=whole["input"][:60], labels=whole["labels"][:60])
    return str(folder / "calibration.npz"), str(folder / "evaluation.npz")


@pytest.fixture(scope="module")
def compiled(small: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("compiled")
    return compile_model(CNN, folder / "cnn.onnx", data=small[0], eval_data=small[1], effort="fast")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_the_same_bytes_whatever_the_output_is_called_and_whatever_it_is_measured_on(
    effort: str, small: tuple[str, str], tmp_path: Path
) -> None:
    calibration, evaluation = small
    first = compile_model(CNN, tmp_path / "a.onnx", data=calibration, effort=effort, latency=False)
    second = compile_model(CNN, tmp_path / "b.onnx", data=calibration, eval_data=evaluation, effort=effort, latency=False)
    assert digest(first.path) == digest(second.path)
    assert first.report["output"]["sha256"] == digest(first.path)
    assert listing(tmp_path) == ["a.onnx", "b.onnx"]
    assert str(tmp_path).encode() not in first.path.read_bytes()


def test_other_settings_and_seeds_are_written_down(small: tuple[str, str], tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "c.onnx", data=small[0], effort="fast", seed=7, exclude=["/stem/*"], latency=False)
    model = onnx.load(made.path)
    props = {p.key: p.value for p in model.metadata_props}
    settings = json.loads(props["qcompile.settings"])
    assert settings == {"effort": "fast", "exclude": ["/stem/*"], "ranges": "minmax", "seed": 7}  # the rest are defaults
    assert (model.producer_name, model.producer_version) == ("qcompile", qcompile.__version__)
    assert props["qcompile.source_sha256"] == digest(CNN)
    assert set(props) == {"qcompile.settings", "qcompile.source_sha256"}


REPORT_KEYS = {
    "qcompile", "source", "output", "settings", "passes", "accuracy", "latency_ms", "size_bytes", "nodes", "seconds",
    "peak_rss_mb",
}  # fmt: skip


def test_the_report_has_the_keys_of_the_contract(compiled: Compiled) -> None:
    report = compiled.report
    assert set(report) >= REPORT_KEYS
    assert set(report["source"]) == set(report["output"]) == {"path", "sha256"}
    assert report["source"]["sha256"] == digest(CNN)
    assert report["output"] == {"path": str(compiled.path), "sha256": digest(compiled.path)}
    for row in report["passes"]:
        assert set(row) >= {"name", "rewrites", "skipped", "seconds", "sqnr_db"}
    assert set(report["accuracy"]) >= {
        "samples", "sqnr_db", "cosine", "top1_agreement", "metric", "float", "quantised", "drop_points",
    }  # fmt: skip
    assert set(report["latency_ms"]) >= {"float", "quantised", "speedup", "threads"}
    assert set(report["size_bytes"]) >= {"float", "quantised", "ratio"}
    assert set(report["nodes"]) >= {"quantised", "float", "float_ops"}
    json.loads(report_json(report))  # no NaN, nothing that JSON cannot hold


def test_the_numbers_of_the_report_are_those_of_the_file(compiled: Compiled, small: tuple[str, str]) -> None:
    data = np.load(small[1])
    plain, made = Session(CNN), Session(compiled.path)
    f = np.concatenate([plain.run({"input": data["input"][i : i + 1]})["logits"] for i in range(60)]).astype(np.float64)
    q = np.concatenate([made.run({"input": data["input"][i : i + 1]})["logits"] for i in range(60)]).astype(np.float64)
    accuracy = compiled.report["accuracy"]
    assert accuracy["samples"] == 60
    assert accuracy["sqnr_db"] == pytest.approx(10 * np.log10(np.square(f).sum() / np.square(f - q).sum()), abs=1e-6)
    assert accuracy["sqnr_db"] > 25
    assert accuracy["top1_agreement"] == np.mean(f.argmax(1) == q.argmax(1))
    assert accuracy["float"] == np.mean(f.argmax(1) == data["labels"])
    assert accuracy["drop_points"] == pytest.approx(100 * (accuracy["float"] - accuracy["quantised"]))
    assert compiled.report["size_bytes"]["quantised"] == compiled.path.stat().st_size
    assert compiled.report["size_bytes"]["float"] == CNN.stat().st_size
    assert compiled.report["data"] == {"calibration": "real", "samples": 24, "evaluation": {"kind": "evaluation"}}


def test_the_result_does_not_depend_on_the_optimisation_level(compiled: Compiled, small: tuple[str, str]) -> None:
    """EXTENDED and ALL fuse Q/DQ; DESIGN section 2 promises the same bits for this list of operators."""
    data = np.load(small[1])["input"]
    extended, everything = (Session(compiled.path, optimisation=o) for o in (Optimisation.EXTENDED, Optimisation.ALL))
    for i in range(20):
        feed = {"input": data[i : i + 1]}
        np.testing.assert_array_equal(extended.run(feed)["logits"], everything.run(feed)["logits"])


def test_every_pass_leaves_its_model_where_asked(small: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "dump" / "here"
    compile_model(CNN, tmp_path / "a.onnx", data=small[0], effort="fast", dump_passes=folder, latency=False)
    names = [p.name for p in passes_for("real")]
    assert listing(folder) == [f"{i:02d}-{name}.onnx" for i, name in enumerate(names)]
    data = np.load(small[0])["input"][:1]
    for file in sorted(folder.iterdir()):
        onnx.checker.check_model(onnx.load(file), full_check=True)
        Session(file, fuse_qdq=False).run({"input": data})


# ---- exclude ----
@pytest.mark.parametrize(
    ("pattern", "floats"),
    [
        pytest.param("/classifier/Gemm", {"Gemm"}, id="by-name"),
        pytest.param("/residual/branch/branch.[03]/Conv", {"Conv"}, id="by-pattern"),
    ],
)
def test_excluded_nodes_stay_float(pattern: str, floats: set[str], small: tuple[str, str], tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "a.onnx", data=small[0], effort="fast", exclude=[pattern], latency=False)
    rows = [r for p in made.report["passes"] for r in p["refusals"] if r["reason"] == "excluded by --exclude"]
    assert rows
    ops = {op.replace("Fused", "") for op in made.report["nodes"]["float_ops"]}
    assert floats <= ops
    assert made.report["accuracy"]["sqnr_db"] > 25


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--exclude nothing: no node of the model matches"):
        compile_model(CNN, tmp_path / "a.onnx", data=CALIBRATION, exclude=["nothing"])
    assert listing(tmp_path) == []


def test_everything_excluded_is_an_error(tmp_path: Path, small: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match="no node can be quantised"):
        compile_model(CNN, tmp_path / "a.onnx", data=small[0], exclude=["*"])
    assert listing(tmp_path) == []


# ---- limits ----
@dataclass(frozen=True)
class Spoil:
    """Turns the logits round: a Lossy pass that allows itself anything."""

    name: str = "spoil"
    keeps: Promise = field(default_factory=lambda: Lossy(-1000.0))

    def run(self, graph: Graph, context: Context) -> Report:
        output = graph.outputs[0]
        if output.producer is not None and output.producer.op == "Neg":
            return Report()
        producer = output.producer
        assert producer is not None
        inner = Value(graph.fresh_name("upright"), output.type)
        producer.outputs[0] = inner
        graph.node("Neg", [inner], [output])
        return Report(rewrites=1)


def spoiled(data: str = "real") -> tuple[Pass, ...]:
    return (*passes_for(data), Spoil())


def test_a_limit_that_holds(tmp_path: Path, small: tuple[str, str]) -> None:
    made = compile_model(CNN, tmp_path / "a.onnx", data=small[0], eval_data=small[1], max_drop=20.0, effort="fast", latency=False)
    assert made.report["verdict"]["outcome"] == "pass"
    assert listing(tmp_path) == ["a.onnx"]


def test_a_limit_that_is_broken_keeps_the_file_under_another_name(
    tmp_path: Path, small: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "passes_for", spoiled)
    with pytest.raises(LimitError, match=r"--max-drop 1: drop .* above limit 1; the file is kept as .*a\.failed\.onnx") as caught:
        compile_model(CNN, tmp_path / "a.onnx", data=small[0], eval_data=small[1], max_drop=1.0, effort="fast", latency=False)
    assert caught.value.exit_status == 3
    assert listing(tmp_path) == ["a.failed.onnx"]
    made = caught.value.compiled
    assert isinstance(made, Compiled)
    assert made.path == tmp_path / "a.failed.onnx"
    assert made.report["output"] == {"path": str(made.path), "sha256": digest(made.path)}
    assert made.report["verdict"]["outcome"] == "fail"


def test_too_few_samples_pass_only_where_asked(tmp_path: Path, small: tuple[str, str]) -> None:
    options: dict[str, Any] = {"data": small[0], "eval_data": small[1], "max_drop": 0.1, "effort": "fast", "latency": False}
    made = compile_model(CNN, tmp_path / "a.onnx", on_inconclusive="pass", **options)
    assert made.report["verdict"]["outcome"] == "inconclusive"
    assert made.report["verdict"]["samples_needed"] > 60
    assert listing(tmp_path) == ["a.onnx"]
    with pytest.raises(LimitError, match=r"--max-drop 0.1: .*60 samples are too few; about \d+ samples would decide it"):
        compile_model(CNN, tmp_path / "b.onnx", **options)
    assert listing(tmp_path) == ["a.onnx", "b.failed.onnx"]


def test_a_limit_needs_labels(tmp_path: Path, small: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="--eval data with labels"):
        compile_model(CNN, tmp_path / "a.onnx", data=small[0], eval_data=small[0], max_drop=1.0)
    with pytest.raises(InputError, match="--eval data with labels"):
        compile_model(CNN, tmp_path / "a.onnx", data=small[0], max_drop=1.0)
    assert listing(tmp_path) == []


# ---- failure leaves nothing ----
STAGES = ["fold_constants", "calibrating", "refining layers", "evaluate"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_file(stage: str, error: type[BaseException], tmp_path: Path, small: tuple[str, str]) -> None:
    seen: list[str] = []

    def progress(name: str, done: int, total: int | None) -> None:
        seen.append(name)
        if name == stage:
            raise error

    with pytest.raises(error):
        compile_model(CNN, tmp_path / "a.onnx", data=small[0], eval_data=small[1], progress=progress, latency=False)
    assert seen[-1] == stage
    assert listing(tmp_path) == []


def test_a_failing_measurement_leaves_no_file(tmp_path: Path, small: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise DataError("sample 3: holds NaN")

    monkeypatch.setattr(pipeline, "measure", fails)
    with pytest.raises(DataError, match="sample 3"):
        compile_model(CNN, tmp_path / "a.onnx", data=small[0], effort="fast")
    assert listing(tmp_path) == []


def test_weights_in_a_file_of_their_own_are_discarded_with_the_model(tmp_path: Path) -> None:
    made = tmp_path / "a.onnx"
    onnx.save_model(onnx.load(CNN), made, save_as_external_data=True, location="a.onnx.data", size_threshold=0)
    (tmp_path / "other.data").write_bytes(b"stays")
    assert listing(tmp_path) == ["a.onnx", "a.onnx.data", "other.data"]
    pipeline._discard(made)
    assert listing(tmp_path) == ["other.data"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param({"model": "none.onnx"}, ModelError, "none.onnx", id="missing-model"),
        pytest.param({"data": "none.npz"}, DataError, "none.npz", id="missing-data"),
        pytest.param({"bits": 7}, InputError, "--bits 7", id="option"),
        pytest.param({"output": CNN}, InputError, "is the input itself", id="onto-itself"),
        pytest.param({"opset": 5, "data": CALIBRATION, "effort": "fast"}, InputError, "opset", id="opset-too-low"),
    ],
)
def test_bad_input_leaves_no_file(arguments: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    before = digest(CNN)
    call = {"model": CNN, "output": tmp_path / "a.onnx", "latency": False, **arguments}
    with pytest.raises(error, match=words):
        compile_model(**call)
    assert listing(tmp_path) == []
    assert digest(CNN) == before


def test_without_data_the_report_says_so(tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "a.onnx", effort="fast", latency=False)
    assert made.report["data"]["calibration"] != "real"
    assert made.report["warnings"]
    assert made.report["latency_ms"] is None or made.report["latency_ms"]["float"] is None


def test_a_refused_node_stands_in_the_report_with_its_reason(small: tuple[str, str], tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "a.onnx", data=small[0], effort="fast", exclude=["/classifier/Gemm"], latency=False)
    row = next(p for p in made.report["passes"] if p["name"] == "quantise")
    assert row["skipped"] == {"excluded by --exclude": 1}
    assert row["refusals"] == [{"node": "/classifier/Gemm", "reason": "excluded by --exclude"}]


def test_outputs_without_a_declared_shape(small: tuple[str, str], tmp_path: Path) -> None:
    """Shape inference fills them in on the way; that is no change of the model's ends."""
    source = onnx.load(CNN)
    source.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(source, tmp_path / "open.onnx")
    made = compile_model(tmp_path / "open.onnx", data=small[0], effort="fast", latency=False)
    assert made.path == tmp_path / "open.int8.onnx"
    assert made.report["accuracy"]["sqnr_db"] > 25
