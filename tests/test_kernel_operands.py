"""What integer kernels read in 8 bits besides the inputs of linear nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from passes_helpers import parse

from qcompile.context import Settings
from qcompile.graph import Graph
from qcompile.kernel_operands import kernel_operands

ATTENTION = "z = MatMul(a, b) e = Softmax(z) y = MatMul(e, b)"


def operands(text: str, **settings: Any) -> list[tuple[str, int]]:
    model = parse(
        f"g (float[4, 4] a, float[4, 4] b) => (float[4, 4] y) {{ {text} }}",
        21,
        w=np.eye(4, dtype=np.float32),
        eps=np.float32(1e-5),
        last=np.array([-1]),
    )
    graph = Graph.from_proto(model)
    for node in graph.nodes:
        node.name = node.outputs[0].name
    return [(n.name, i) for n, i in kernel_operands(graph, Settings(**{"format": "integer", **settings}))]


def test_products_read_both_but_never_probabilities() -> None:
    assert operands(ATTENTION) == [("z", 0), ("z", 1), ("y", 1)]


def test_products_with_weights_are_linear_nodes() -> None:
    assert operands("y = MatMul(a, w)") == []


def test_tables_read_their_input() -> None:
    assert operands("h = Gelu(a) y = Add(h, b)") == [("h", 0)]


@pytest.mark.parametrize(
    "text",
    [
        "s = Mul(a, a) m = ReduceMean(s, last) n = Add(m, eps) r = Sqrt(n) y = Div(a, r)",
        "s = Mul(a, a) m = ReduceMean(s, last) n = Add(m, eps) r = Sqrt(n) i = Reciprocal(r) y = Mul(a, i)",
    ],
    ids=["div", "reciprocal"],
)
def test_the_root_of_a_norm_is_its_kernels(text: str) -> None:
    assert operands(text) == []
    assert operands("n = Add(a, eps) y = Sqrt(n)") == [("y", 0)]


def test_qoperator_leaves_a_final_sigmoid_in_float() -> None:
    assert operands("y = Sigmoid(a)", format="qoperator") == []
    assert operands("y = Sigmoid(a)") == [("y", 0)]
    assert operands("s = Sigmoid(a) y = Add(s, b)", format="qoperator") == [("s", 0)]


def test_nothing_in_qdq_and_nothing_that_is_excluded() -> None:
    assert operands(ATTENTION, format="qdq") == []
    assert operands(ATTENTION, format="qoperator", exclude=("z",)) == [("y", 1)]
