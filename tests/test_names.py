from __future__ import annotations

import numpy as np
import onnx
from passes_helpers import parse

from qcompile.graph import Graph
from qcompile.names import names_of, shorten_names
from qcompile.runtime import Session

TEXT = """g (float[2,3] x) => (float[2,3] y) <float[3] w = {1.0, 2.0, 3.0}> {
    [first] a = Mul (x, w)
    [second] y = Relu (a)
}"""


def test_new_tensors_get_short_names_and_old_ones_keep_theirs() -> None:
    model = parse(TEXT)
    graph = Graph.from_proto(model)
    known = names_of(graph)
    inner = graph.nodes[0].outputs[0]
    added = graph.node("Add", [inner, graph.constant("a_very_long_name", np.float32(2))], ["another_very_long_name"])
    clip = graph.node("Clip", [added.outputs[0]], ["q0"])
    graph.replace_uses(inner, clip.outputs[0], only=lambda n: n is not added)
    shorten_names(graph, known)
    result = graph.to_proto()
    onnx.checker.check_model(result)
    assert {"first", "second"} <= {n.name for n in result.graph.node}
    assert {i.name for i in result.graph.initializer} == {"w", "q0"}
    assert [n.output[0] for n in result.graph.node] == ["a", "q1", "q2", "y"]
    x = np.array([[-3, 1, 2], [0, -1, 5]], np.float32)
    np.testing.assert_array_equal(Session(result).run({"x": x})["y"], np.maximum(x * [1, 2, 3] + 2, 0))


def test_a_name_of_the_user_is_never_taken() -> None:
    graph = Graph.from_proto(parse(TEXT.replace("a = Mul", "q0 = Mul").replace("(a)", "(q0)")))
    known = names_of(graph)
    added = graph.node("Neg", [graph.nodes[0].outputs[0]], ["long"])
    graph.replace_uses(graph.nodes[0].outputs[0], added.outputs[0], only=lambda n: n is not added)
    shorten_names(graph, known)
    assert added.outputs[0].name == "q1"
