"""Layers raised until a limit holds: halves of a dataset, and whole compilations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qcompile.data import load_dataset
from qcompile.data_sources import NpzSource
from qcompile.errors import InputError, LimitError
from qcompile.pipeline import Compiled, compile_model
from qcompile.report_file import report_json
from qcompile.samples import InputInfo

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN = MODELS / "digits_cnn.onnx"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


# ---- halves of a dataset ----


def numbers(count: int, folder: Path) -> str:
    np.savez(folder / "n.npz", x=np.arange(count, dtype=np.float32).reshape(-1, 1))
    return str(folder / "n.npz")


INPUTS = [InputInfo("x", (1, 1), np.dtype(np.float32))]


def values(dataset: Any) -> list[float]:
    return [float(s.feeds["x"][0, 0]) for s in dataset]


@pytest.mark.parametrize("count", [3, 7, 8])
def test_halves_share_nothing_and_leave_nothing_out(count: int, tmp_path: Path) -> None:
    whole = load_dataset(numbers(count, tmp_path), INPUTS)
    first, second = whole.halves()
    assert values(first) == list(range(0, count, 2))
    assert values(second) == list(range(1, count, 2))
    assert (first.count, second.count) == (-(-count // 2), count // 2)
    drawn = whole.sample(count - 1, seed=1)
    a, b = drawn.halves()
    assert sorted(values(a) + values(b)) == values(drawn)


def test_halves_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "numbers_.py").write_text(
        "import numpy as np\ndef give():\n    for i in range(9):\n        yield {'x': np.full((1, 1), i, np.float32)}\n"
    )
    whole = load_dataset(f"{tmp_path}/numbers_.py:give", INPUTS)
    first, second = whole.halves()
    assert (values(first), values(second)) == ([0, 2, 4, 6, 8], [1, 3, 5, 7])
    assert (values(first.sample(2)), values(second.sample(3)), values(second.sample(30))) == ([0, 2], [1, 3, 5], [1, 3, 5, 7])
    assert [values(h) for h in second.halves()] == [[1, 5], [3, 7]]
    assert [values(h) for h in whole.sample(5).halves()] == [[0, 2, 4], [1, 3]]
    assert isinstance(NpzSource, type)


# ---- whole compilations ----


def noisy(folder: Path, deviation: float) -> tuple[str, str]:
    """(calibration, evaluation): pictures under noise, so that the model is in doubt and bits make a difference."""
    whole, calibration = np.load(MODELS / "digits.npz"), np.load(MODELS / "digits_calib.npz")["input"][:24]
    noise = np.random.default_rng(0).normal(size=(224, 1, 8, 8)).astype(np.float32) * np.float32(deviation)
    np.savez(folder / "calibration.npz", input=calibration + noise[:24])
    np.savez(folder / "evaluation.npz", input=whole["input"][:200] + noise[24:], labels=whole["labels"][:200])
    return str(folder / "calibration.npz"), str(folder / "evaluation.npz")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return noisy(tmp_path_factory.mktemp("data"), 0.4)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compiled(data: tuple[str, str], path: Path, **options: Any) -> Compiled:
    call: dict[str, Any] = {"data": data[0], "eval_data": data[1], "bits": 4, "effort": "fast", "latency": False}
    call |= {"on_inconclusive": "pass", **options}
    return compile_model(CNN, path, **call)


def packed(path: Path) -> int:
    return sum(t.data_type == TensorProto.INT4 for t in onnx.load(path).graph.initializer)


@pytest.fixture(scope="module")
def asked(data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(data, tmp_path_factory.mktemp("asked") / "a.onnx")


@pytest.mark.parametrize("format", ["qdq", "qoperator"])
def test_layers_are_raised_to_8_bits(format: str, data: tuple[str, str], asked: Compiled, tmp_path: Path) -> None:
    plain = asked.report["accuracy"]["top1_agreement"]
    assert plain < 0.93
    made = compiled(data, tmp_path / "a.onnx", min_agreement=0.93, format=format)
    fallback = made.report["fallback"]
    assert fallback["held"]
    assert fallback["samples"] == {"search": 100, "verdict": 100}
    assert made.report["accuracy"]["samples"] == 100
    assert fallback["search"]["top1_agreement"] >= 0.93
    raised = {m["node"]: m["to_bits"] for m in fallback["raised"]}
    assert set(raised.values()) == {8}
    bits = {entry["node"]: entry["bits"] for entry in made.report["layers"]}
    assert bits == {name: raised.get(name, 4) for name in bits}
    assert packed(made.path) == sum(b == 4 for b in bits.values())
    assert made.report["agreement_verdict"]["outcome"] in ("pass", "inconclusive")
    assert "verdict" not in made.report
    settings = json.loads(next(p.value for p in onnx.load(made.path).metadata_props if p.key == "qcompile.settings"))
    assert dict(settings["raised"]) == raised
    json.loads(report_json(made.report))


def test_the_same_twice_and_the_verdict_half_changes_nothing(data: tuple[str, str], tmp_path: Path) -> None:
    first = compiled(data, tmp_path / "a.onnx", min_agreement=0.93)
    whole = dict(np.load(data[1]))
    whole["input"][1::2] = whole["input"][1::2][::-1]
    whole["labels"][1::2] = whole["labels"][1::2][::-1]
    np.savez(tmp_path / "other.npz", **whole)
    second = compiled((data[0], str(tmp_path / "other.npz")), tmp_path / "b.onnx", min_agreement=0.93)
    assert first.report["fallback"]["raised"] == second.report["fallback"]["raised"]
    assert digest(first.path) == digest(second.path)


def test_the_bytes_are_those_of_no_limit_where_it_holds_as_asked(data: tuple[str, str], asked: Compiled, tmp_path: Path) -> None:
    made = compiled(data, tmp_path / "a.onnx", min_agreement=0.3, max_drop=60.0)
    assert digest(made.path) == digest(asked.path)
    assert made.report["fallback"]["raised"] == []
    assert made.report["fallback"]["samples"] == {"search": 100, "verdict": 200}
    assert made.report["accuracy"] == asked.report["accuracy"]
    assert made.report["verdict"]["outcome"] == made.report["agreement_verdict"]["outcome"] == "pass"
    assert "fallback" not in asked.report


def test_layers_are_raised_to_float(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    made = compiled(noisy(tmp_path / "d", 0.9), tmp_path / "a.onnx", min_agreement=0.985)
    fallback = made.report["fallback"]
    assert fallback["held"]
    assert not fallback["tried"][1]["held"] and fallback["tried"][1]["raised_to_float"] == 0  # all in 8 bits did not do
    floats = {m["node"] for m in fallback["raised"] if m["to_bits"] == 32}
    assert floats
    rows = [r for p in made.report["passes"] for r in p["refusals"] if r["reason"] == "raised to float to hold the limit"]
    assert {r["node"] for r in rows} == floats
    assert {entry["bits"] for entry in made.report["layers"]} == {8}
    assert floats.isdisjoint(entry["node"] for entry in made.report["layers"])
    assert packed(made.path) == 0


def test_a_limit_that_nothing_holds(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first layer stays integer to the last: a limit that no sample may break is broken all the same."""
    with pytest.raises(LimitError, match=r"--min-agreement 1: .*; the file is kept as .*a\.failed\.onnx") as caught:
        compiled(noisy(tmp_path_factory.mktemp("d"), 0.6), tmp_path / "a.onnx", min_agreement=1.0)
    assert caught.value.exit_status == 3
    made = caught.value.compiled
    assert isinstance(made, Compiled)
    assert [f.name for f in tmp_path.iterdir()] == ["a.failed.onnx"]
    assert made.report["fallback"]["held"] is False
    assert made.report["output"] == {"path": str(made.path), "sha256": digest(made.path)}
    assert len(made.report["layers"]) == 1


