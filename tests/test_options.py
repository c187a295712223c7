"""Options are judged before any work begins: one line each, naming the option and what to give instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qcompile.context import Settings, WeightOnly
from qcompile.errors import InputError
from qcompile.options import BLOCKS, CHOICES, SPELLINGS, check_settings, output_path, weight_only_of

BAD = [
    pytest.param({"bits": 7}, r"--bits 7: weights have 8, 6, 5, 4, 3, 2 bits", id="bits"),
    pytest.param({"bits": 4, "opset": 17}, r"--bits 4 --opset 17", id="bits and opset"),
    pytest.param({"format": "tflite"}, r"--format tflite: choose one of qdq", id="format"),
    pytest.param({"target": "gpu"}, r"--target gpu: choose one of any", id="target"),
    pytest.param({"ranges": "kl"}, r"--ranges kl: choose one of mse", id="ranges"),
    pytest.param({"effort": "heroic"}, r"--effort heroic: choose one of fast", id="effort"),
    pytest.param({"inputs_as": "int4"}, r"--inputs-as int4: choose one of float32", id="inputs-as"),
    pytest.param({"format": "qoperator", "target": "arm"}, r"--format qoperator --target arm: .*use --format qdq", id="arm"),
    pytest.param({"format": "qoperator", "target": "tensorrt"}, r"--format qoperator --target tensorrt", id="tensorrt"),
]


@pytest.mark.parametrize(("settings", "words"), BAD)
def test_values_that_are_not_offered(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_settings(Settings(**settings), None, False)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


PORTABLE = WeightOnly(spelling="portable", accuracy_level=None)
BAD_WEIGHT_ONLY = [
    pytest.param({"bits": 8}, r"--activations float --bits 8: .*give --bits 4", id="bits"),
    pytest.param({"weight_only": WeightOnly(block=48)}, r"--block 48: choose one of 32, 64, 128", id="block"),
    pytest.param({"weight_only": WeightOnly(spelling="q4")}, r"--spelling q4: choose one of matmulnbits", id="spelling"),
    pytest.param({"weight_only": WeightOnly(accuracy_level=5)}, r"--accuracy-level 5: give a whole number", id="level"),
    pytest.param({"weight_only": WeightOnly(accuracy_level=-1)}, r"--accuracy-level -1", id="negative level"),
    pytest.param({"format": "qoperator"}, r"--activations float --format qoperator: .*use --format qdq", id="format"),
    pytest.param({"inputs_as": "uint8"}, r"--activations float --inputs-as uint8: inputs stay float", id="inputs"),
    pytest.param({"opset": 17}, r"--bits 4 --opset 17", id="opset"),
    pytest.param({"target": "tensorrt"}, r"--target tensorrt: .*add --spelling portable --symmetric", id="tensorrt"),
    pytest.param({"target": "tensorrt", "weight_only": PORTABLE}, r"--target tensorrt", id="tensorrt asymmetric"),
]


@pytest.mark.parametrize(("settings", "words"), BAD_WEIGHT_ONLY)
def test_what_weight_only_does_not_go_with(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_settings(Settings(**{"bits": 4, "weight_only": WeightOnly(), **settings}), None, False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["any", "vnni", "arm", "tensorrt"])
def test_what_weight_only_goes_with(target: str) -> None:
    for block in BLOCKS:
        for spelling in SPELLINGS if target != "tensorrt" else ("portable",):
            options = WeightOnly(block, True, spelling, None if spelling == "portable" else 0)
            check_settings(Settings(bits=4, target=target, weight_only=options), None, False)


def test_weight_only_options_have_defaults_and_go_with_float_activations() -> None:
    assert weight_only_of("int8", None, None, None, None) is None
    assert weight_only_of("float", None, None, None, None) == WeightOnly(32, False, "matmulnbits", 4)
    assert weight_only_of("float", 128, True, "matmulnbits", 0) == WeightOnly(128, True, "matmulnbits", 0)
    assert weight_only_of("float", None, None, "portable", None) == PORTABLE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("int8", 32, None, None, None), r"--block is for weight-only files; give --bits 4", id="block"),
        pytest.param(("int8", None, False, None, None), r"--symmetric is for weight-only files", id="symmetric"),
        pytest.param(("int8", None, None, "portable", None), r"--spelling is for weight-only files", id="spelling"),
        pytest.param(("int8", None, None, None, 0), r"--accuracy-level is for weight-only files", id="level"),
        pytest.param(("float", None, None, "portable", 0), r"leave it out with --spelling portable", id="level of no node"),
    ],
)
def test_weight_only_options_that_go_with_nothing(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        weight_only_of(*arguments)


@pytest.mark.parametrize("name", CHOICES)
def test_every_offered_value_is_taken(name: str) -> None:
    for value in CHOICES[name]:
        needed = {"format": "integer"} if (name, value) in (("io", "integer"), ("kernels", "ibert")) else {}
        check_settings(Settings(**{**needed, name: value}), None, False)
    assert getattr(Settings(), name) in CHOICES[name]


@pytest.mark.parametrize(
    ("limit", "has_evaluation", "words"),
    [
        pytest.param(1.0, False, "give --eval data with labels", id="no-eval"),
        pytest.param(-0.1, True, "between 0 and 100", id="negative"),
        pytest.param(100.5, True, "between 0 and 100", id="too-large"),
        pytest.param(float("nan"), True, "between 0 and 100", id="nan"),
    ],
)
def test_limits_that_cannot_be(limit: float, has_evaluation: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_settings(Settings(), limit, has_evaluation)


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_limits_that_can_be(limit: float) -> None:
    check_settings(Settings(), limit, True)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("/stem/conv", "/stem/conv", True),
        ("/stem/*", "/stem/conv", True),
        ("*conv", "/stem/conv", True),
        ("/Stem/*", "/stem/conv", False),
        ("conv[0]", "conv[0]", True),  # a literal name wins over a pattern of the same text
        ("conv[01]", "conv1", True),
        ("conv", "conv1", False),
    ],
)
def test_exclude_patterns(pattern: str, name: str, expected: bool) -> None:
    assert Settings(exclude=(pattern,)).excluded(name) is expected


# ---- where the output goes ----
def test_the_default_stands_beside_the_source(tmp_path: Path) -> None:
    assert output_path(tmp_path / "net.onnx", None, 8) == tmp_path / "net.int8.onnx"
    assert output_path(tmp_path / "net.v2.onnx", None, 8) == tmp_path / "net.v2.int8.onnx"
    assert output_path(tmp_path / "net", None, 8) == tmp_path / "net.int8.onnx"
    assert output_path(tmp_path / "net.onnx", str(tmp_path / "other.onnx"), 8) == tmp_path / "other.onnx"


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_the_input_is_never_overwritten(tmp_path: Path, link: str) -> None:
    source = tmp_path / "net.onnx"
    source.write_bytes(b"model")
    output = source if link == "same" else tmp_path / "alias.onnx"
    if link == "symbolic":
        output.symlink_to(source)
    elif link == "hard":
        os.link(source, output)
    with pytest.raises(InputError, match="is the input itself"):
        output_path(source, output, 8)
    assert source.read_bytes() == b"model"


def test_a_folder_a_missing_folder_and_a_locked_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is a folder; give a file name"):
        output_path(tmp_path / "net.onnx", tmp_path, 8)
    with pytest.raises(InputError, match="its folder does not exist"):
        output_path(tmp_path / "net.onnx", tmp_path / "none" / "out.onnx", 8)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so permissions themselves prove nothing
    with pytest.raises(InputError, match="cannot be written; choose another"):
        output_path(tmp_path / "net.onnx", tmp_path / "out.onnx", 8)
