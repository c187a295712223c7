"""The command line: what reaches the program, what is printed where, and every exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli_helpers import CNN, Command, is_one_error

import qcompile
from qcompile.errors import DataError, LimitError, ModelError, PassError

REPORT: dict[str, Any] = {
    "passes": [{"name": "fold_bn", "rewrites": 5, "skipped": {"weight is shared": 2}, "seconds": 0.1, "sqnr_db": None}],
    "accuracy": {
        "samples": 500,
        "sqnr_db": 33.25,
        "cosine": 0.9998,
        "top1_agreement": 0.994,
        "metric": "top1",
        "float": 0.998,
        "quantised": 0.996,
        "drop_points": 0.2,
    },
    "latency_ms": {"float": 2.0, "quantised": 1.0, "speedup": 2.0, "threads": 1},
    "size_bytes": {"float": 95032, "quantised": 31000, "ratio": 0.326},
    "nodes": {"quantised": 8, "float": 1, "float_ops": {"Softmax": 1}},
    "warnings": ["accuracy was measured on synthetic inputs"],
}


class FakePipeline:
    """Stands in for `qcompile.pipeline`; remembers how it was called, raises what it is told to."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}
        self.error: BaseException | None = None

    def compile_model(self, model: Path, output: Path | None = None, **options: Any) -> SimpleNamespace:
        self.call = {"model": model, "output": output, **options}
        options["progress"]("calibrate", 0, 10)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(path=Path("digits.int8.onnx"), report=REPORT)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    module = ModuleType("qcompile.pipeline")
    module.__dict__["compile_model"] = fake.compile_model
    monkeypatch.setitem(sys.modules, "qcompile.pipeline", module)
    return fake


# --- compile ---------------------------------------------------------------------------------------------------


def test_defaults_reach_the_pipeline(command: Command, pipeline: FakePipeline) -> None:
    status, out, err = command("m.onnx")
    assert (status, err) == (0, "")
    progress = pipeline.call.pop("progress")
    assert callable(progress)
    assert pipeline.call == {
        "model": Path("m.onnx"),
        "output": None,
        "bits": 8,
        "limit": (),
        "widths": None,
        "activation_widths": None,
        "mixed_by": "best",
        "pareto": 0,
        "loss": "kl",
        "max_seconds": None,
        "workers": 1,
        "scheduler": None,
        "format": "qdq",
        "target": "any",
        "data": None,
        "samples": None,
        "eval_data": None,
        "max_drop": None,
        "min_agreement": None,
        "on_inconclusive": "fail",
        "max_requant_loss": None,
        "ranges": "mse",
        "effort": "default",
        "exclude": (),
        "opset": None,
        "inputs_as": "float32",
        "inline": False,
        "io": "float",
        "kernels": "table",
        "activations": "int8",
        "block": None,
        "symmetric": None,
        "spelling": None,
        "accuracy_level": None,
        "sparsity": None,
        "criterion": "obs",
        "sparsity_scope": "layer",
        "sparse_storage": "compressed",
        "prune_channels": None,
        "prune_criterion": None,
        "prune_budget": None,
        "channel_multiple": None,
        "keep": (),
        "refit": None,
        "prune_implant": None,
        "preprocess": None,
        "bias_correction": True,
        "seed": 0,
        "dump_passes": None,
        "latency": True,
        "compare_targets": False,
        "diagnose": False,
        "nodes": {},
    }
    assert "fold_bn" in out
    assert "2 x weight is shared" in out
    assert "33.25 dB" in out
    assert "warning: accuracy was measured on synthetic inputs" in out
    assert "wrote digits.int8.onnx" in out


@pytest.mark.parametrize(("flag", "value"), [("--symmetric", True), ("--asymmetric", False)])
def test_symmetry_reaches_the_pipeline(flag: str, value: bool, command: Command, pipeline: FakePipeline) -> None:
    assert command("m.onnx", flag)[0] == 0
    assert pipeline.call["symmetric"] is value


