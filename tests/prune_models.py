"""A residual network that channel pruning has something to choose in, and one run of the pass over it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from core_models import core_context, floats, images, model
from onnx import ModelProto

from qcompile.context import ChannelPruning
from qcompile.graph import Graph
from qcompile.passes.prune_channels import PruneChannels

CONV = "Conv <pads = [1, 1, 1, 1]>"
FEEDS = images(24)


def net() -> ModelProto:
    """16 channels in a stream, 32 in a branch of it."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 5] y) {{
        a = {CONV} (x, w0, b0)  r = Relu(a)  b = {CONV} (r, w1, b1)  s = Relu(b)  c = {CONV} (s, w2, b2)  t = Add(c, r)
        u = Relu(t)        p = GlobalAveragePool(u)  f = Flatten(p)  y = Gemm(f, w3, b3) }}"""
    weights = {f"b{i}": floats(n, seed=i + 9) / 3 for i, n in enumerate([16, 32, 16, 5])}
    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (16, 32, 3, 3), (16, 5)]
    return model(
        text, **weights, **{f"w{i}": floats(*s, seed=i) * np.float32(np.prod(s[1:]) ** -0.5) for i, s in enumerate(shapes)}
    )


def pruned(**options: Any) -> tuple[Graph, Any]:
    """(the graph without 30 % of the MACs, what went); `options` of ChannelPruning. A second run finds nothing to do."""
    graph = Graph.from_proto(net())
    context = core_context(FEEDS, pruning=ChannelPruning(**{"ratio": 0.3, "multiple": 4, **options}))
    assert PruneChannels().run(graph, context).rewrites == len(context.pruned or []) > 0
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    assert PruneChannels().run(graph, context).rewrites == 0
    return graph, context.pruned