def test_few_samples_are_not_split_and_it_says_so(data: tuple[str, str], tmp_path: Path) -> None:
    whole = np.load(data[1])
    np.savez(tmp_path / "few.npz", input=whole["input"][:30], labels=whole["labels"][:30])
    made = compiled((data[0], str(tmp_path / "few.npz")), tmp_path / "a.onnx", min_agreement=0.93)
    assert made.report["fallback"]["samples"] == {"search": 0, "verdict": 30}
    assert made.report["accuracy"]["samples"] == 30
    assert made.report["agreement_verdict"]["outcome"] == "inconclusive"
    assert any("fewer than 40 samples" in w and "no layer was raised" in w for w in made.report["warnings"])


def test_a_single_sample(data: tuple[str, str], tmp_path: Path) -> None:
    whole = np.load(data[1])
    np.savez(tmp_path / "one.npz", input=whole["input"][:1], labels=whole["labels"][:1])
    made = compiled((data[0], str(tmp_path / "one.npz")), tmp_path / "a.onnx", min_agreement=0.01)
    assert made.report["fallback"]["samples"] == {"search": 0, "verdict": 1}


def test_without_labels(data: tuple[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", input=np.load(data[1])["input"])
    made = compiled((data[0], str(tmp_path / "plain.npz")), tmp_path / "a.onnx", min_agreement=0.93)
    assert made.report["fallback"]["held"]
    assert made.report["accuracy"]["metric"] is None


def test_an_interrupted_search_leaves_no_file(data: tuple[str, str], tmp_path: Path) -> None:
    seen = 0

    def progress(name: str, done: int, total: int | None) -> None:
        nonlocal seen
        seen += name == "calibrate"
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(data, tmp_path / "a.onnx", min_agreement=0.93, progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"min_agreement": 1.5}, "--min-agreement 1.5: give a share", id="above-one"),
        pytest.param({"min_agreement": 0.0}, "--min-agreement 0: give a share", id="zero"),
        pytest.param({"min_agreement": 0.9, "eval_data": None}, "give them with --eval", id="no-eval"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, data: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        compiled(data, tmp_path / "a.onnx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")
def test_a_real_model_at_4_bits_is_raised_until_it_agrees(tmp_path: Path) -> None:
    tasks = ZOO / "tasks.py"
    made = compile_model(
        ZOO / "resnet20_cifar10" / "model.onnx",
        tmp_path / "a.onnx",
        bits=4,
        data=f"{tasks}:resnet20_cifar10_calib",
        effort="fast",
        eval_data=f"{tasks}:resnet20_cifar10_eval",
        min_agreement=0.97,
        on_inconclusive="pass",  # 250 samples cannot confirm .97
        latency=False,
    )
    fallback = made.report["fallback"]
    assert fallback["held"] and fallback["raised"]
    assert fallback["samples"] == {"search": 250, "verdict": 250}
    assert made.report["accuracy"]["top1_agreement"] > 0.93