def test_every_option_reaches_the_pipeline(command: Command, pipeline: FakePipeline, tmp_path: Path) -> None:
    args = "-o out.onnx --bits mixed --limit size=.2 --limit bops=.5 --widths 2,4 --mixed-by kl --pareto 3 --loss noise "
    args += "--max-seconds 9 --workers 2 --scheduler tcp://h:1 --activation-widths 4,8 "
    args += "--format qoperator --target vnni --data d.npz --samples 7 --preprocess imagenet --eval e.npz "
    args += "--max-drop 0.5 --min-agreement .9 --on-inconclusive pass --max-requant-loss 30 "
    args += "--effort fast --ranges percentile --exclude head --exclude /b/* --opset 17 --inputs-as uint8 --inline --io integer "
    args += "--kernels ibert "
    args += "--activations float --block 64 --symmetric --spelling portable --accuracy-level 1 "
    args += "--sparsity 0.5 --criterion wanda --sparsity-scope global --sparse-storage dense "
    args += "--prune-channels .3 --prune-criterion hrank --prune-budget latency --channel-multiple 4 "
    args += "--keep a --keep b* --no-refit --prune-implant 0.2 "
    args += "--no-bias-correction --dump-passes dump --seed 3 --no-latency --quiet"
    report = tmp_path / "r.json"
    status, out, err = command("m.onnx", *args.split(), "--report", report)
    assert (status, out, err) == (0, "", "")
    del pipeline.call["progress"]
    assert pipeline.call == {
        "model": Path("m.onnx"),
        "output": Path("out.onnx"),
        "bits": "mixed",
        "limit": ("size=.2", "bops=.5"),
        "widths": "2,4",
        "activation_widths": "4,8",
        "mixed_by": "kl",
        "pareto": 3,
        "loss": "noise",
        "max_seconds": 9.0,
        "workers": 2,
        "scheduler": "tcp://h:1",
        "format": "qoperator",
        "target": "vnni",
        "data": "d.npz",
        "samples": 7,
        "eval_data": "e.npz",
        "max_drop": 0.5,
        "min_agreement": 0.9,
        "on_inconclusive": "pass",
        "max_requant_loss": 30.0,
        "ranges": "percentile",
        "effort": "fast",
        "exclude": ("head", "/b/*"),
        "opset": 17,
        "inputs_as": "uint8",
        "inline": True,
        "io": "integer",
        "kernels": "ibert",
        "activations": "float",
        "block": 64,
        "symmetric": True,
        "spelling": "portable",
        "accuracy_level": 1,
        "sparsity": "0.5",
        "criterion": "wanda",
        "sparsity_scope": "global",
        "sparse_storage": "dense",
        "prune_channels": 0.3,
        "prune_criterion": "hrank",
        "prune_budget": "latency",
        "channel_multiple": 4,
        "keep": ("a", "b*"),
        "refit": False,
        "prune_implant": 0.2,
        "preprocess": "imagenet",
        "bias_correction": False,
        "seed": 3,
        "dump_passes": Path("dump"),
        "latency": False,
        "compare_targets": True,
        "diagnose": True,  # a report was asked for
        "nodes": {},
    }
    assert json.loads(report.read_text()) == REPORT


@pytest.mark.parametrize(
    ("args", "compared"),
    [
        pytest.param(["--eval", "e.npz"], False, id="no report"),
        pytest.param(["--report", "r.json"], False, id="no evaluation"),
        pytest.param(["--eval", "e.npz", "--report", "r.json"], True, id="both"),
        pytest.param(["--eval", "e.npz", "--report", "r.json", "--no-compare-targets"], False, id="not wanted"),
    ],
)
def test_targets_are_compared_for_a_report(
    args: list[str], compared: bool, command: Command, pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("m.onnx", *args)[0] == 0
    assert pipeline.call["compare_targets"] is compared


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["--seed", "3", "m.onnx"], id="options before the model"),
        pytest.param(["--quiet", "m.onnx", "--seed", "3"], id="options on both sides"),
        pytest.param(["compile", "m.onnx", "--seed", "3"], id="hidden name"),
    ],
)
def test_compile_needs_no_name(args: list[str], command: Command, pipeline: FakePipeline) -> None:
    assert command(*args)[0] == 0
    assert pipeline.call["model"] == Path("m.onnx")
    assert pipeline.call["seed"] == 3


