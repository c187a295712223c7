"""HAP's criterion: a channel's share of the Hessian's trace, against its closed form."""

from __future__ import annotations

import numpy as np
from core_models import model

from qcompile.graph import Graph
from qcompile.passes._prune_hessian import hessian
from qcompile.passes._prune_rules import trace


def test_the_hessian_criterion_is_that_of_a_softmax_regression_behind_a_linear_layer() -> None:
    # f = V (U x): the block of KL's Hessian for row u of U is v' (diag p - p p') v * x x', v the column of V that reads it.
    random = np.random.default_rng(4)
    u, v = random.normal(size=(6, 9)).astype(np.float32), random.normal(size=(3, 6)).astype(np.float32)
    proto = model("g (float[1, 9] x) => (float[1, 3] y) { h = Gemm <transB = 1> (x, u)  y = Gemm <transB = 1> (h, v) }", u=u, v=v)
    feeds = [{"x": random.normal(size=(1, 9)).astype(np.float32)} for _ in range(16)]
    graph = Graph.from_proto(proto)
    graph.infer_shapes()
    found = trace(graph, lambda node: False)
    slot = next(s for s in found.of_role("out") if s.node.outputs[0].name == "h")
    rows = np.concatenate([f["x"] for f in feeds]).astype(np.float64)
    logits = rows @ u.T.astype(np.float64) @ v.T.astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    fisher = np.einsum("sc,cd->scd", p, np.eye(3)) - np.einsum("sc,sd->scd", p, p)
    curvature = np.einsum("cu,scd,du->su", v, fisher, v)  # [samples, units]
    traces = (curvature * np.square(rows).sum(axis=1)[:, None]).mean(axis=0)
    exact = traces / (2 * 9) * np.square(u.astype(np.float64)).sum(axis=1)
    many = np.mean([[hessian(found, graph, feeds, seed)[int(r)] for r in found.roots(slot.ids)] for seed in range(60)], axis=0)
    np.testing.assert_allclose(many, exact, rtol=0.15)
