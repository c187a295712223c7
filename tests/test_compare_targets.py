"""Target `any` beside `vnni`: the numbers are those of the two files, the counts those of the rule, the output is not touched."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import qcompile.compare_targets as compare_targets
from qcompile.compare_targets import both_targets, explain, pair_rule, stored_weights
from qcompile.errors import PassError
from qcompile.pipeline import compile_model
from qcompile.printing import console, print_report

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN = MODELS / "digits_cnn.onnx"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    whole = np.load(MODELS / "digits.npz")
    np.savez(folder / "calibration.npz", input=np.load(MODELS / "digits_calib.npz")["input"][:24])
    np.savez(folder / "evaluation.npz", input=whole["input"][:60], labels=whole["labels"][:60])
    return {"data": str(folder / "calibration.npz"), "eval_data": str(folder / "evaluation.npz")}


def conv_file(path: Path, integers: np.ndarray[Any, Any], scale: float | list[float], group: int = 1) -> Path:
    """A Conv [O, I, kh, kw] with int8 weights behind a DequantizeLinear, named `conv`."""
    axis = {"axis": 0} if isinstance(scale, list) else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], **axis),
        helper.make_node("Conv", ["x", "wf"], ["y"], name="conv", group=group),
    ]
    x, y = (helper.make_tensor_value_info(n, 1, None) for n in "xy")
    stored = [
        numpy_helper.from_array(integers.astype(np.int8), "w"),
        numpy_helper.from_array(np.asarray(scale, np.float32), "s"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def test_the_report_holds_both_targets_and_the_bytes_stay_the_same(data: dict[str, str], tmp_path: Path) -> None:
    stages: list[str] = []
    plain = compile_model(CNN, tmp_path / "plain.onnx", latency=False, **data)
    made = compile_model(
        CNN, tmp_path / "made.onnx", latency=False, compare_targets=True, progress=lambda s, d, t: stages.append(s), **data
    )
    free = compile_model(CNN, tmp_path / "free.onnx", target="vnni", latency=False, **data)
    assert made.path.read_bytes() == plain.path.read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["free.onnx", "made.onnx", "plain.onnx"]
    targets = made.report["targets"]
    for name, compiled in (("any", plain), ("vnni", free)):
        assert targets[name]["sqnr_db"] == compiled.report["accuracy"]["sqnr_db"]
        assert targets[name]["top1_agreement"] == compiled.report["accuracy"]["top1_agreement"]
    assert targets["any_costs_db"] == pytest.approx(targets["vnni"]["sqnr_db"] - targets["any"]["sqnr_db"], abs=1e-3)
    assert ("reason" in targets) == (targets["any_costs_db"] > 1)
    assert targets["pair_rule"] == pair_rule(plain.path, free.path)
    assert "targets" not in plain.report
    assert any(s.startswith("target vnni: ") for s in stages)
    out = io.StringIO()
    print_report(made.report, console(out))
    assert f"targets: any {targets['any']['sqnr_db']:.2f} dB" in out.getvalue()


@pytest.mark.parametrize(
    "options",
    [{"target": "vnni"}, {"effort": "fast"}, {"eval_data": None}],
    ids=["another target", "effort fast", "no evaluation"],
)
def test_where_there_is_nothing_to_compare(options: dict[str, Any], data: dict[str, str], tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "made.onnx", latency=False, compare_targets=True, **{**data, **options})
    assert "targets" not in made.report


def test_a_target_that_does_not_compile_is_a_warning(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise PassError("pass 'x' failed")

    monkeypatch.setattr(compare_targets, "both_targets", fails)
    made = compile_model(CNN, tmp_path / "made.onnx", latency=False, compare_targets=True, **data)
    assert "target vnni was not measured: pass 'x' failed" in made.report["warnings"]
    assert made.path.is_file()


def test_nothing_is_left_behind_when_interrupted(data: dict[str, str], tmp_path: Path) -> None:
    def interrupted(stage: str, done: int, total: int | None) -> None:
        if stage == "target vnni: evaluate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_model(CNN, tmp_path / "made.onnx", latency=False, compare_targets=True, progress=interrupted, **data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_rule_holds_in_what_it_reads(form: str, bits: int, data: dict[str, str], tmp_path: Path) -> None:
    made = compile_model(CNN, tmp_path / "m.onnx", format=form, bits=bits, latency=False, data=data["data"])
    found = dict(stored_weights(made.path))
    assert len(found) == made.report["nodes"]["quantised"] - sum("Add" in n or "Pool" in n for n in _other_nodes(made.path))
    for weights in found.values():
        pairs = weights.integers[:, : weights.integers.shape[1] // 2 * 2].reshape(len(weights.integers), -1, 2).sum(-1)
        assert not weights.paired or np.abs(pairs).max() <= 128
        assert weights.scales is not None
        assert weights.scales.shape == weights.integers.shape[:1]
    assert any(not w.paired for w in found.values())  # the depthwise layer


def _other_nodes(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path).graph.node]


def test_pairs_are_counted_in_the_kernels_order(tmp_path: Path) -> None:
    free = np.zeros((2, 3, 1, 2), np.int8)
    free[0, :, 0, 0] = [100, 29, 127]  # kernel order: c0 c1 | c2 c0' | ...: 129 is over, 127 alone is not
    free[1, :, 0, 1] = [-128, 0, 0]  # pairs with c2 of the position before
    free[1, 2, 0, 0] = -1
    bound = free.copy()
    bound[0, 0, 0, 0] = 99
    bound[1, 2, 0, 0] = 0
    one = conv_file(tmp_path / "bound.onnx", bound, [0.5, 0.75])
    two = conv_file(tmp_path / "free.onnx", free, [0.5, 0.25])
    found = pair_rule(one, two)
    assert found["nodes"] == 1
    assert (found["channels"], found["channels_over"]) == (2, 2)
    assert (found["pairs"], found["pairs_over"]) == (6, 2)
    assert found["scale_ratio"] == 2.0  # the median of 1 and 3
    signal = 0.25 * (100**2 + 29**2 + 127**2) + 0.0625 * (128**2 + 1)
    noise = 0.25 * 1 + (0.5 * 128) ** 2 + 0.25**2
    assert found["weights_db"] == pytest.approx(10 * np.log10(signal / noise), abs=0.006)
    assert (found["node"], found["node_pairs_over"]) == ("conv", 2)
    assert "forbids 2 of 6 pairs" in explain(found)
    assert "in 2 of 2 channels, whose scales are 2.00 x as wide" in explain(found)


def test_depthwise_weights_are_not_paired(tmp_path: Path) -> None:
    weights = np.full((4, 1, 3, 3), 127, np.int8)
    path = conv_file(tmp_path / "depthwise.onnx", weights, 0.5, group=4)
    found = pair_rule(path, path)
    assert found["nodes"] == found["pairs_over"] == 0
    assert found["scale_ratio"] is found["weights_db"] is found["node"] is None
    assert "not the pair rule's" in explain(found)


@pytest.mark.parametrize(
    ("bound", "free", "cost"),
    [(30.0, 31.5, 1.5), (30.0, 29.5, -0.5), (float("inf"), 31.0, None), (30.0, float("inf"), None)],
    ids=["dearer", "better", "exact", "the other is exact"],
)
def test_the_reason_is_given_above_one_decibel(bound: float, free: float, cost: float | None, tmp_path: Path) -> None:
    weights = np.full((1, 2, 1, 1), 60, np.int8)
    path = conv_file(tmp_path / "a.onnx", weights, 0.5)

    def compile_free(other: Path) -> dict[str, Any]:
        assert other.parent.parent == tmp_path
        conv_file(other, weights + 10, 0.25)
        return {"accuracy": {"sqnr_db": free}}

    found = both_targets(path, {"accuracy": {"sqnr_db": bound}}, compile_free)
    assert found["any_costs_db"] == cost
    assert ("reason" in found) == (cost == 1.5)
    if cost == 1.5:
        assert found["reason"].startswith("the pair rule forbids 1 of 1 pairs")
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]
