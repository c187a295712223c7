"""Mixed precision on a real network: better than one width for all at the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile import compile_model
from qcompile.interpret import Interpreter
from qcompile.layer_counts import count_layers
from qcompile.runtime import Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"

pytest.importorskip("scipy")


def resnet20(path: Path, **options: Any) -> dict[str, Any]:
    """The report of one compilation, judged on the labelled samples."""
    name = "resnet20_cifar10"
    data, judged = (f"{ZOO / 'tasks.py'}:{name}_{part}" for part in ("calib", "eval"))
    return compile_model(ZOO / name / "model.onnx", path, data=data, eval_data=judged, latency=False, **options).report


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.exists(), reason="needs ../shared/zoo")
def test_resnet20_loses_less_than_with_five_bits_everywhere(tmp_path: Path) -> None:
    uniform = resnet20(tmp_path / "u.onnx", bits=5)
    mixed = resnet20(tmp_path / "m.onnx", bits="mixed", limit={"avg-bits": 5}, mixed_by="noise")
    assert mixed["mixed"]["average_bits"] <= 5
    assert mixed["accuracy"]["sqnr_db"] > uniform["accuracy"]["sqnr_db"] + 0.3


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.exists(), reason="needs ../shared/zoo")
def test_resnet20_with_pairs_of_widths_loses_less_than_with_five_bits_of_both(tmp_path: Path) -> None:
    uniform = resnet20(tmp_path / "u.onnx", bits=5, activations=5)
    mixed = resnet20(tmp_path / "m.onnx", bits="mixed", limit={"bops": 0.4}, activation_widths="4,6,8", mixed_by="noise")
    assert mixed["accuracy"]["sqnr_db"] > uniform["accuracy"]["sqnr_db"] + 1.5
    feed = {"input": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    layers = count_layers(tmp_path / "m.onnx", feed)
    macs = sum(x.macs or 0 for x in layers)
    assert sum((x.macs or 0) * x.weight_bits * x.activation_bits for x in layers) <= 0.4 * 64 * macs
    assert {x.activation_bits for x in layers} <= {4, 6, 8}
    reference = Interpreter(tmp_path / "m.onnx")
    np.testing.assert_array_equal(
        next(iter(reference.run(feed).values())), next(iter(Session(tmp_path / "m.onnx").run(feed).values()))
    )
    assert reference.float_nodes == []
