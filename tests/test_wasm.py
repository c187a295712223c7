"""`--target wasm`: what stays float by the table, `bench --runtime`, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_models import core_context, images, model
from exactness_helpers import MODELS

from qcompile import compile_model, wasm_costs
from qcompile.context import Settings
from qcompile.errors import InputError
from qcompile.graph import Graph
from qcompile.placement import place
from qcompile.raw_tensors import write_tensors
from qcompile.wasm_costs import REASON, _table, row_macs, slow_as_integers

Command = Callable[..., tuple[int, str, str]]
CALIBRATION = str(MODELS / "digits_calib.npz")
NODE = Path(__file__).resolve().parents[1] / "build" / "edge" / "node"


def depthwise_between(size: int, channels: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return model(
        f"""g (float[1, {channels}, {size}, {size}] x) => (float[1, 16, {size}, {size}] y) {{
            a = Conv(x, v)
            b = Conv<group: int = {channels}, pads: ints = [1, 1, 1, 1]>(a, w)
            y = Conv(b, u)
        }}""",
        v=rng.normal(size=(channels, channels, 1, 1)).astype(np.float32),
        w=rng.normal(size=(channels, 1, 3, 3)).astype(np.float32),
        u=rng.normal(size=(16, channels, 1, 1)).astype(np.float32),
    )


def slow(source: onnx.ModelProto) -> set[str]:
    graph = Graph.from_proto(source)
    return {n.name for n in slow_as_integers([n for n in graph.nodes if n.op in ("Conv", "Gemm", "MatMul")])}


def test_the_table_is_whole() -> None:
    table = _table()
    assert {row["kind"] for row in table["operators"]} == {"pointwise", "depthwise", "spatial", "product"}
    assert all(row["float_us"] > 0 and row["int8_us"] > 0 and row_macs(row) > 0 for row in table["operators"])
    assert all(row["quantise_us"] > 0 and row["dequantise_us"] > 0 for row in table["boundary"])


def total(costs: Mapping[Any, wasm_costs.Cost], links: Sequence[Any], floating: Iterable[Any]) -> float:
    """Microseconds of one assignment, added up as the table says."""
    chosen = set(floating)
    row = next(r for r in _table()["boundary"] if r["elements"] == 100_000)
    spent = sum(c.floating if n in chosen else c.integer for n, c in costs.items())
    for maker, reader, elements in links:
        from_float, to_float = maker is None or maker in chosen, reader in chosen
        if from_float != to_float:
            spent += elements * row["quantise_us" if from_float else "dequantise_us"] / row["elements"]
    return spent


@pytest.mark.parametrize(("size", "channels"), [(112, 32), (14, 64), (7, 960), (56, 144)], ids=str)
def test_the_least_sum_is_found(size: int, channels: int) -> None:
    """Against every assignment of a chain of three."""
    graph = Graph.from_proto(depthwise_between(size, channels))
    costs = {n: c for n in graph.nodes if (c := wasm_costs._cost(n)) is not None}
    assert len(costs) == 3
    links = wasm_costs._links(costs)
    every = chain.from_iterable(combinations(costs, k) for k in range(4))
    found = wasm_costs._least_cut(costs, links)
    assert total(costs, links, found) == pytest.approx(min(total(costs, links, some) for some in every), abs=0.1)


def test_large_depthwise_layers_stay_float() -> None:
    assert "conv_1" in slow(depthwise_between(112, 32))
    assert len(slow(depthwise_between(112, 32))) < 3


def test_the_reason_is_reported(tmp_path: Path) -> None:
    graph = Graph.from_proto(depthwise_between(112, 32))
    refused = {n.name: why for n, why in place(graph, Settings(target="wasm")).refused}
    assert refused["conv_1"] == REASON
    assert place(Graph.from_proto(depthwise_between(112, 32)), Settings()).refused == []
    made = compile_model(
        MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", data=CALIBRATION, effort="fast", latency=False, target="wasm"
    )
    assert made.report["nodes"]["quantised"] > 0


def test_weights_obey_the_pair_rule() -> None:
    assert core_context(images(), target="wasm").settings.pair_rule
    assert not Settings(target="vnni").pair_rule


def test_integer_format_is_refused(tmp_path: Path, command: Command) -> None:
    arguments = ("--data", CALIBRATION, "--target", "wasm", "--format", "integer", "-o", tmp_path / "q.onnx")
    status, _, error = command(MODELS / "digits_cnn.onnx", *arguments)
    assert status == 2 and "no node may stay float" in error


@pytest.mark.parametrize("runtime", ["node", "web"])
def test_bench_in_node(runtime: str, tmp_path: Path, command: Command) -> None:
    if not (NODE / "node_modules" / f"onnxruntime-{runtime}").exists():
        pytest.skip(f"onnxruntime-{runtime} is absent: `make edge-setup` fetches it")
    path, report = MODELS / "digits_cnn.onnx", tmp_path / "bench.json"
    arguments = ("--runtime", runtime, "--node-modules", NODE, "--rounds", 3, "--seconds", 0.03, "--report", report)
    status, out, error = command("bench", path, path, *arguments)
    assert status == 0, error
    assert f"onnxruntime-{runtime} " in out
    found = json.loads(report.read_text())
    assert found["runtime"].startswith(f"onnxruntime-{runtime} ")
    assert all(entry["latency_ms"]["median"] > 0 for entry in found["models"])


def test_a_runtime_that_is_not_installed(tmp_path: Path, command: Command) -> None:
    path = MODELS / "digits_cnn.onnx"
    status, _, error = command("bench", path, "--runtime", "web", "--node-modules", tmp_path)
    assert status == 2 and "npm install onnxruntime-web" in error
    status, _, error = command("bench", path, "--node-modules", tmp_path)
    assert status == 2 and "--runtime" in error


def test_no_node(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = command("bench", MODELS / "digits_cnn.onnx", "--runtime", "node")
    assert status == 2 and "`node`" in error


def test_types_that_loaders_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float16"):
        write_tensors(tmp_path, {"x": np.zeros(2, np.float16)}, "input")
