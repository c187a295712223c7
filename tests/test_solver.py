"""Activation scales: every Add tie-free in the strict sense, every pool exactly dyadic, whatever the shape of the graph."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from core_models import floats, model, run_core
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.dyadic import pool_multiplier, sum_ratio
from qcompile.graph import Node
from qcompile.plan import AddSite, Plan, PoolSite, ScaleClass
from qcompile.qparams import ACTIVATIONS, activation_params
from qcompile.solver import reaches_past, solve

U8 = ACTIVATIONS["any"]


def place(index: int, low: float, high: float, ceiling: float | None = None) -> ScaleClass:
    return ScaleClass(index, [f"t{index}"], low, high, None if ceiling is None else 0.0, ceiling)


def add(left: ScaleClass, right: ScaleClass, result: ScaleClass) -> AddSite:
    return AddSite(Node("Add", f"add_{result.index}", [], []), left, right, result)


def check(plan: Plan, kind: str = "any") -> None:
    """Every Add passes the strict test; zero points and Clip bounds are right."""
    solve(plan, ACTIVATIONS[kind])
    chosen = ACTIVATIONS[kind]
    for site in plan.adds:
        ratios = sum_ratio(site.left.scale, site.right.scale, site.result.scale)
        assert ratios is not None, [float(c.scale) for c in (site.left, site.right, site.result)]
        assert ratios[0] % 2 == 1
    for c in plan.classes:
        assert c.scale.dtype == np.float32
        assert c.scale > 0
        assert chosen.low <= c.zero_point <= chosen.high
        if c.ceiling is not None and np.isfinite(c.ceiling):
            # A folded Clip holds: the largest integer is less than half a step above the bound.
            holds = Fraction(chosen.high - c.zero_point) * Fraction(float(c.scale)) <= Fraction(c.ceiling) + half(c.scale)
            assert reaches_past(c, chosen) == (not holds)
    for pool in plan.pools:
        check_pool(pool)


def half(scale: np.float32) -> Fraction:
    """Half a step, and room for the rounding of the scale itself."""
    return Fraction(float(scale)) * Fraction(5001, 10000)


def check_pool(pool: PoolSite) -> None:
    multiplier = Fraction(float(pool_multiplier(pool.source.scale, pool.result.scale, pool.area)))
    assert multiplier > 0
    assert (multiplier * 2**16).denominator == 1
    assert multiplier * 2**16 < 2**24


def test_a_chain_of_adds() -> None:
    c = [place(i, -1.0 - i, 2.0 * (i + 1)) for i in range(9)]
    plan = Plan(classes=c, adds=[add(c[i], c[i + 1], c[i + 2]) for i in range(0, 7, 2)])
    wanted = [float(activation_params(x.low, x.high, U8)[0]) for x in c]
    check(plan)
    for got, want in zip(c, wanted, strict=True):
        assert abs(float(got.scale) / want - 1) < 0.02, "a chain leaves each scale near its calibrated one"


def test_a_residual_stream() -> None:
    """x1 = x0 + f0, x2 = x1 + f1 ...: one chain of results, free branches."""
    stream = [place(i, -(2.0**i), 2.0**i) for i in range(6)]
    branches = [place(10 + i, -1.5, 1.7) for i in range(5)]
    plan = Plan(classes=[*stream, *branches], adds=[add(stream[i], branches[i], stream[i + 1]) for i in range(5)])
    check(plan)


def test_a_diamond_shares_one_scale_where_no_odd_q_closes_it() -> None:
    a, b, left, right, top = (place(i, -1.0, 1.0 + 0.37 * i) for i in range(5))
    plan = Plan(classes=[a, b, left, right, top], adds=[add(a, b, left), add(a, b, right), add(left, right, top)])
    check(plan)


def test_a_cycle_through_the_same_operands() -> None:
    a, b, c, d = (place(i, -3.3 * (i + 1), 7.1) for i in range(4))
    plan = Plan(classes=[a, b, c, d], adds=[add(a, b, c), add(b, c, d), add(a, d, c)])
    check(plan)


@pytest.mark.parametrize("high", [0.1, 1.0, 1.9, 40.0])
def test_a_tensor_added_to_itself(high: float) -> None:
    x, y = place(0, -1.0, high), place(1, -2.0, 2 * high)
    check(Plan(classes=[x, y], adds=[add(x, x, y)]))


def test_operand_and_result_in_one_class() -> None:
    x, b = place(0, -1.0, 3.0), place(1, -0.2, 0.1)
    check(Plan(classes=[x, b], adds=[add(x, b, x)]))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param(1.0, 1.0, id="even"),
        pytest.param(0.001, 1.0, id="tiny-left"),
        pytest.param(14.0, 14.0, id="both-far-coarser-than-the-sum"),
        pytest.param(14.0, 0.1, id="coarse-and-fine"),
        pytest.param(7.0, 0.2, id="large-q-and-a-large-ratio"),
        pytest.param(1000.0, 1.0, id="hopelessly-coarse"),
        pytest.param(1e-6, 1e-6, id="both-tiny"),
    ],
)
def test_extreme_ratios_are_still_tie_free(left: float, right: float) -> None:
    a, b, c = place(0, -left, left), place(1, -right, right), place(2, -1.0, 1.0)
    check(Plan(classes=[a, b, c], adds=[add(a, b, c)]))


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_every_target(kind: str) -> None:
    c = [place(i, -0.5 * i, 1.0 + i) for i in range(5)]
    check(Plan(classes=c, adds=[add(c[0], c[1], c[2]), add(c[2], c[3], c[4])]), kind)


def test_ceilings_are_kept_along_a_chain() -> None:
    a, b, c = place(0, 0.0, 6.0, 6.0), place(1, 0.0, 5.2, 6.0), place(2, 0.0, 11.0)
    check(Plan(classes=[a, b, c], adds=[add(a, b, c)]))
    assert float(a.scale) <= 6.0 / 254.5 * (1 + 2.0**-22)
    assert not reaches_past(a, U8) and not reaches_past(b, U8)


def test_a_ceiling_in_a_component_that_shares_one_scale() -> None:
    """The shared scale is the widest; what reaches past a folded bound must be clamped on the integers."""
    a, b, left, right, top = (place(i, -1.0, 1.0 + 0.37 * i) for i in range(5))
    a.low, a.floor, a.high, a.ceiling = 0.0, 0.0, 0.5, 0.5
    plan = Plan(classes=[a, b, left, right, top], adds=[add(a, b, left), add(a, b, right), add(left, right, top)])
    check(plan)
    assert reaches_past(a, U8)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(3, 9), sites=st.integers(1, 8), spread=st.sampled_from([0.3, 1.0, 3.0]))
def test_random_graphs_of_adds(seed: int, count: int, sites: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    c = []
    for i in range(count):
        high = float(np.exp(rng.normal() * spread))
        c.append(place(i, -high * float(rng.random()), high, high if rng.random() < 0.3 else None))
        if c[-1].ceiling is not None:
            c[-1].low = 0.0
    chosen = rng.integers(0, count, (sites, 3))
    adds = [add(*(c[i] for i in row)) for row in chosen]
    check(Plan(classes=c, adds=adds))


# ---- pools ----
@settings(max_examples=100, deadline=None)
@given(
    high=st.floats(1e-3, 1e3),
    ratio=st.floats(0.01, 4.0),
    area=st.integers(1, 4096),
    kind=st.sampled_from(["any", "arm", "tensorrt"]),
)
def test_pools_are_dyadic_in_float32(high: float, ratio: float, area: int, kind: str) -> None:
    source, result = place(0, -0.1 * high, high), place(1, 0.0, high * ratio)
    plan = Plan(classes=[source, result], pools=[PoolSite(Node("GlobalAveragePool", "pool", [], []), source, result, area)])
    check(plan, kind)


def test_a_pool_behind_a_pool() -> None:
    a, b, c = place(0, 0.0, 6.0), place(1, 0.0, 3.0), place(2, 0.0, 3.0)
    node = Node("GlobalAveragePool", "pool", [], [])
    check(Plan(classes=[a, b, c], pools=[PoolSite(node, a, b, 49), PoolSite(node, b, c, 1)]))


def test_a_pool_of_a_sum() -> None:
    a, b, c, d = (place(i, -1.0, 3.0 - 0.4 * i) for i in range(4))
    check(Plan(classes=[a, b, c, d], adds=[add(a, b, c)], pools=[PoolSite(Node("GlobalAveragePool", "p", [], []), c, d, 64)]))


def test_a_pool_with_a_dead_result_is_solved_in_no_time() -> None:
    """A result whose range is a sliver of the source's asks for a large b; the search must not build a list of all of them."""
    source, result = place(0, 0.0, 1000.0), place(1, 0.0, 1e-3)
    check(Plan(classes=[source, result], pools=[PoolSite(Node("GlobalAveragePool", "p", [], []), source, result, 4)]))


