"""`--activation-widths`: pairs of widths within a limit on bit operations, groups that share one, exactness, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import CNN, MODELS, Command, is_one_error
from core_models import floats
from exactness_helpers import assert_file_exact, digits
from passes_helpers import parse
from runtime_marks import needs_conv_integer

from qcompile import compile_model
from qcompile.audit import audit
from qcompile.certificate import certify
from qcompile.context import Settings
from qcompile.cut_layer import LayerSpec
from qcompile.errors import InputError
from qcompile.graph import Graph
from qcompile.layer_counts import count_layers
from qcompile.options_mixed import parse_activation_widths
from qcompile.planner import Assigned, Mixing, Planner
from qcompile.printing_mixed import mixed_lines
from qcompile.probing import Study, WidthCost, measure_group
from qcompile.recipe import recipe_of
from qcompile.sensitivity import GroupSensitivity, LayerSensitivity, Sensitivity
from qcompile.source_groups import SourceGroup, Step

pytest.importorskip("scipy")
DATA = str(MODELS / "digits_calib.npz")
FEED = {"input": np.zeros((1, 1, 8, 8), np.float32)}


def mixed(path: Path, **options: Any) -> dict[str, Any]:
    options = {"limit": {"bops": 0.35}, "activation_widths": "4,6,8", "mixed_by": "noise", "samples": 64, **options}
    return compile_model(CNN, path, bits="mixed", data=DATA, latency=False, **options).report


@pytest.mark.parametrize("form", ["qdq", "qoperator", pytest.param("integer", marks=needs_conv_integer)])
def test_each_format_is_exact_and_keeps_the_limit(form: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = mixed(path, format=form)
    layers = count_layers(path, FEED)
    macs = sum(x.macs or 0 for x in layers)
    used = sum((x.macs or 0) * x.weight_bits * x.activation_bits for x in layers) / (64 * macs)
    assert used <= 0.35
    # The file's products include channels that were padded; the program's do not.
    assert used == pytest.approx(report["mixed"]["predicted"]["bops"], rel=0.1)
    told = [(x["bits"], x["activation_bits"]) for x in report["mixed"]["layers"]]
    assert [(x.weight_bits, x.activation_bits) for x in layers] == told
    assert len({a for _, a in told}) > 1
    assert audit(path).not_fused == []
    if form == "integer":
        assert certify(path).integer_only
    assert_file_exact(path, form, digits(10))


def test_the_same_bytes_from_the_recipe_and_with_workers(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{n}.onnx" for n in range(3))
    report = mixed(first)
    assert report["recipe"]["compile"]["activation-widths"] == "4,6,8"
    compile_model(CNN, second, latency=False, **recipe_of(report["recipe"], "report").compile_arguments())
    mixed(third, activation_widths=[8, 6, "4"], workers=2)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_a_choice_of_pairs_beats_one_pair_for_all(tmp_path: Path) -> None:
    judged: dict[str, Any] = {"eval_data": str(MODELS / "digits.npz"), "latency": False, "data": DATA}
    limit = {"bops": 25 / 64 + 0.03}  # the first layer's input keeps 8 bits
    report = compile_model(
        CNN, tmp_path / "m.onnx", bits="mixed", limit=limit, activation_widths="4,5,6,8", mixed_by="noise", **judged
    )
    plain = compile_model(CNN, tmp_path / "u.onnx", bits=5, activations=5, **judged)
    assert report.report["accuracy"]["sqnr_db"] > plain.report["accuracy"]["sqnr_db"]


def test_one_width_of_activations_is_counted(tmp_path: Path) -> None:
    report = mixed(tmp_path / "m.onnx", activation_widths=None, activations=4, limit={"bops": 0.3})
    layers = count_layers(tmp_path / "m.onnx", FEED)
    assert [x.activation_bits for x in layers] == [8] + 5 * [4]
    assert [x["activation_bits"] for x in report["mixed"]["layers"]] == [8] + 5 * [4]
    assert sum((x.macs or 0) * x.weight_bits * x.activation_bits for x in layers) <= 0.3 * 64 * sum(x.macs or 0 for x in layers)
    assert "groups" not in report["mixed"]


def test_a_users_width_of_a_node_stands(tmp_path: Path) -> None:
    node = next(x.node for x in count_layers(CNN) if "pointwise" in x.node)
    report = mixed(tmp_path / "m.onnx", nodes={node: {"activations": 5}})
    bits = {x["node"]: x["activation_bits"] for x in report["mixed"]["layers"]}
    assert bits[node] == 5
    assert {x.node: x.activation_bits for x in count_layers(tmp_path / "m.onnx")}[node] == 5


def group_model() -> tuple[Study, np.ndarray[Any, Any]]:
    """y = |x| + 1, where |x| is the one tensor of a group."""
    proto = parse(
        "g (float[n, 2] x) => (float[n, 2] y) { a = Abs (x)  b = Identity (a)  y = Add (b, one) }", one=np.ones(2, np.float32)
    )
    graph = Graph.from_proto(proto)
    feeds = [{"x": floats(8, 2, seed=s)} for s in range(4)]
    group = SourceGroup(("a",), ("l",), ("l",), {2: (Step(1 / 3, 0, 3),), 8: (Step(1 / 255, 0, 255),)})
    study = Study(graph.to_proto().SerializeToString(), feeds, [None] * 4, [], groups=[group])
    return study, np.concatenate([feeds[1]["x"], feeds[3]["x"]])


def test_a_group_is_measured_on_samples_that_nothing_learns_from() -> None:
    study, x = group_model()
    two, eight = measure_group(study, 0, (2, 8))
    a = np.abs(x).astype(np.float64)
    for found, levels in ((two, 3), (eight, 255)):
        step = np.float64(np.float32(1 / levels))
        rounded = np.clip(np.rint(a / step), 0, levels) * step
        assert found.noise == pytest.approx(np.square(rounded - a).sum() / np.square(a + 1).sum(), rel=1e-4)
    assert two.noise > eight.noise > 0


def sensitivity() -> Sensitivity:
    """Three layers of 100 weights and 1000 products: the first reads an input, both others read one group."""
    layers = []
    for index in range(3):
        spec = LayerSpec(f"l{index}", "Conv", "linear", f"w{index}", None, 0, 100, 4)
        layers.append(LayerSensitivity(spec, 1000, None, tuple(WidthCost(b, 1.0, 4.0**-b, 4.0**-b) for b in (4, 8))))
    source = SourceGroup(("t",), ("l1", "l2", "add"), ("l1", "l2"))
    group = GroupSensitivity(source, tuple(WidthCost(b, 0.0, 4.0**-b, 0.001 * 4.0**-b) for b in (4, 8)))
    return Sensitivity(tuple(layers), 4, "kl", (group,))


def planner(mixing: Mixing, **settings: Any) -> Planner:
    return Planner(sensitivity(), mixing, Settings(**settings), 10_000)


PAIRS = Mixing((("bops", 0.7),), widths=(4, 8), by=("noise",), activations=(4, 8))


def test_a_group_narrows_all_its_layers_together() -> None:
    plan = planner(PAIRS)
    found = plan.solve("noise", {"bops": 2 / 3})  # (8, 8) + 2 * (8, 4) of 3 * (8, 8)
    assert found == Assigned((("l0", 8), ("l1", 8), ("l2", 8)), (("l1", 4), ("l2", 4)))
    assert plan.uses(found)["bops"] == pytest.approx(2 / 3)
    assert plan.activation_bits(found) == {"l0": 8, "l1": 4, "l2": 4}
    assert plan.predicted(found) == pytest.approx(3 * 4.0**-8 + 0.001 * 4.0**-4)
    assert plan.solve("noise", {"bops": 1.0}) == Assigned((("l0", 8), ("l1", 8), ("l2", 8)))
    assert plan.narrowest() == Assigned((("l0", 4), ("l1", 4), ("l2", 4)), (("l1", 4), ("l2", 4)))
    assert plan.solve("kl", {"bops": 1.0}) == Assigned((("l0", 8), ("l1", 8), ("l2", 8)))


def test_one_pair_for_all_is_that_of_least_noise() -> None:
    found = planner(PAIRS).solve("uniform", {"bops": 2 / 3})
    assert found == Assigned((("l0", 8), ("l1", 8), ("l2", 8)), (("l1", 4), ("l2", 4)))
    assert planner(PAIRS).solve("uniform", {"bops": 0.1}) is None


def test_a_pinned_reader_decides_for_its_group() -> None:
    plan = planner(PAIRS, node_activations=(("add", 8),))
    with pytest.raises(InputError, match=r"--limit bops: 0\.4 asked for, 0\.5 is the nearest"):
        plan.solve("noise", {"bops": 0.4})
    assert plan.narrowest().activations == ()


def test_infeasible_limits_name_what_can_be_had() -> None:
    with pytest.raises(InputError, match=r"0\.2 asked for, 0\.333333 is the nearest"):
        planner(PAIRS).solve("noise", {"bops": 0.2})


def test_the_summary_tells_widths_and_ties(tmp_path: Path) -> None:
    report = mixed(tmp_path / "m.onnx")
    groups = report["mixed"]["groups"]
    assert all(g["bits"] in (4, 6, 8) and [w["bits"] for w in g["widths"]] == [4, 6, 8] for g in groups)
    for group in groups:
        widths = {x["activation_bits"] for x in report["mixed"]["layers"] if x["node"] in group["read_by"]}
        assert widths == {group["bits"]}
    assert report["mixed"]["activation_widths"] == [4, 6, 8]
    text = "\n".join(mixed_lines(report))
    assert "activations that layers read: " in text
    tied = {"layers": [{"node": n, "bits": 8, "activation_bits": 4} for n in "abc"], "groups": [{"read_by": [*"abc"], "bits": 4}]}
    shown = "\n".join(mixed_lines({"mixed": {**report["mixed"], **tied}}))
    assert "one width, 4 bits, for 3 layers: a ... c" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"activation_widths": "7"}, "--activation-widths 7: give some of 2, 3, 4, 5, 6, 8", id="seven"),
        pytest.param({"activation_widths": ""}, "--activation-widths : give some", id="empty"),
        pytest.param({"activation_widths": []}, "--activation-widths : give some", id="none"),
        pytest.param({"activations": 4}, "leave --activations out", id="both"),
        pytest.param({"target": "tensorrt", "widths": "4,8"}, "--activation-widths --target tensorrt", id="tensorrt"),
        pytest.param({"limit": {"bops": 0.01}}, "--limit bops: 0.01 asked for, .* is the nearest", id="infeasible"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        mixed(tmp_path / "m.onnx", **{"samples": 8, **options})


def test_widths_are_read() -> None:
    assert parse_activation_widths("8, 4,4", "int8") == (4, 8)
    assert parse_activation_widths(None, "int8") == (8,)
    assert parse_activation_widths(None, 4) == (4,)


def test_the_command_line(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    args = ["--data", DATA, "--samples", "16", "--no-latency", "-o", str(out), "--mixed-by", "noise", "--bits", "mixed"]
    status, text, err = command(CNN, *args, "--limit", "bops=0.4", "--activation-widths", "4,8")
    assert (status, err) == (0, "")
    assert "activations that layers read" in text
    status, _, err = command(CNN, "--data", DATA, "-o", str(out), "--activation-widths", "4,8")
    assert status == 2
    assert is_one_error(err)
    assert "--activation-widths is for mixed precision" in err


def test_the_table_of_sensitivities_has_the_groups(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    args = [CNN, "--data", DATA, "--no-trace", "--samples", "8", "--widths", "8", "--report", str(out)]
    status, text, err = command("sensitivity", *args)
    assert (status, err) == (0, "")
    groups = json.loads(out.read_text())["sensitivity"]["groups"]
    assert len(groups) == 4
    assert ["/stem/stem.2/Relu_output_0", "/residual/relu/Relu_output_0"] in [g["tensors"] for g in groups]
    for group in groups:
        kl = [w["kl"] for w in group["widths"]]
        assert [w["bits"] for w in group["widths"]] == [4, 6, 8]
        assert kl == sorted(kl, reverse=True)
    assert "activations of one width" in text
    status, text, _ = command("sensitivity", *args, "--no-activations")
    assert status == 0
    assert "activations of one width" not in text
    assert "groups" not in json.loads(out.read_text())["sensitivity"]


ROWS = """g (float[n, 4, 16] x) => (float[n, 4, 8] y) {
    a = LayerNormalization <axis = -1> (x, gain)
    flat = Reshape (a, to_rows)
    m = MatMul (flat, w1)
    r = Relu (m)
    back = Reshape (r, to_batch)
    t = Reshape (back, to_rows)
    l = MatMul (t, w2)
    y = Reshape (l, to_out)
}"""


@pytest.mark.parametrize("widths", [None, "4,8"])
def test_a_moved_float_is_rounded_where_it_comes_to(widths: str | None, tmp_path: Path) -> None:
    # `flat` is rounded, but `a` is not: the group of the first layer has no tensor but one that data movement makes.
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((16, 32), (32, 8)))
    shapes = {"to_rows": [-1, 0], "to_batch": [-1, 4, 32], "to_out": [-1, 4, 8]}
    fixed = {name: np.array(dims, np.int64) for name, dims in shapes.items()} | {"to_rows": np.array([-1, 16], np.int64)}
    text = ROWS.replace("t = Reshape (back, to_rows)", "t = Reshape (back, to_wide)")
    proto = parse(text, gain=np.ones(16, np.float32), w1=w1, w2=w2, to_wide=np.array([-1, 32], np.int64), **fixed)
    path = tmp_path / "rows.onnx"
    path.write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "x.npz", x=floats(64, 4, 16, seed=1))
    options: dict[str, Any] = {"limit": {"bops": 0.4}, "mixed_by": "noise", "activation_widths": widths}
    report = compile_model(path, tmp_path / "m.onnx", bits="mixed", data=str(tmp_path / "x.npz"), latency=False, **options)
    if widths is not None:
        groups = report.report["mixed"]["groups"]
        assert [g["tensors"][0] for g in groups] == ["flat", "r"]
        assert all(cost["noise"] > 0 for g in groups for cost in g["widths"])
