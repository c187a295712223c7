"""`inspect --portable`: every rule on a file that breaks it, what obeys each, and files that the compiler writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from exactness_helpers import MODELS
from onnx import ModelProto, helper, numpy_helper
from passes_helpers import parse
from runtime_marks import needs_conv_integer

from qcompile import compile_model
from qcompile.errors import ModelError
from qcompile.portable import RULES, portability
from qcompile.portable_versions import READS

EDGE = Path(__file__).resolve().parents[1] / "benchmarks" / "edge"
sys.path.insert(0, str(EDGE))
from broken import broken_files  # noqa: E402

Command = Callable[..., tuple[int, str, str]]
BROKEN = broken_files()
CALIBRATION = str(MODELS / "digits_calib.npz")


def rules(model: ModelProto) -> list[str]:
    return [f.rule for f in portability(model).findings]


def test_every_rule_has_a_broken_file() -> None:
    assert set(BROKEN) == set(RULES)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_broken_file_is_named(rule: str) -> None:
    found = portability(BROKEN[rule].model)
    assert not found.portable
    assert rule in [f.rule for f in found.findings]
    assert all(f.detail and f.machines for f in found.findings)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_command_refuses_it(rule: str, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "broken.onnx"
    onnx.save(BROKEN[rule].model, path)
    status, out, _ = command("inspect", path, "--portable")
    assert (status, f"{rule}: {RULES[rule]}" in out, "portable: no" in out) == (0, True, True)
    status, _, error = command("inspect", path, "--portable", "--require-portable")
    assert status == 3 and error.count("\n") == 1 and "not portable" in error


@pytest.mark.parametrize("format", ["qdq", "qoperator", pytest.param("integer", marks=needs_conv_integer)])
@pytest.mark.parametrize("model", ["digits_cnn", "digits_vit"])
def test_what_the_compiler_writes(model: str, format: str, tmp_path: Path) -> None:
    source = MODELS / f"{model}.onnx"
    made = compile_model(source, tmp_path / "q.onnx", data=CALIBRATION, effort="fast", latency=False, format=format)
    found = {f.rule for f in portability(made.path).findings}
    expected = {
        ("digits_cnn", "qdq"): set(),
        ("digits_vit", "qdq"): {"float"},
        ("digits_cnn", "qoperator"): {"only-onnxruntime"},
        ("digits_vit", "qoperator"): {"only-onnxruntime"},
    }
    assert found == expected.get((model, format), set())


@pytest.mark.parametrize(
    ("target", "rule"), [("vnni", "pair-saturation"), ("arm", "s8-qdq"), ("tensorrt", "s8-qdq")], ids=["vnni", "arm", "tensorrt"]
)
def test_other_targets_are_not_portable(target: str, rule: str, tmp_path: Path) -> None:
    source = MODELS / "digits_cnn.onnx"
    made = compile_model(source, tmp_path / "q.onnx", data=CALIBRATION, effort="fast", latency=False, target=target)
    assert rule in {f.rule for f in portability(made.path).findings}


def test_four_bits_and_compressed_weights_are_read(tmp_path: Path) -> None:
    source = MODELS / "digits_cnn.onnx"
    settings = {"data": CALIBRATION, "effort": "fast", "latency": False}
    for name, extra in {"int4": {"bits": 4}, "sparse": {"sparsity": "2:4"}}.items():
        made = compile_model(source, tmp_path / f"{name}.onnx", **settings, **extra)
        assert portability(made.path).portable, name


def linear(weight: np.ndarray, kind: str = "uint8") -> ModelProto:
    rows, columns = weight.shape
    text = f"""g ({kind}[2, {rows}] x) => ({kind}[2, {columns}] y) {{ y = QLinearMatMul(x, s, z, w, s, v, s, z) }}"""
    return parse(text, w=weight, s=np.float32(1), z=np.dtype(kind).type(0), v=np.int8(0))


@pytest.mark.parametrize(
    ("pair", "over"),
    [((64, 64), False), ((65, 64), True), ((127, 1), False), ((127, 2), True), ((-64, -64), False), ((-65, -64), True)],
    ids=str,
)
def test_the_bound_of_pairs(pair: tuple[int, int], over: bool) -> None:
    weight = np.zeros((4, 3), np.int8)
    weight[2:4, 1] = pair
    assert (255 * sum(pair) > 32767 or 255 * sum(pair) < -32768) == over
    assert ("pair-saturation" in rules(linear(weight))) == over


def test_pairs_start_at_even_places_and_the_last_may_be_alone() -> None:
    weight = np.zeros((5, 1), np.int8)
    weight[1:3] = 127  # in two pairs
    weight[4] = 127  # alone
    assert rules(linear(weight)) == []


def test_signed_activations_of_qlinear_operators_do_not_saturate() -> None:
    assert rules(linear(np.full((4, 2), 127, np.int8), "int8")) == []


def convolution(op: str, outputs: int, channels: int, group: int) -> ModelProto:
    weight = np.full((outputs, channels // group, 3, 3), 127, np.int8)
    operands = "x, s, z, w, s, v, s, z" if op == "QLinearConv" else "x, w, z"
    kind = "uint8" if op == "QLinearConv" else "int32"
    text = f"""g (uint8[1, {channels}, 8, 8] x) => ({kind}[1, {outputs}, 6, 6] y) {{
        y = {op}<group: int = {group}>({operands})
    }}"""
    return parse(text, w=weight, s=np.float32(1), z=np.uint8(0), v=np.int8(0))


@pytest.mark.parametrize(
    ("op", "outputs", "channels", "group", "over"),
    [
        ("QLinearConv", 8, 8, 1, True),
        ("QLinearConv", 8, 8, 2, True),
        ("QLinearConv", 8, 8, 8, False),
        ("QLinearConv", 16, 8, 8, True),
        ("ConvInteger", 8, 8, 1, False),
    ],
    ids=["dense", "grouped", "depthwise", "channel multiplier", "ConvInteger"],
)
def test_which_convolutions_add_in_pairs(op: str, outputs: int, channels: int, group: int, over: bool) -> None:
    assert ("pair-saturation" in rules(convolution(op, outputs, channels, group))) == over


def test_pairs_of_convolutions_are_neighbouring_channels() -> None:
    model = convolution("QLinearConv", 1, 2, 1)
    weight = np.zeros((1, 2, 3, 3), np.int8)
    weight[0, 0] = 127  # kh, kw, channel: each 127 stands beside a 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    assert rules(model) == []
    weight[0, 0] = 0
    weight[0, :, 1, 1] = 127
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    assert rules(model) == ["pair-saturation"]


def test_a_zero_right_operand_of_run_time_is_no_finding() -> None:
    """The requantiser multiplies by zeros that are expanded at run time."""
    text = """g (uint8[2, 4] x, int64[2] n) => (uint8[2, 3] y) {
        k = Expand(zero, n)
        y = QLinearMatMul(x, s, z, k, s, v, s, z)
    }"""
    constants = {"zero": np.zeros((1, 1), np.int8), "s": np.float32(1), "z": np.uint8(0), "v": np.int8(0)}
    assert rules(parse(text, **constants)) == []
    assert rules(parse(text, **{**constants, "zero": np.full((1, 1), 100, np.int8)})) == ["dynamic-s8"]


def test_the_least_versions() -> None:
    def needs(opset: int, ir_version: int) -> dict[str, str | None]:
        node = helper.make_node("Identity", ["x"], ["y"])
        ends = [helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, [1]) for n in "xy"]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        return portability(model).needs

    assert needs(13, 8)["onnxruntime"] == "1.16"
    assert needs(21, 9) == {"onnxruntime": "1.18", "onnxruntime-node": "1.18", "onnxruntime-web": "1.18"}
    assert needs(28, 14) == {"onnxruntime": "1.32", "onnxruntime-node": None, "onnxruntime-web": None}
    assert needs(99, 14) == {"onnxruntime": None, "onnxruntime-node": None, "onnxruntime-web": None}
    assert list(READS) == sorted(READS, key=lambda row: row[1:])


def test_external_weights_are_read(tmp_path: Path) -> None:
    model = linear(np.full((64, 64), 127, np.int8))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert [f.rule for f in portability(path).findings] == ["pair-saturation"]
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights\.bin"):
        portability(path)


def test_only_onnxruntime_counts_where_that_is_asked(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "q.onnx"
    onnx.save(BROKEN["only-onnxruntime"].model, path)
    assert command("inspect", path, "--portable", "--require-portable", "--among", "onnxruntime")[0] == 0
    onnx.save(BROKEN["add-ties"].model, path)
    assert command("inspect", path, "--portable", "--require-portable", "--among", "onnxruntime")[0] == 3


def test_json_lists_all(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "q.onnx"
    onnx.save(BROKEN["dynamic-s8"].model, path)
    found = json.loads(command("inspect", path, "--json")[1])["portable"]
    assert found["holds"] is False
    assert found["findings"][0]["machines"] == ["x86 AVX2 without VNNI"]


@pytest.mark.parametrize(
    "arguments",
    [("--require-portable",), ("--portable", "--json"), ("--portable", "--among", "onnxruntime")],
    ids=["alone", "json", "among"],
)
def test_usage_errors(arguments: tuple[str, ...], tmp_path: Path, command: Command) -> None:
    path = tmp_path / "q.onnx"
    onnx.save(BROKEN["opset"].model, path)
    status, _, error = command("inspect", path, *arguments)
    assert status == 2 and error


def test_a_file_that_is_no_model(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "q.onnx"
    path.write_text("no model")
    status, _, error = command("inspect", path, "--portable")
    assert status == 2 and "cannot be read" in error
