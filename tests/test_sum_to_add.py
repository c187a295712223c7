from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, ops, parse

from qcompile.passes.sum_to_add import SumToAdd

RANDOM = np.random.default_rng(0)
FEED = {n: RANDOM.normal(size=(2, 3)).astype(np.float32) for n in "abc"}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        pytest.param("a", {"Identity": 1, "Relu": 1}, id="one"),
        pytest.param("a, b", {"Add": 1, "Relu": 1}, id="two"),
        pytest.param("a, b, c", {"Add": 2, "Relu": 1}, id="three"),
        pytest.param("a, a", {"Add": 1, "Relu": 1}, id="twice the same"),
    ],
)
def test_sums_become_adds(terms: str, expected: dict[str, int]) -> None:
    text = f"g (float[2,3] a, float[2,3] b, float[2,3] c) => (float[2,3] y) {{ s = Sum ({terms}) y = Relu (s) }}"
    report, graph = check_pass(SumToAdd(), parse(text), FEED)
    assert report.rewrites == 1
    assert ops(graph) == expected


def test_nothing_to_do() -> None:
    text = "g (float[2,3] a, float[2,3] b, float[2,3] c) => (float[2,3] y) { y = Add (a, b) }"
    assert check_pass(SumToAdd(), parse(text), FEED)[0].rewrites == 0
