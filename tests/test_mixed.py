"""`--bits mixed`: limits kept in the written file, exactness in every format, the same bytes again, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_helpers import CNN, MODELS, Command, is_one_error
from exactness_helpers import assert_file_exact, digits
from runtime_marks import needs_conv_integer

from qcompile import compile_model
from qcompile.audit import audit
from qcompile.certificate import certify
from qcompile.context import WIDTHS, Settings
from qcompile.cut_layer import LayerSpec
from qcompile.errors import InputError
from qcompile.hessian import Trace
from qcompile.inspection import rescales
from qcompile.interpret import Interpreter
from qcompile.layer_counts import count_layers
from qcompile.mixed import Tried, mix
from qcompile.options_mixed import parse_limits, parse_widths
from qcompile.planner import Assigned, Mixing, Planner, packed_bytes
from qcompile.probing import WidthCost
from qcompile.recipe import recipe_of
from qcompile.runtime import Optimisation, Session
from qcompile.sensitivity import LayerSensitivity, Sensitivity
from qcompile.size import size_bytes

pytest.importorskip("scipy")
DATA = str(MODELS / "digits_calib.npz")


def mixed(path: Path, **options: Any) -> dict[str, Any]:
    options = {"limit": ["avg-bits=4.5"], "mixed_by": "noise", "samples": 32, **options}
    return compile_model(CNN, path, bits="mixed", data=DATA, latency=False, **options).report


@pytest.mark.parametrize("form", ["qdq", "qoperator", pytest.param("integer", marks=needs_conv_integer)])
def test_each_format_is_exact_and_keeps_the_limit(form: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = mixed(path, format=form)
    layers = count_layers(path)
    average = sum(x.weights * x.weight_bits for x in layers) / sum(x.weights for x in layers)
    assert average <= 4.5
    assert average == pytest.approx(report["mixed"]["average_bits"])
    assert len({x.weight_bits for x in layers}) > 1
    assert audit(path).not_fused == []
    assert_file_exact(path, form, digits(20))
    if form == "integer":
        assert certify(path).integer_only
    found = rescales(path)
    assert found and all(r.exact for r in found)


def test_the_same_settings_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    report = mixed(first, mixed_by="best")
    compile_model(CNN, second, latency=False, **recipe_of(report["recipe"], "report").compile_arguments())
    assert first.read_bytes() == second.read_bytes()


def test_size_and_bops_are_kept_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = mixed(path, limit={"size": 0.22, "bops": 0.6})
    assert size_bytes(path) <= 0.22 * size_bytes(CNN)
    assert report["size_bytes"]["ratio"] <= 0.22
    feed = {"input": np.zeros((1, 1, 8, 8), np.float32)}
    layers = count_layers(path, feed)
    used = sum((x.macs or 0) * x.weight_bits for x in layers)
    assert used <= 0.6 * 8 * sum(x.macs or 0 for x in layers) * 1.001


def test_latency_limits_measure_each_layer(tmp_path: Path) -> None:
    report = mixed(tmp_path / "m.onnx", limit={"latency": 20.0, "avg-bits": 9}, widths="4,8,float")
    assert 0 < report["mixed"]["predicted"]["latency"] <= 20.0


def test_a_users_width_of_a_node_stands(tmp_path: Path) -> None:
    report = mixed(tmp_path / "m.onnx", nodes={"/stem/*": {"bits": 3}}, pareto=2)
    bits = {x["node"]: x["bits"] for x in report["mixed"]["layers"]}
    assert bits["/stem/stem.0/Conv"] == 3
    assert sum(p["sqnr_db"] is not None for p in report["mixed"]["front"]) == 2


def test_mixed_beats_one_width_for_all(tmp_path: Path) -> None:
    report = mixed(tmp_path / "m.onnx", limit="avg-bits=3", samples=200, eval_data=str(MODELS / "digits.npz"))
    plain = compile_model(CNN, tmp_path / "u.onnx", bits=3, data=DATA, eval_data=str(MODELS / "digits.npz"), latency=False)
    assert report["accuracy"]["sqnr_db"] > plain.report["accuracy"]["sqnr_db"]


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_every_width_is_packed_and_exact(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    compile_model(CNN, path, bits=bits, data=DATA, format="qoperator", latency=False)
    layers = count_layers(path)
    assert {x.weight_bits for x in layers} == {bits}
    assert max(np.abs(x.matrix).max() for x in layers) <= 2 ** (bits - 1) - 1
    stored = [i for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.UINT8 and len(i.dims) == 2]
    assert sum(len(i.raw_data) for i in stored) == sum(packed_bytes(x.weights, bits) for x in layers)
    feed = {"input": np.load(DATA)["input"][:1]}
    expected = Interpreter(path).run(feed)["logits"]
    for level in (Optimisation.OFF, Optimisation.ALL):
        np.testing.assert_array_equal(Session(path, optimisation=level).run(feed)["logits"], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"limit": []}, "needs a limit", id="no limit"),
        pytest.param({"limit": ["speed=1"]}, "--limit speed: give NAME=VALUE", id="unknown limit"),
        pytest.param({"limit": ["size=x"]}, "--limit size=x: give a number", id="no number"),
        pytest.param({"limit": ["size=0"]}, "give a number above 0", id="zero"),
        pytest.param({"limit": ["size=1", "size=2"]}, "is given twice", id="twice"),
        pytest.param({"widths": "7"}, "--widths 7", id="width"),
        pytest.param({"widths": "float"}, "nothing would be quantised", id="float alone"),
        pytest.param({"mixed_by": "luck"}, "--mixed-by luck", id="measure"),
        pytest.param({"pareto": -1}, "--pareto -1", id="pareto"),
        pytest.param({"limit": ["avg-bits=1.5"]}, "1.5 asked for, 2 is the nearest", id="infeasible"),
        pytest.param({"limit": ["size=0.01"]}, "--limit size", id="infeasible size"),
        pytest.param({"limit": ["latency=50"], "widths": "8,float"}, "let every layer stay float", id="all float"),
        pytest.param({"data": None}, "give --data", id="no data"),
        pytest.param({"activations": "float"}, "leave --activations out", id="weight-only"),
        pytest.param({"format": "integer", "widths": "4,float"}, "no layer may stay float", id="integer with float"),
        pytest.param({"target": "tensorrt"}, "give --widths 4,8", id="tensorrt"),
        pytest.param({"opset": 13}, "packed weights need opset 21", id="opset"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"data": DATA, "limit": ["avg-bits=5"], "mixed_by": "noise", "samples": 8, **options}
    with pytest.raises(InputError, match=said):
        compile_model(CNN, tmp_path / "m.onnx", bits="mixed", latency=False, **asked)


@pytest.mark.parametrize("option", [{"limit": ["size=1"]}, {"widths": "4"}, {"workers": 2}, {"max_seconds": 5.0}])
def test_options_of_mixed_precision_need_it(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is for mixed precision"):
        compile_model(CNN, tmp_path / "m.onnx", data=DATA, **option)


def test_limits_and_widths_are_read() -> None:
    assert parse_limits(["size=.5", "bops = 0.25"]) == {"size": 0.5, "bops": 0.25}
    assert parse_limits({"avg-bits": 4}) == {"avg-bits": 4.0}
    assert parse_widths("8, 2,float", floats=False) == (2, 8, 32)
    assert parse_widths(None, floats=True) == (2, 3, 4, 5, 6, 8, 32)


def test_the_command_line(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    args = ["--data", DATA, "--samples", "8", "--no-latency", "-o", str(out), "--mixed-by", "noise", "--bits", "mixed"]
    status, text, err = command(CNN, *args, "--limit", "avg-bits=5")
    assert (status, err) == (0, "")
    assert "mixed precision (avg-bits <= 5)" in text and out.exists()
    status, _, err = command(CNN, *args, "--limit", "avg-bits=1")
    assert status == 2 and is_one_error(err) and "2 is the nearest" in err
    status, _, err = command(CNN, *args)
    assert status == 2 and "needs a limit" in err


def sensitivities(traces: tuple[float, ...] = (4.0, 1.0)) -> Sensitivity:
    """Two layers of 800 weights, the first one sixteen times as sensitive; noise falls by 6 dB a bit."""
    found = []
    for index, trace in enumerate(traces):
        spec = LayerSpec(f"l{index}", "Conv", "linear", f"w{index}", None, 0, 800, 8)
        costs = tuple(WidthCost(b, 4.0**-b, 4.0**-b, 16.0 ** (1 - index) * 4.0**-b) for b in WIDTHS)
        estimate = Trace(trace, trace * 0.9, trace * 1.1, 8, 0.01, 0.01, True)
        found.append(LayerSensitivity(spec, 1000, estimate, costs))
    return Sensitivity(tuple(found), 4, "kl")


def test_the_best_of_all_candidates_on_held_out_samples_is_kept() -> None:
    tried: list[Assigned] = []

    def attempt(assigned: Assigned) -> Tried:
        tried.append(assigned)
        equal = len({bits for _, bits in assigned.weights}) == 1
        return Tried(30.0 if equal else 20.0, 5000, sum(b for _, b in assigned.weights) / 2)

    mixing = Mixing((("avg-bits", 5.0),))
    found = mix(sensitivities(), Planner(sensitivities(), mixing, Settings(), 10_000), attempt)
    assert dict(found.assigned.weights) == {"l0": 5, "l1": 5}
    assert found.report["by"] == "uniform"
    assert len(tried) == len(set(tried))  # none is compiled twice
    assert {c["by"] for c in found.report["candidates"]} >= {"noise", "uniform"}
    noise = next(c for c in found.report["candidates"] if c["by"] == "noise")
    assert noise["bits"] == {"l0": 6, "l1": 4}


@pytest.mark.parametrize(("ahead", "by"), [(0.4, "noise"), (0.6, "uniform")])
def test_one_width_for_all_must_be_clearly_better(ahead: float, by: str) -> None:
    def attempt(assigned: Assigned) -> Tried:
        equal = len({bits for _, bits in assigned.weights}) == 1
        return Tried(20.0 + ahead if equal else 20.0, 5000, sum(b for _, b in assigned.weights) / 2)

    mixing = Mixing((("avg-bits", 5.0),))
    assert mix(sensitivities(), Planner(sensitivities(), mixing, Settings(), 10_000), attempt).report["by"] == by


def test_one_width_for_all_may_be_exactly_the_limit() -> None:
    many = sensitivities(tuple(float(i + 1) for i in range(7)))
    planner = Planner(many, Mixing((("avg-bits", 5.0),)), Settings(), 10_000)
    found = planner.solve("uniform", {"avg-bits": 5.0})
    assert found is not None
    assert {bits for _, bits in found.weights} == {5}


def test_bytes_beside_the_weights_are_learned_from_the_first_file() -> None:
    sizes: list[int] = []

    def attempt(assigned: Assigned) -> Tried:
        sizes.append(3000 + sum(packed_bytes(800, b) for _, b in assigned.weights))
        return Tried(20.0, sizes[-1], 5.0)

    mixing = Mixing((("size", 0.45),), by=("noise",))  # below what is estimated: 0.4576
    planner = Planner(sensitivities(), mixing, Settings(), 10_000)
    found = mix(sensitivities(), planner, attempt)
    assert sizes[-1] <= 4500
    assert planner.rest == 3000
    assert dict(found.assigned.weights) == {"l0": 6, "l1": 3}
    with pytest.raises(InputError, match=r"--limit size: 0\.35 asked for, 0\.3912 is the nearest"):
        mix(sensitivities(), Planner(sensitivities(), Mixing((("size", 0.35),), by=("noise",)), Settings(), 10_000), attempt)


def test_matrices_beside_the_layers_count_in_the_average() -> None:
    def attempt(assigned: Assigned) -> Tried:
        return Tried(20.0, 5000, sum(b for _, b in assigned.weights) / 2 * 0.99 + 0.08)  # a hundredth of all weights, at 8 bits

    mixing = Mixing((("avg-bits", 5.0),), by=("noise",))
    found = mix(sensitivities(), Planner(sensitivities(), mixing, Settings(), 10_000), attempt)
    assert found.report["average_bits"] <= 5
    assert sum(b for _, b in found.assigned.weights) == 9
    least = Mixing((("avg-bits", 2.0),), by=("noise",))
    with pytest.raises(InputError, match="no assignment of widths keeps the limits"):
        mix(sensitivities(), Planner(sensitivities(), least, Settings(), 10_000), attempt)
