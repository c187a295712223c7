"""Small models and a way to run the registry's passes on them up to any point, shared by the tests of the quantising core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from passes_helpers import floats, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Node
from qcompile.passes import PASSES
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.dyadic_scales import DyadicScales
from qcompile.passes.integer_bias import IntegerBias
from qcompile.passes.quantise import Quantise
from qcompile.passes.refine_layers import RefineLayers
from qcompile.passes.round_weights import RoundWeights
from qcompile.passes.search_ranges import SearchRanges
from qcompile.rewrite import Pass, Report
from qcompile.runtime import Feeds, Optimisation, Session
from qcompile.sessions import graph_session

__all__ = [
    "CORE",
    "core_context",
    "float_outputs",
    "floats",
    "images",
    "model",
    "node",
    "only",
    "outputs",
    "run_core",
    "run_registry",
    "sqnr",
]

CORE: tuple[Pass, ...] = (
    Calibrate(),
    Quantise(),
    SearchRanges(),
    DyadicScales(),
    RoundWeights(),
    IntegerBias(),
    RefineLayers(),
)


def model(text: str, **constants: Any) -> ModelProto:
    """A checked model whose nodes all have names."""
    made = parse(text, **constants)
    for index, node in enumerate(made.graph.node):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    onnx.checker.check_model(made, full_check=True)
    return made


def images(count: int = 4, channels: int = 3, size: int = 8, name: str = "x", seed: int = 0) -> list[dict[str, Array]]:
    """`count` feeds of one picture each, standard normal."""
    return [{name: floats(1, channels, size, size, seed=seed + i)} for i in range(count)]


def core_context(feeds: Sequence[Mapping[str, Array]], **settings: Any) -> Context:
    """A context that calibrates on `feeds`; ranges are the exact extremes unless told otherwise."""
    kept = [dict(f) for f in feeds]
    return Context(Settings(**{"ranges": "minmax", **settings}), calibration=lambda: iter(kept))


def run_core(
    source: ModelProto, feeds: Sequence[Mapping[str, Array]], until: str = "refine_layers", **settings: Any
) -> tuple[Graph, Context, dict[str, Report]]:
    """Run calibrate .. `until` on `source`; asserts a valid model with the same ends after every pass."""
    graph = Graph.from_proto(source)
    context = core_context(feeds, **settings)
    reports: dict[str, Report] = {}
    for step in CORE:
        reports[step.name] = step.run(graph, context)
        result = graph.to_proto()
        onnx.checker.check_model(result, full_check=True)
        assert [o.name for o in result.graph.output] == [o.name for o in source.graph.output]
        for before, after in zip(source.graph.output, result.graph.output, strict=True):
            assert after.type.tensor_type.elem_type == before.type.tensor_type.elem_type
        if step.name == until:
            break
    return graph, context, reports


def run_registry(source: ModelProto, feeds: Sequence[Mapping[str, Array]], **settings: Any) -> tuple[Graph, Context]:
    """Run the whole registry."""
    graph = Graph.from_proto(source)
    context = core_context(feeds, **settings)
    for step in PASSES:
        step.run(graph, context)
    return graph, context


def outputs(graph: Graph, feeds: Sequence[Feeds], level: Optimisation = Optimisation.ALL, fuse: bool = False) -> list[Array]:
    """The first output of `graph` for each feed; `fuse` lets onnxruntime make integer kernels of finished Q/DQ."""
    session = graph_session(graph, optimisation=level, fuse_qdq=fuse)
    return [next(iter(session.run(feed).values())) for feed in feeds]


def float_outputs(source: ModelProto, feeds: Sequence[Feeds]) -> list[Array]:
    """The first output of the float model for each feed."""
    session = Session(source)
    return [next(iter(session.run(feed).values())) for feed in feeds]


def sqnr(before: Sequence[Array], after: Sequence[Array]) -> float:
    """10 log10(signal / noise) in float64."""
    f, q = (np.concatenate([np.asarray(a, np.float64).ravel() for a in side]) for side in (before, after))
    return float(10 * np.log10(np.square(f).sum() / max(float(np.square(f - q).sum()), 1e-300)))


def node(graph: Graph, name: str) -> Node:
    """The node called `name`."""
    return next(n for n in graph.nodes if n.name == name)


def only(graph: Graph, op: str) -> Node:
    """The single node of operator `op`."""
    found = [n for n in graph.nodes if n.op == op]
    assert len(found) == 1, [n.op for n in graph.nodes]
    return found[0]