# ---- through a real graph ----
def conv(x: str, y: str, w: str) -> str:
    return f"{y} = Conv <pads = [1, 1, 1, 1]> ({x}, {w})"


GRAPHS: dict[str, Callable[[], str]] = {
    "diamond": lambda: (
        f"{conv('x', 'a', 'w0')}  {conv('a', 'b', 'w1')}  s = Add(a, b)  t = Add(b, a)  u = Add(s, t)  {conv('u', 'y', 'w2')}"
    ),
    "itself": lambda: f"{conv('x', 'a', 'w0')}  s = Add(a, a)  {conv('s', 'y', 'w1')}",
    "concat-class": lambda: (
        f"{conv('x', 'a', 'w0')}  {conv('a', 'b', 'w1')}  k = Concat <axis = 0> (a, b)  m = MaxPool <kernel_shape = [1, 1]> (k)"
        f"  s = Add(a, b)  {conv('s', 'z', 'w2')}  {conv('m', 'v', 'w2')}  y = Concat <axis = 0> (z, v)"
    ),
    "chain": lambda: (
        f"{conv('x', 'a', 'w0')}  {conv('a', 'b', 'w1')}  s = Add(a, b)"
        f"  {conv('s', 'c', 'w2')}  t = Add(s, c)  {conv('t', 'y', 'w0')}"
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_adds_of_real_graphs(name: str) -> None:
    weights = {f"w{i}": floats(3, 3, 3, 3, seed=i) * (i + 1) / 4 for i in range(3)}
    source = model("g (float[1, 3, 6, 6] x) => (float[n, 3, 6, 6] y) { " + GRAPHS[name]() + " }", **weights)
    _, context, _ = run_core(source, [{"x": floats(1, 3, 6, 6, seed=i)} for i in range(3)], until="dyadic_scales")
    plan = context.plan
    assert plan is not None
    assert plan.adds
    for site in plan.adds:
        assert sum_ratio(site.left.scale, site.right.scale, site.result.scale) is not None
