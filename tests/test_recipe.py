"""Recipes: the same bytes from TOML and from a report, single nodes, the command line wins, errors with suggestions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qcompile import compile_model
from qcompile.cli import cli
from qcompile.command_group import run
from qcompile.context import Settings
from qcompile.errors import InputError
from qcompile.recipe import node_settings, read_recipe, recipe_of

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, VIT, CALIBRATION, DIGITS = (
    str(MODELS / n) for n in ("digits_cnn.onnx", "digits_vit.onnx", "digits_calib.npz", "digits.npz")
)
QUICK: dict[str, Any] = {"data": CALIBRATION, "effort": "fast", "latency": False}

TOML = f"""
[compile]
data = "{CALIBRATION}"
effort = "fast"
ranges = "percentile"
samples = 40
seed = 3
no_bias-correction = true
no-latency = true
exclude = ["/stem/*"]

[check]
eval = "{DIGITS}"
max-drop = 2

[nodes."/head/*"]
bits = 4
"""


def command(*args: object) -> int:
    return run(cli, [str(a) for a in args])


def convs(path: str) -> list[str]:
    return [n.name for n in onnx.load(path).graph.node if n.op_type == "Conv"]


# ---- reproducing ----
@pytest.mark.parametrize("kind", ["toml", "report", "report-of-toml"])
def test_a_recipe_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first, second, report = tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "r.json"
    recipe = tmp_path / "recipe.toml"
    names = convs(CNN)
    recipe.write_text(TOML.replace("/stem/*", names[0]).replace("/head/*", names[2]))
    by_hand = ("--data", CALIBRATION, "--effort", "fast", "--ranges", "percentile", "--samples", 40, "--seed", 3)
    by_hand = (*by_hand, "--no-bias-correction", "--no-latency", "--exclude", names[0])  # type: ignore[assignment]
    if kind == "report":
        assert command(CNN, "-o", first, *by_hand, "--quiet", "--report", report) == 0
        assert command(CNN, "-o", second, "--recipe", report, "--quiet", "--no-latency") == 0
    else:
        source = recipe
        assert command(CNN, "-o", first, "--recipe", recipe, "--quiet", "--report", report) == 0
        if kind == "report-of-toml":
            source = report
        assert command(CNN, "-o", second, "--recipe", source, "--quiet", "--no-latency") == 0
        made = json.loads(report.read_text())["recipe"]
        assert made["nodes"] == {names[2]: {"bits": 4}}
        assert made["compile"]["no-bias-correction"] is True
        assert sum(t.data_type == TensorProto.INT4 for t in onnx.load(second).graph.initializer) == 1
    assert first.read_bytes() == second.read_bytes()


def test_a_recipe_with_a_limit(tmp_path: Path) -> None:
    """The search for layers to raise runs again, and ends at the same."""
    report = tmp_path / "r.json"
    args = ("--bits", 4, "--effort", "fast", "--data", CALIBRATION, "--eval", DIGITS, "--min-agreement", 0.97)
    status = command(CNN, "-o", tmp_path / "a.onnx", *args, "--on-inconclusive", "pass", "--quiet", "--report", report)
    assert status == 0
    assert command(CNN, "-o", tmp_path / "b.onnx", "--recipe", report, "--quiet", "--no-latency") == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_python_interface(tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "a.onnx", **QUICK, bits=4, seed=1)
    (tmp_path / "r.json").write_text(json.dumps(made.report["recipe"]))
    again = compile_model(CNN, tmp_path / "b.onnx", **read_recipe(tmp_path / "r.json").compile_arguments(), latency=False)
    assert made.path.read_bytes() == again.path.read_bytes()
    assert made.report["recipe"] == {"compile": {"bits": 4, "data": CALIBRATION, "effort": "fast", "seed": 1}}


def test_the_command_line_wins_and_a_recipe_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qcompile.toml").write_text(f'[compile]\ndata = "{CALIBRATION}"\neffort = "best"\nno-latency = true\n')
    monkeypatch.chdir(tmp_path)
    assert command(CNN, "-o", "a.onnx", "--effort", "fast", "--quiet", "--report", "r.json") == 0
    report = json.loads(Path("r.json").read_text())
    assert report["recipe"]["compile"] == {"data": CALIBRATION, "effort": "fast"}
    assert report["latency_ms"] is None


def test_a_check_from_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "qcompile.toml"
    recipe.write_text(f'[check]\neval = "{DIGITS}"\nmax-drop = 0\nno-latency = true\nmin_sqnr = 90.5\n')
    assert command("check", CNN, CNN, "--recipe", recipe, "--report", tmp_path / "r.json") == 0
    assert "limit: pass: --min-sqnr 90.5" in capsys.readouterr().out
    made = json.loads((tmp_path / "r.json").read_text())["recipe"]["check"]
    assert made == {"eval": DIGITS, "max-drop": 0.0, "min-sqnr": 90.5, "no-latency": True}
    assert command("check", CNN, CNN, "--recipe", tmp_path / "r.json", "--quiet") == 0


# ---- single nodes ----
def scales(path: Path) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of each QuantizeLinear on an activation, by the name of what it reads."""
    graph = onnx.load(path).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {n.input[0]: (float(arrays[n.input[1]]), int(arrays[n.input[2]])) for n in graph.node if n.op_type == "QuantizeLinear"}


