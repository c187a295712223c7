"""Mixed precision on a real network: better than one width for all at the same size."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile import compile_model

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"

pytest.importorskip("scipy")


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.exists(), reason="needs ../shared/zoo")
def test_resnet20_loses_less_than_with_five_bits_everywhere(tmp_path: Path) -> None:
    name = "resnet20_cifar10"
    data, judged = (f"{ZOO / 'tasks.py'}:{name}_{part}" for part in ("calib", "eval"))
    source = ZOO / name / "model.onnx"
    uniform = compile_model(source, tmp_path / "u.onnx", bits=5, data=data, eval_data=judged, latency=False).report
    mixed = compile_model(
        source,
        tmp_path / "m.onnx",
        bits="mixed",
        limit={"avg-bits": 5},
        mixed_by="noise",
        data=data,
        eval_data=judged,
        latency=False,
    ).report
    assert mixed["mixed"]["average_bits"] <= 5
    assert mixed["accuracy"]["sqnr_db"] > uniform["accuracy"]["sqnr_db"] + 0.3
