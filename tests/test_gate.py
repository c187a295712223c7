"""The gate of `qcompile check`: every limit, the baseline, exit statuses, what CI servers read, bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import parser

from qcompile.checking import Checked, check_models
from qcompile.ci_reports import append_summary, github_annotations, github_summary, junit_xml, write_junit
from qcompile.errors import DataError, InputError, LimitError, ModelError
from qcompile.gate import Gate, judge_latency
from qcompile.latency import Latency, Ratio

HEAD = '<ir_version: 9, opset_import: ["" : 17]>\n'
SHIFTS = {"a": "{0, 0, 0}", "b": "{0.3, 0, 0}", "c": "{3, 0, 0}", "tiny": "{0.001, 0, 0}"}
SAMPLES = 400


def model(folder: Path, name: str, shift: str, *, inputs: str = "float[1, 3] x", outputs: str = "float[1, 3] y") -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(parser.parse_model(f"{HEAD}g ({inputs}) => ({outputs}) <float[3] s = {shift}> {{ y = Add (x, s) }}"), path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Logits are the inputs, shifted by more and more for one class."""
    return {name: model(tmp_path, name, shift) for name, shift in SHIFTS.items()}


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, SAMPLES)
    logits = rng.normal(size=(SAMPLES, 3)).astype(np.float32)
    logits[np.arange(SAMPLES), labels] += 2
    np.savez(tmp_path / "d.npz", x=logits, labels=labels)
    return str(tmp_path / "d.npz")


def check(models: dict[str, Path], which: str, data: str, **options: Any) -> dict[str, Any]:
    return check_models(models["a"], models[which], data, **{"latency": False, **options})


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {row["limit"]: row["outcome"] for row in report["gate"]["limits"]}


