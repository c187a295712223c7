"""Small graphs for the tests of the graph layer."""

from __future__ import annotations

import numpy as np
from onnx.parser import parse_model

from qcompile.graph import Graph, Node
from qcompile.runtime import Optimisation, Session

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
  a = Relu(x)
  b = Identity(a)
  y = Add(b, w)
}
"""
LOOKING_OUT = """
<ir_version: 8, opset_import: ["" : 17]>
g (bool flag, float[2] x) => (float[2] y) <float[2] w = {3, 4}> {
  a = Relu(x)
  b = Identity(a)
  y = If (flag) <
    then_branch = t () => (float[2] p) { p = Add(b, w) },
    else_branch = e () => (float[2] q) { q = Neg(b) }
  >
}
"""


def graph_of(text: str) -> Graph:
    return Graph.from_proto(parse_model(text))


def run(graph: Graph, **feeds: object) -> list[np.ndarray]:
    session = Session(graph.to_proto(), optimisation=Optimisation.OFF, threads=1)
    return list(session.run({k: np.asarray(v) for k, v in feeds.items()}).values())


def by_op(graph: Graph, op: str) -> Node:
    return next(n for n in graph.nodes if n.op == op)


X = np.array([-1.0, 2.0], np.float32)