def test_a_subcommands_name_wins_over_a_file(command: Command, pipeline: FakePipeline) -> None:
    status, _, err = command("check")
    assert status == 2
    assert "Missing argument 'FLOAT'" in err
    assert command("./check")[0] == 0
    assert pipeline.call["model"] == Path("check")  # of the working directory


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param([], "no model is given", id="nothing"),
        pytest.param(["m.onnx", "--bits", "7"], "'--bits'", id="7 bits"),
        pytest.param(["m.onnx", "--target", "z80"], "'--target'", id="target"),
        pytest.param(["m.onnx", "--activations", "int4"], "'--activations'", id="activations"),
        pytest.param(["m.onnx", "--block", "16"], "'--block'", id="block"),
        pytest.param(["m.onnx", "--spelling", "x"], "'--spelling'", id="spelling"),
        pytest.param(["m.onnx", "--accuracy-level", "5"], "'--accuracy-level'", id="accuracy level"),
        pytest.param(["m.onnx", "--max-drop", "1"], "give them with --eval", id="limit without samples"),
        pytest.param(["m.onnx", "--min-agreement", ".9"], "give them with --eval", id="agreement without samples"),
        pytest.param(["m.onnx", "--min-agreement", "0", "--eval", "e.npz"], "0<x<=1", id="agreement of nothing"),
        pytest.param(["m.onnx", "--eval", "e.npz", "--max-drop", "101"], "'--max-drop'", id="limit out of range"),
        pytest.param(["m.onnx", "--preprocess", "imagenet"], "--data or --eval", id="preprocess without images"),
        pytest.param(["m.onnx", "--dump-passes", CNN], "is a file", id="dump into a file"),
        pytest.param(["m.onnx", "--samples", "0"], "'--samples'", id="no samples"),
        pytest.param(["m.onnx", "--speed"], "No such option '--speed'", id="unknown option"),
        pytest.param(["m.onnx", "n.onnx"], "unexpected extra argument", id="two models"),
        pytest.param(["m.onnx", "--report", "no_such_dir/r.json"], "folder does not exist", id="report nowhere"),
        pytest.param(["m.onnx", "--report", "m.onnx"], "is the name of a model", id="report over the model"),
        pytest.param(["a.pb", "--report", "a.pb"], "is the name of a model", id="report over the model, any suffix"),
        pytest.param(["m.onnx", "--report", "."], "a folder", id="report is a folder"),
        pytest.param(["check", "a.onnx", "b.onnx"], "Missing option '--eval'", id="check without samples"),
        pytest.param(["inspect", "m.onnx", "--require-exact"], "goes with --dyadic", id="require-exact alone"),
        pytest.param(["bench", "a.onnx", "b.onnx", "--preprocess", "x"], "with --data", id="bench without images"),
        pytest.param(["bench", "a.onnx", "b.onnx", "--threads", "0"], "'--threads'", id="no threads"),
    ],
)
def test_usage_errors(args: list[str], said: str, command: Command, pipeline: FakePipeline) -> None:
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert is_one_error(err)
    assert said in err
    assert pipeline.call == {}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        pytest.param(ModelError("m.onnx: is not an ONNX model"), 2, "m.onnx: is not an ONNX model", id="model"),
        pytest.param(DataError("d.npz: holds\nno samples"), 2, "d.npz: holds no samples", id="data, two lines"),
        pytest.param(PassError("pass fold_bn broke its promise"), 1, "pass fold_bn broke its promise", id="pass"),
        pytest.param(RuntimeError("odd"), 1, "internal error: RuntimeError: odd; run again with --traceback", id="fault"),
    ],
)
def test_errors(error: Exception, status: int, said: str, command: Command, pipeline: FakePipeline, tmp_path: Path) -> None:
    pipeline.error = error
    report = tmp_path / "r.json"
    got, out, err = command("m.onnx", "--report", report)
    assert (got, out) == (status, "")
    assert is_one_error(err)
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("odd"), ModelError("m.onnx: odd")], ids=["fault", "error"])
def test_traceback_on_request(error: Exception, command: Command, pipeline: FakePipeline) -> None:
    pipeline.error = error
    status, _, err = command("m.onnx", "--traceback")
    assert status == (1 if isinstance(error, RuntimeError) else 2)
    assert "Traceback" in err
    assert "compile_model" in err
    assert err.splitlines()[-1].startswith("qcompile: error: ")


def test_broken_limit_still_reports(command: Command, pipeline: FakePipeline, tmp_path: Path) -> None:
    failed = SimpleNamespace(path=Path("m.int8.failed.onnx"), report=REPORT)
    pipeline.error = LimitError("drop 3 points, above limit 1; kept as m.int8.failed.onnx", failed)
    report = tmp_path / "r.json"
    status, out, err = command("m.onnx", "--eval", "e.npz", "--max-drop", "1", "--report", report)
    assert status == 3
    assert err == "qcompile: error: drop 3 points, above limit 1; kept as m.int8.failed.onnx\n"
    assert "wrote m.int8.failed.onnx" in out
    assert json.loads(report.read_text())["passes"][0]["rewrites"] == 5


def test_interrupt(command: Command, pipeline: FakePipeline, tmp_path: Path) -> None:
    pipeline.error = KeyboardInterrupt()
    status, out, err = command("m.onnx", "--report", tmp_path / "r.json")
    assert (status, out) == (130, "")
    assert err.split("\n")[-2] == "qcompile: interrupted"
    assert list(tmp_path.iterdir()) == []


# --- help, version, passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["m.onnx", "--help"]], ids=["alone", "after a model"])
def test_help_shows_options_and_subcommands(args: list[str], command: Command) -> None:
    status, out, err = command(*args)
    assert (status, err) == (0, "")
    assert out.startswith("Usage: qcompile MODEL [OPTIONS]\n")
    for text in ("--bits", "--max-drop", "--dump-passes", "check ", "inspect ", "bench ", "passes "):
        assert text in out
    assert "compile  " not in out  # the hidden command stays hidden


@pytest.mark.parametrize("args", [["--version"], ["--quiet", "--version"]], ids=["alone", "after an option"])
def test_version(args: list[str], command: Command) -> None:
    assert command(*args) == (0, f"qcompile {qcompile.__version__}\n", "")


def test_passes_are_listed_in_their_order(command: Command) -> None:
    from qcompile.passes import PASSES

    status, out, _ = command("passes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == [p.name for p in PASSES]
    assert "the same, bit for bit" in out
