"""Importing small Q/DQ models in tests: compile them in memory, and models of one pattern as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from passes_helpers import parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Node
from qcompile.imported import Imported
from qcompile.passes import passes_for
from qcompile.pipeline import Compiled, compile_model
from qcompile.runtime import Session


def imported(model: ModelProto, **settings: Any) -> tuple[Graph, Context]:
    """Through all passes of an import, without the checks of the pipeline."""
    graph, context = Graph.from_proto(model), Context(Settings(**settings))
    for step in passes_for("imported"):
        step.run(graph, context)
    return graph, context


def state(context: Context) -> Imported:
    assert context.imported is not None
    return context.imported


def written_weights(graph: Graph) -> dict[str, Array]:
    """Integers of each linear node, in the layout [channels, ...]."""
    found = {}
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm"):
            dequantise = node.inputs[1].producer
            assert dequantise is not None
            stored = dequantise.constant(0)
            assert stored is not None
            found[node.name] = stored.array() if node.op == "Conv" or node.attr("transB", 0) else stored.array().T
    return found


def compiled(model: ModelProto, tmp_path: Path, **options: Any) -> Compiled:
    onnx.save(model, tmp_path / "source.onnx")
    return compile_model(tmp_path / "source.onnx", tmp_path / "out.onnx", latency=False, **options)


def sqnr(wanted: Array, got: Array) -> float:
    noise = float(np.square(wanted.astype(np.float64) - got).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float(np.square(wanted.astype(np.float64)).sum()) / noise)


def only(graph: Graph, op: str) -> Node:
    found = [n for n in graph.nodes if n.op == op]
    assert len(found) == 1, [n.op for n in graph.nodes]
    return found[0]


SCALES = "float s = {0.05}, uint8 z = {100}, float t = {0.02}, uint8 o = {0}, float m = {0.01}, int8 n = {0}"
WEIGHT = "int8[4, 4] v = {1, -2, 3, 4, 5, 60, -7, 8, 9, 10, -110, 12, 13, 14, 15, -127}"


def text(body: str, constants: str = "", ends: str = "float[2, 4] x) => (float[2, 4] y") -> ModelProto:
    made = parse(f"g ({ends}) <{SCALES}, {WEIGHT}{', ' + constants if constants else ''}> {{ {body} }}")
    for index, node in enumerate(made.graph.node):
        node.name = f"{node.op_type.lower()}_{index}"
    onnx.checker.check_model(made, full_check=True)
    return made


QX = "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) "
QW = "w = DequantizeLinear(v, m, n) "


def close_to_source(model: ModelProto, graph: Graph, step: float, shape: tuple[int, ...] = (2, 4)) -> None:
    """Every output within one step of the source's last rounding."""
    before, after = Session(model), Session(graph.to_proto())
    random = np.random.default_rng(1)
    for _ in range(5):
        feeds = {"x": random.normal(size=shape).astype(np.float32) * 3}
        for name, value in before.run(feeds).items():
            np.testing.assert_allclose(after.run(feeds)[name], value, rtol=0, atol=1.01 * step)