def test_ranges_of_single_nodes(tmp_path: Path) -> None:
    names = convs(CNN)
    for effort in ("fast", "default"):
        options = {**QUICK, "effort": effort}
        nodes = {names[1]: {"range": [0.0, 51.0]}, "input": {"range": [0, 2.0]}}
        made = compile_model(CNN, tmp_path / f"{effort}.onnx", **options, nodes=nodes)
        chosen = {
            c["node"]: c for c in compile_model(CNN, tmp_path / "d.onnx", **options, nodes=nodes, diagnose=True).report["layers"]
        }
        assert chosen[names[0]]["range"] == [0.0, 2.0]
        assert any(entry["range"] == [0.0, 51.0] for entry in chosen.values())
        assert scales(made.path)["input"][0] == pytest.approx(2 / 255, rel=1e-2)


def test_widths_of_single_nodes(tmp_path: Path) -> None:
    names = convs(CNN)
    made = compile_model(
        CNN, tmp_path / "a.onnx", **QUICK, bits=4, nodes={"*": {"bits": 4}, names[0]: {"bits": 8}}, diagnose=True
    )
    bits = {entry["node"]: entry["bits"] for entry in made.report["layers"]}
    assert bits.pop(names[0]) == 8
    assert set(bits.values()) == {4}
    kept = compile_model(CNN, tmp_path / "b.onnx", **QUICK, nodes={names[0]: {"float": True}}, diagnose=True)
    assert names[0] not in {entry["node"] for entry in kept.report["layers"]}
    assert kept.path.read_bytes() == compile_model(CNN, tmp_path / "c.onnx", **QUICK, exclude=[names[0]]).path.read_bytes()


def test_the_last_pattern_counts() -> None:
    settings = Settings(node_bits=(("a*", 4), ("ab", 8)), node_ranges=(("a*", 0.0, 1.0), ("ac", 0.0, 2.0)))
    assert [settings.bits_for(n) for n in ("aa", "ab", "b")] == [4, 8, 8]
    assert [settings.range_for(n) for n in ("aa", "ac", "b")] == [(0.0, 1.0), (0.0, 2.0), None]
    assert settings.widths == {4, 8}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        pytest.param({"none": {"bits": 4}}, r"\[nodes\] none: no node of the model matches", id="no node"),
        pytest.param({"none": {"range": [0, 1]}}, r"\[nodes\] none: no node and no input", id="no node or input"),
        pytest.param({"none": {"float": True}}, "--exclude none: no node", id="no float node"),
        pytest.param({"HEAD": {"range": [-1, 1]}}, "no quantised tensor comes from such a node", id="float output"),
    ],
)
def test_nodes_that_are_not_there(nodes: dict[str, Any], said: str, tmp_path: Path) -> None:
    gemm = next(n.name for n in onnx.load(CNN).graph.node if n.op_type == "Gemm")
    with pytest.raises(InputError, match=said):
        compile_model(CNN, tmp_path / "a.onnx", **QUICK, nodes={gemm if k == "HEAD" else k: v for k, v in nodes.items()})
    assert list(tmp_path.iterdir()) == []


