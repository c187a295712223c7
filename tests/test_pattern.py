from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import ops, parse

from qcompile.graph import Graph, Value
from qcompile.passes._pattern import Match, Pattern, chains, const, either, match, number, op, put, rewrite_chains, var

X = var("x")
NEGATED = op("Neg", op("Abs", X))
SQUARE = op("Mul", X, X)


def graph_of(body: str, outputs: str = "", **constants: float | list[float]) -> Graph:
    made = parse(
        f"g (float[n, 2] x, float[n, 2] z) => (float[n, 2] y{outputs}) {{ {body} }}",
        **{k: np.asarray(v, np.float32) for k, v in constants.items()},
    )
    graph = Graph.from_proto(made)
    graph.infer_shapes()
    return graph


def last(graph: Graph) -> Value:
    output = graph.outputs[0]
    assert isinstance(output, Value)
    return output


@pytest.mark.parametrize(
    ("pattern", "body", "found"),
    [
        pytest.param(SQUARE, "y = Mul(x, x)", True, id="same-tensor"),
        pytest.param(SQUARE, "y = Mul(x, z)", False, id="other-tensor"),
        pytest.param(op("Add", number(2.0), X), "y = Add(x, two)", True, id="either-order"),
        pytest.param(op("Sub", number(2.0), X), "y = Sub(x, two)", False, id="order-of-sub"),
        pytest.param(op("Add", X, number(3.0)), "y = Add(x, two)", False, id="other-number"),
        pytest.param(op("Add", X, number("n")), "y = Add(x, two)", True, id="any-number"),
        pytest.param(op("Add", X, number("n")), "y = Add(x, pair)", False, id="not-a-number"),
        pytest.param(op("Add", X, const("c")), "y = Add(x, pair)", True, id="constant"),
        pytest.param(op("Add", X, const("c")), "y = Add(x, z)", False, id="not-a-constant"),
        pytest.param(op("Neg|Abs", X), "y = Abs(x)", True, id="one-of-two-operators"),
        pytest.param(either(op("Neg", X), op("Abs", X)), "y = Exp(x)", False, id="neither"),
        pytest.param(NEGATED, "a = Abs(x)  b = Identity(a)  c = Cast <to = 1> (b)  y = Neg(c)", True, id="cast"),
        pytest.param(NEGATED, "a = Abs(x)  b = Cast <to = 10> (a)  c = Cast <to = 1> (b)  y = Neg(c)", False, id="half"),
    ],
)  # fmt: skip
def test_match(pattern: Pattern, body: str, found: bool) -> None:
    graph = graph_of(body, two=2.0, pair=[1.0, 2.0])
    assert (match(pattern, last(graph)) is not None) == found


def test_what_is_bound() -> None:
    graph = graph_of("a = Mul(pair, x)  y = Add(two, a)", two=2.0, pair=[1.0, 2.0])
    found = match(op("Add", op("Mul", X, const("c")), number("n")), last(graph))
    assert found is not None
    assert (found.tensors["x"].name, found.tensors["c"].name, found.numbers["n"]) == ("x", "pair", 2.0)
    assert [s.op for s in found.steps] == ["Add", "Mul"]


def to_abs(graph: Graph, found: Match, output: Value) -> str | None:
    put(graph, found, output, "Abs", [found.tensors["x"]])
    return None


TWO = (op("Neg", op("Exp", op("Abs", X))), op("Exp", op("Abs", X)))


def test_longest_first() -> None:
    graph = graph_of("a = Abs(x)  e = Exp(a)  y = Neg(e)")
    assert rewrite_chains(graph, TWO, to_abs).rewrites == 1
    assert ops(graph) == {"Abs": 1}


def test_part_of_a_shared_chain() -> None:
    graph = graph_of("a = Abs(x)  e = Exp(a)  y = Neg(e)  w = Sin(e)", ", float[n, 2] w")
    report = rewrite_chains(graph, TWO, to_abs)
    assert (report.rewrites, dict(report.skipped)) == (1, {})
    assert ops(graph) == {"Abs": 1, "Neg": 1, "Sin": 1}


def test_refused_once() -> None:
    graph = graph_of("a = Abs(x)  e = Exp(a)  y = Neg(e)")
    report = rewrite_chains(graph, TWO, lambda graph, found, output: "no")
    assert dict(report.skipped) == {"no": 1}
    assert len(list(chains(graph, TWO))) == 1
