"""Sparsity and channel pruning on real models, without retraining. vit_mnist only where QCOMPILE_FULL=1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile import compile_model
from qcompile.certificate import certify
from qcompile.layer_counts import count_layers, share_that_follows, totals
from qcompile.runtime import Session
from qcompile.sparsity import Pattern

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
full = pytest.mark.skipif(os.environ.get("QCOMPILE_FULL") != "1", reason="a minute: set QCOMPILE_FULL=1")
pytestmark = [pytest.mark.zoo, pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")]


def drop(task: str, path: Path, **options: Any) -> float:
    data = {key: f"{ZOO}/tasks.py:{task}_{part}" for key, part in (("data", "calib"), ("eval_data", "eval"))}
    report = compile_model(ZOO / task / "model.onnx", path, latency=False, **data, **options).report  # type: ignore[arg-type]
    return float(report["accuracy"]["drop_points"])


@pytest.mark.parametrize(("task", "points"), [("resnet20_cifar10", 3.0), pytest.param("vit_mnist", 0.5, marks=full)])
def test_two_of_four_in_int8(task: str, points: float, tmp_path: Path) -> None:
    second = drop(task, tmp_path / "obs.onnx", sparsity="2:4")
    assert second <= points
    assert second <= drop(task, tmp_path / "magnitude.onnx", sparsity="2:4", criterion="magnitude")
    assert share_that_follows(count_layers(tmp_path / "obs.onnx"), Pattern(2, 4)) >= 0.8


def test_half_of_the_weights(tmp_path: Path) -> None:
    assert drop("resnet20_cifar10", tmp_path / "m.onnx", sparsity="0.5") <= 1.0


def test_a_third_of_resnet20s_channels(tmp_path: Path) -> None:
    refitted = drop("resnet20_cifar10", tmp_path / "m.onnx", bits=32, prune_channels=0.3)
    plain = drop("resnet20_cifar10", tmp_path / "l1.onnx", bits=32, prune_channels=0.3, prune_criterion="l1", refit=False)
    assert refitted <= 5.0
    assert refitted + 5.0 <= plain
    before, after = (totals(count_layers(p)) for p in (ZOO / "resnet20_cifar10" / "model.onnx", tmp_path / "m.onnx"))
    assert (after["parameters"] or 0) < (before["parameters"] or 0)


@full
@pytest.mark.parametrize("task", ["mobilenet_v1", "mobilenet_v2"])
def test_a_tenth_of_a_depthwise_networks_channels(task: str, tmp_path: Path) -> None:
    """Not those in front of the global pool, where a calibration photo is one row."""
    assert drop(task, tmp_path / "m.onnx", bits=32, prune_channels=0.1) <= 5.0


def test_implants_of_resnet20_in_integers(tmp_path: Path) -> None:
    """The layers that are split save what the budget says, and stay exact to the pure integer model."""
    paths = [tmp_path / f"{name}.onnx" for name in ("qdq", "integer")]
    lost = [drop("resnet20_cifar10", p, format=p.stem, prune_channels=0.2, prune_implant=0.5) for p in paths]
    assert lost[0] == lost[1] <= 10.0
    before, after = (totals(count_layers(p)) for p in (ZOO / "resnet20_cifar10" / "model.onnx", paths[0]))
    assert (after["parameters"] or 0) < (before["parameters"] or 0)
    graph = onnx.load(paths[1])
    assert certify(graph).integer_only
    assert sum(n.name.endswith("_implant") for n in onnx.load(paths[0]).graph.node if n.op_type == "Conv") >= 2
    name, random = graph.graph.input[0].name, np.random.default_rng(0)
    feeds = [{name: random.normal(size=(1, 3, 32, 32)).astype(np.float32)} for _ in range(4)]
    sessions = [Session(p, threads=1) for p in paths]
    for feed in feeds:
        first, second = (s.run(feed) for s in sessions)
        assert all(np.array_equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