def test_weight_only_files_have_no_single_nodes(tmp_path: Path) -> None:
    gemm = next(n.name for n in onnx.load(VIT).graph.node if n.op_type == "MatMul")
    with pytest.raises(InputError, match="--activations float: bits, activations and range of nodes"):
        compile_model(VIT, tmp_path / "a.onnx", bits=4, activations="float", nodes={gemm: {"bits": 8}})


def test_an_imported_model_has_ranges_of_its_own(tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "q.onnx", **QUICK)
    with pytest.raises(InputError, match=r"\[nodes\] range: the model already holds Q/DQ"):
        compile_model(made.path, tmp_path / "again.onnx", nodes={convs(CNN)[0]: {"range": [0, 1]}}, latency=False)


# ---- errors ----
@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[compil]\n", "[compil] is no table of a recipe; did you mean 'compile'?", id="table"),
        pytest.param("[compile]\nefort = 'best'\n", "[compile] 'efort' is no option; did you mean 'effort'?", id="key"),
        pytest.param("[compile]\nzzz = 1\n", "[compile] 'zzz' is no option; known are ", id="key like none"),
        pytest.param("[compile]\neffort = 'much'\n", "[compile] effort: 'much' is not one of", id="choice"),
        pytest.param("[compile]\nsamples = 'many'\n", "[compile] samples: 'many' is not a valid", id="number"),
        pytest.param("[compile]\nsamples = [1]\n", "[compile] samples: [1] is not a value", id="list"),
        pytest.param("[compile]\ninline = 1\n", "[compile] inline: 1 is not true or false", id="flag"),
        pytest.param("[compile\n", "the recipe cannot be read", id="syntax"),
        pytest.param("compile = 3\n", "compile is no table", id="no table"),
        pytest.param('[nodes."a"]\nbit = 4\n', "'bit' is unknown; did you mean 'bits'?", id="node key"),
        pytest.param('[nodes."a"]\nbits = 7\n', "bits is 7; give one of 8, 6, 5, 4, 3, 2", id="node bits"),
        pytest.param('[nodes."a"]\nfloat = 1\n', "float is 1; give true or false", id="node float"),
        pytest.param('[nodes."a"]\nfloat = true\nbits = 4\n', "float goes with neither", id="node float and bits"),
        pytest.param('[nodes."a"]\nrange = [1, 2]\n', "give [low, high] with low <= 0 <= high", id="range without 0"),
        pytest.param('[nodes."a"]\nrange = [0, "x"]\n', "give [low, high]", id="range of text"),
        pytest.param('[nodes."a"]\n', "give bits, activations, float or range", id="empty node"),
        pytest.param("[check]\nmax_dropp = 1\n", None, id="another command's table"),
    ],
)
def test_bad_recipes(text: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.toml"
    path.write_text(text)
    if said is None:  # it is refused where it is used
        assert command("check", CNN, CNN, "--eval", DIGITS, "--recipe", path) == 2
        said = "[check] 'max-dropp' is no option; did you mean 'max-drop'?"
    else:
        assert command(CNN, "-o", tmp_path / "a.onnx", "--data", CALIBRATION, "--effort", "fast", "--recipe", path) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.json", b'{"accuracy": {}}', "holds no recipe"),
        ("r.json", b"{", "cannot be read"),
        ("r.toml", b"\xff\xfe", "no text file"),
        ("none.toml", None, "cannot be read"),
    ],
    ids=["report without", "broken", "binary", "missing"],
)
def test_files_that_hold_none(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_recipe(tmp_path / name)


def test_plain_tables() -> None:
    assert node_settings({"a": {"float": False, "bits": 8}}).exclude == ()
    with pytest.raises(InputError, match="the recipe is no table"):
        recipe_of([], "x")
    assert recipe_of({"compile": {"max_drop": 1}}, "x").compile == {"max-drop": 1}
    assert np.isfinite(node_settings({"a": {"range": [-1, 1]}}).ranges[0][1])
