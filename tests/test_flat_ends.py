"""Ranges of what functions read, without the ends where the functions are flat."""

from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import parse
from scipy.special import erf, expit

from qcompile.graph import Graph, Node
from qcompile.passes._flat_ends import bent_range


def readers(*texts: str) -> list[Node]:
    lines = " ".join(f"y{i} = {text}" for i, text in enumerate(texts))
    outputs = ", ".join(f"float[4] y{i}" for i in range(len(texts)))
    return list(Graph.from_proto(parse(f"g (float[4] x) => ({outputs}) {{ {lines} }}", 21)).nodes)


FUNCTIONS = {
    "Gelu(x)": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "Sigmoid(x)": expit,
    "Tanh(x)": np.tanh,
    "HardSigmoid(x)": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
}


@pytest.mark.parametrize("text", list(FUNCTIONS))
@pytest.mark.parametrize(("low", "high"), [(-16.0, 8.0), (-3.0, 20.0), (-30.0, 30.0)])
def test_clipping_to_the_range_costs_at_most_1_2048_of_the_span(text: str, low: float, high: float) -> None:
    f = FUNCTIONS[text]
    first, last = bent_range(readers(text), low, high)
    assert low <= first < last <= high
    x = np.linspace(low, high, 20_001)
    span = f(x).max() - f(x).min()
    assert np.abs(f(np.clip(x, first, last)) - f(x)).max() <= span / 2048 * 1.01
    wider = (high - low) * 0.02  # and what is left of it is not flat: giving up more would cost more
    for a, b in ((first + wider, last), (first, last - wider)):
        assert np.abs(f(np.clip(x, a, b)) - f(x)).max() > span / 2048


def test_gelu_needs_half_of_16_to_the_left() -> None:
    first, last = bent_range(readers("Gelu(x)"), -16.0, 8.0)
    assert -3.2 < first < -2.5 and last > 7.99


def test_all_readers_count() -> None:
    """Gelu is flat on the left, -x of it is not: Tanh needs less than Gelu on the right."""
    alone, both = (bent_range(readers(*t), -16.0, 8.0) for t in (("Tanh(x)",), ("Tanh(x)", "Gelu(x)")))
    assert alone[1] < 5 and both[1] > 7.99 and both[0] <= alone[0]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("Relu(x)", -1.0, 1.0), ("Log(x)", -1.0, 1.0), ("Gelu(x)", 2.0, 2.0)],
    ids=["no function", "not finite", "one point"],
)
def test_ranges_that_stay(text: str, low: float, high: float) -> None:
    assert bent_range(readers(text), low, high) == (low, high)