def broken(models: dict[str, Path], which: str, data: str, **options: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(LimitError) as caught:
        check(models, which, data, **options)
    assert caught.value.exit_status == 3
    assert isinstance(caught.value.compiled, Checked)
    return str(caught.value), caught.value.compiled.report


LIMITS: dict[str, Any] = {"max_drop": 5.0, "min_agreement": 0.9, "min_sqnr": 15.0, "max_size_ratio": 1.5}


def test_a_model_against_itself_passes_everything(models: dict[str, Path], data: str) -> None:
    report = check(models, "a", data, **{**LIMITS, "max_drop": 0.0, "min_agreement": 1.0, "min_sqnr": 200.0})
    assert set(outcomes(report).values()) == {"pass"}
    assert report["verdict"]["reason"] == "outputs are bit-identical"


def test_a_slightly_worse_model_passes_and_a_bad_one_fails(models: dict[str, Path], data: str) -> None:
    assert set(outcomes(check(models, "b", data, **LIMITS)).values()) == {"pass"}
    message, report = broken(models, "c", data, **LIMITS)
    assert outcomes(report) == {
        "--max-drop 5": "fail", "--min-agreement 0.9": "fail", "--min-sqnr 15": "fail", "--max-size-ratio 1.5": "pass",
    }  # fmt: skip
    assert re.search(r"c\.onnx: --max-drop 5: drop .* above limit 5", message)
    assert report["gate"]["outcome"] == "fail"


def test_few_samples_are_inconclusive(models: dict[str, Path], data: str) -> None:
    message, report = broken(models, "b", data, max_drop=1.0, samples=20)
    assert "20 samples are too few; about" in message
    (row,) = report["gate"]["limits"]
    assert (row["outcome"], row["samples"]) == ("inconclusive", 20)
    assert row["samples_needed"] > 20
    passed = check(models, "b", data, max_drop=1.0, samples=20, on_inconclusive="pass")
    assert passed["gate"]["outcome"] == "inconclusive"
    message, _ = broken(models, "b", data, min_sqnr=1.0, samples=10)
    assert "10 samples are too few for an interval; give at least 20" in message


def test_a_fail_is_named_before_what_is_inconclusive(models: dict[str, Path], data: str) -> None:
    message, _ = broken(models, "b", data, max_drop=1.0, max_size_ratio=0.5, samples=20)
    assert "--max-size-ratio 0.5: 1.0" in message


@pytest.mark.parametrize("metric", ["topk:2", "f1", "top1"])
def test_metrics_of_classes(metric: str, models: dict[str, Path], data: str) -> None:
    report = check(models, "b", data, metric=metric, max_drop=8.0)
    assert report["accuracy"]["metric"] == metric
    assert report["verdict"]["outcome"] == "pass"
    assert report["verdict"]["low"] <= report["accuracy"]["drop_points"] <= report["verdict"]["high"]
    broken(models, "c", data, metric=metric, max_drop=2.0)


def test_metrics_that_are_no_share(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    arrays = np.load(data)
    np.savez(tmp_path / "t.npz", x=arrays["x"], labels=arrays["x"] + np.float32(0.5))
    targets = str(tmp_path / "t.npz")
    report = check(models, "tiny", targets, metric="mse", max_drop=1.0)
    assert report["accuracy"]["float"] == pytest.approx(0.25)
    assert report["accuracy"]["drop_points"] < 0
    message, _ = broken(models, "c", targets, metric="mse", max_drop=1.0)
    assert "per cent" in message
    (tmp_path / "m.py").write_text("import numpy as np\ndef near(o, label):\n    return -float(abs(o['y'] - label).max())\n")
    own = check(models, "tiny", targets, metric=f"{tmp_path}/m.py:near", max_drop=1.0)
    assert own["verdict"]["outcome"] == "pass"


def test_integer_only(models: dict[str, Path], data: str) -> None:
    message, _ = broken(models, "a", data, require_integer_only=True)
    assert "float tensors between the ends" in message


def latency(low: float, high: float) -> Latency:
    return Latency(((2.0,) * 11, (1.0,) * 11), (2.0, 1.0), (Ratio(1, 1, 1, 0.95), Ratio(2.0, low, high, 0.95)), 1)


def test_latency_by_its_interval(models: dict[str, Path], data: str) -> None:
    assert judge_latency(latency(1.8, 2.2), 0.6).outcome == "pass"
    assert judge_latency(latency(1.8, 2.2), 0.4).outcome == "fail"
    doubt = judge_latency(latency(1.8, 2.2), 0.5)
    assert (doubt.outcome, doubt.value, doubt.samples) == ("inconclusive", 0.5, 11)
    assert "quieter machine" in doubt.reason
    report = check(models, "b", data, latency=True, max_latency_ratio=1000.0)
    assert outcomes(report) == {"--max-latency-ratio 1000": "pass"}


# ---- baseline ----
def test_a_baseline_passes_what_is_no_worse(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    check(models, "b", data, baseline=path, update_baseline=True)
    kept = path.read_bytes()
    for which in ("a", "b"):
        found = outcomes(check(models, which, data, baseline=path))
        assert found == dict.fromkeys(("baseline top1", "baseline agreement", "baseline SQNR"), "pass")
    message, report = broken(models, "c", data, baseline=path)
    assert set(outcomes(report).values()) == {"fail"}
    assert re.search(r"baseline top1: top1 \d+\.\d+ points below the baseline \(\d+ lost, \d+ won\)", message)
    broken(models, "c", data, baseline=path, update_baseline=True, max_drop=1.0)
    assert path.read_bytes() == kept  # a broken model is no baseline
    check(models, "b", data, baseline=path, update_baseline=True)
    assert path.read_bytes() == kept


def test_a_report_is_a_baseline_and_small_changes_are_none(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(check(models, "b", data)))
    near = {**models, "near": model(tmp_path, "near", "{0.31, 0, 0}")}
    found = {row["limit"]: row for row in check(near, "near", data, baseline=path)["gate"]["limits"]}
    assert found["baseline SQNR"]["outcome"] == "pass"
    assert 0 < found["baseline SQNR"]["low"] < 0.5  # sure, and of no consequence


def test_baselines_of_other_metrics(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    for metric in ("f1", "topk:2"):
        check(models, "b", data, metric=metric, baseline=path, update_baseline=True)
        assert outcomes(check(models, "b", data, metric=metric, baseline=path))[f"baseline {metric}"] == "pass"
        _, report = broken(models, "c", data, metric=metric, baseline=path)
        worse = report["accuracy"]["drop_points"] > 5  # of three classes the shifted one stays among the two largest
        assert outcomes(report)[f"baseline {metric}"] == ("fail" if worse else "pass")


def test_equal_outputs_in_the_baseline(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    check(models, "a", data, baseline=path, update_baseline=True)
    assert outcomes(check(models, "a", data, baseline=path))["baseline SQNR"] == "pass"
    message, _ = broken(models, "tiny", data, baseline=path)
    assert "outputs were equal in the baseline, and are not any more" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param("{", "is no JSON file", id="no json"),
        pytest.param("[1]", "holds no baseline", id="list"),
        pytest.param('{"baseline": {"version": 1}}', "lacks 'agreed'", id="lacks"),
        pytest.param("agreed", "damaged", id="damaged"),
        pytest.param("data_sha256", "of another data", id="data"),
        pytest.param("source_sha256", "of another float model", id="model"),
    ],
)
def test_bad_baselines(change: str | None, said: str, models: dict[str, Path], data: str, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    if change is not None and not change.isidentifier() and change != "data_sha256":
        path.write_text(change)
    elif change is not None:
        check(models, "b", data, baseline=path, update_baseline=True)
        found = json.loads(path.read_text())
        found["baseline"][change] = "00"
        path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=said) as caught:
        check(models, "b", data, baseline=path)
    assert caught.value.exit_status == 2


# ---- bad input ----
@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        pytest.param("float[1, 3] z", "float[1, 3] y", "has inputs ['z'], the float model ['x']", id="inputs"),
        pytest.param("float[1, 3] x", "float[1, 3] other", "output 'other' is in one of the two models only", id="outputs"),
    ],
)
def test_models_that_do_not_pair_up(
    inputs: str, outputs: str, said: str, models: dict[str, Path], data: str, tmp_path: Path
) -> None:
    name, result = inputs.split()[-1], outputs.split()[-1]
    other = tmp_path / "o.onnx"
    onnx.save(parser.parse_model(f"{HEAD}g ({inputs}) => ({outputs}) {{ {result} = Relu ({name}) }}"), other)
    with pytest.raises(ModelError, match=re.escape(said)):
        check({**models, "o": other}, "o", data)


def test_other_output_shapes_and_nan(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    for name, node, said in (
        ("shape", "y = Concat <axis = 1> (x, x)", "output 'y' is [1, 3] in float and [1, 6] quantised"),
        ("nan", "z = Sub (x, x) y = Div (z, z)", "quantised model: output 'y' holds NaN or Inf on sample 0"),
    ):
        path = tmp_path / f"{name}.onnx"
        onnx.save(parser.parse_model(f"{HEAD}g (float[1, 3] x) => (float[1, n] y) {{ {node} }}"), path)
        with pytest.raises(ModelError, match=re.escape(said)):
            check({**models, name: path}, name, data)


def test_bad_evaluation_data(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    arrays = np.load(data)
    np.savez(tmp_path / "short.npz", x=arrays["x"], labels=arrays["labels"][:5])
    np.savez(tmp_path / "plain.npz", x=arrays["x"])
    np.savez(tmp_path / "empty.npz", x=arrays["x"][:0])
    np.savez(tmp_path / "range.npz", x=arrays["x"], labels=arrays["labels"] + 7)
    for name, options, said in (
        ("short", {"max_drop": 1.0}, "labels"),
        ("plain", {"max_drop": 1.0}, "--max-drop compares with the true answers and needs them"),
        ("plain", {"metric": "f1"}, "--metric f1 compares with the true answers"),
        ("empty", {}, "at least one"),
        ("range", {}, "do not fit the 3 classes"),
    ):
        with pytest.raises(DataError, match=said):
            check(models, "b", str(tmp_path / f"{name}.npz"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": -1.0}, "--max-drop -1"),
        ({"min_agreement": 0.0}, "--min-agreement 0"),
        ({"min_sqnr": float("nan")}, "--min-sqnr nan"),
        ({"max_size_ratio": float("inf")}, "--max-size-ratio inf"),
        ({"on_inconclusive": "maybe"}, "--on-inconclusive maybe"),
    ],
    ids=str,
)
def test_limits_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Gate(**options)


def test_options_that_need_others(models: dict[str, Path], data: str) -> None:
    with pytest.raises(InputError, match="--max-latency-ratio needs the latency"):
        check(models, "b", data, max_latency_ratio=1.0)
    with pytest.raises(InputError, match="--update-baseline writes the file that --baseline names"):
        check(models, "b", data, update_baseline=True)
    np.savez(Path(data), x=np.ones((3, 3), np.float32))  # no labels, and an output of the input's shape: no classes
    with pytest.raises(DataError, match="use --min-sqnr"):
        check(models, "b", data, min_agreement=0.9)


# ---- CI ----
def is_junit(text: str) -> None:
    """What the schemas of Apache Ant and of Jenkins ask for: names, order and required attributes."""
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    for suite in root:
        assert suite.tag == "testsuite"
        assert {"name", "timestamp", "hostname", "tests", "failures", "errors", "time", "package", "id"} == set(suite.attrib)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        float(suite.attrib["time"])
        tags = [child.tag for child in suite]
        cases = [child for child in suite if child.tag == "testcase"]
        assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
        assert all(set(p.attrib) == {"name", "value"} for p in suite[0])
        assert int(suite.attrib["tests"]) == len(cases) >= 1
        assert int(suite.attrib["failures"]) == sum(1 for case in cases for child in case if child.tag == "failure")
        for case in cases:
            assert {"name", "classname", "time"} == set(case.attrib)
            assert [child.tag for child in case] in ([], ["failure"], ["skipped"])
            for failure in case.findall("failure"):
                assert set(failure.attrib) == {"message", "type"}


def test_junit(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    _, report = broken(models, "c", data, **LIMITS)
    is_junit(junit_xml(report))
    assert junit_xml(report).count("<failure") == 3
    is_junit(junit_xml(check(models, "a", data)))
    doubt = check(models, "b", data, max_drop=1.0, samples=20, on_inconclusive="pass")
    is_junit(junit_xml(doubt))
    assert "<skipped />" in junit_xml(doubt)
    write_junit(doubt, tmp_path / "j.xml")
    is_junit((tmp_path / "j.xml").read_text())
    with pytest.raises(InputError, match="--junit"):
        write_junit(doubt, tmp_path / "no" / "j.xml")


def test_github(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    _, report = broken(models, "c", data, **LIMITS)
    lines = list(github_annotations(report))
    assert len(lines) == 3
    assert all(re.fullmatch(r"::error title=[^:,\n]+(%3A[^:,\n]+)?::.+", line) for line in lines)
    assert "90 %25 interval" in lines[0]
    summary = tmp_path / "summary.md"
    append_summary(report, {"GITHUB_STEP_SUMMARY": str(summary)})
    assert summary.read_text() == github_summary(report)
    assert "| `--max-drop 5` | ❌ fail |" in summary.read_text()
    doubt = check(models, "b", data, max_drop=1.0, samples=20, on_inconclusive="pass")
    assert next(iter(github_annotations(doubt))).startswith("::warning ")
    with pytest.raises(InputError, match="GITHUB_STEP_SUMMARY is not set"):
        append_summary(report, {})
    with pytest.raises(InputError, match="cannot be written"):
        append_summary(report, {"GITHUB_STEP_SUMMARY": str(tmp_path)})


# ---- the command line ----
def test_exit_statuses(
    command: Callable[..., tuple[int, str, str]],
    models: dict[str, Path],
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c = (models[name] for name in "abc")
    base, junit = tmp_path / "base.json", tmp_path / "j.xml"
    common = ("--eval", data, "--no-latency")
    assert command("check", a, b, *common, "--max-drop", 5, "--baseline", base, "--update-baseline")[0] == 0
    status, out, err = command("check", a, c, *common, "--baseline", base, "--junit", junit, "--min-sqnr", 15)
    assert status == 3
    assert "limit: fail: --min-sqnr 15: SQNR" in out
    assert err.startswith("qcompile: error: ") and err.count("\n") == 1
    is_junit(junit.read_text())
    assert command("check", a, b, *common, "--max-drop", 1, "--samples", 20)[0] == 3
    assert command("check", a, b, *common, "--max-drop", 1, "--samples", 20, "--on-inconclusive", "pass")[0] == 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    status, out, _ = command("check", a, c, *common, "--max-drop", 1, "--github", "--quiet")
    assert (status, out.count("::error ")) == (3, 1)
    assert (tmp_path / "s.md").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(["--metric", "best"], "no such metric", id="metric"),
        pytest.param(["--baseline", "no.json"], "cannot be read", id="baseline"),
        pytest.param(["--junit", "no/j.xml"], "give --junit a file name|choose another --junit", id="junit"),
        pytest.param(["--max-size-ratio", "0"], "--max-size-ratio", id="ratio"),
        pytest.param(["--github"], "GITHUB_STEP_SUMMARY", id="github"),
        pytest.param(["--junit", "j.onnx"], "is the name of a model", id="junit over a model"),
    ],
)
def test_usage_errors(
    args: list[str], said: str, command: Any, models: dict[str, Path], data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    status, _, err = command("check", models["a"], models["b"], "--eval", data, "--no-latency", *args)
    assert status == 2
    assert re.search(said, err)
