"""The integer program: its optimum against brute force, ties, tied layers, infeasible limits, size."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.assignment import Assignment, Choice, Options, solve
from qcompile.errors import InputError
from qcompile.stray_output import no_stray_output

pytest.importorskip("scipy")
WIDTHS = (2, 3, 4, 5, 6, 8)


def options(name: str, costs: Sequence[float], size: float = 1.0, widths: Sequence[int] = WIDTHS) -> Options:
    uses = {"bits": tuple(b * size for b in widths)}
    return Options(name, tuple(Choice(b) for b in widths), tuple(costs), uses)


def brute_force(layers: Sequence[Options], limits: dict[str, float], ties: Sequence[Sequence[str]] = ()) -> float | None:
    """The least cost, by trying everything."""
    best = None
    index = {x.layer: i for i, x in enumerate(layers)}
    for picked in itertools.product(*(range(len(x.choices)) for x in layers)):
        if any(len({layers[index[n]].choices[picked[index[n]]] for n in group}) > 1 for group in ties):
            continue
        if any(sum(x.uses[r][k] for x, k in zip(layers, picked, strict=True)) > limit for r, limit in limits.items()):
            continue
        cost = sum(x.costs[k] for x, k in zip(layers, picked, strict=True))
        best = cost if best is None else min(best, cost)
    return best


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Options], dict[str, float], list[list[str]]]:
    # 3 widths a layer keep brute force at 3^8; whole numbers keep sums at the limit exact.
    count = draw(st.integers(1, 8))
    whole = st.integers(0, 50)
    layers = []
    for i in range(count):
        costs = tuple(float(draw(whole)) for _ in range(3))
        uses = {r: tuple(float(draw(whole)) for _ in range(3)) for r in ("bytes", "bops")}
        layers.append(Options(f"l{i}", (Choice(2), Choice(4), Choice(8)), costs, uses))
    limits = {r: float(draw(st.integers(0, 50 * count))) for r in draw(st.sets(st.sampled_from(["bytes", "bops"])))}
    ties = [["l0", f"l{count - 1}"]] if count > 1 and draw(st.booleans()) else []
    return layers, limits, ties


@settings(max_examples=150, deadline=None)
@given(programs())
def test_the_optimum_is_that_of_brute_force(program: tuple[list[Options], dict[str, float], list[list[str]]]) -> None:
    layers, limits, ties = program
    expected = brute_force(layers, limits, ties)
    if expected is None:
        with pytest.raises(InputError, match="no assignment of widths keeps the limits"):
            solve(layers, limits, ties)
        return
    found = solve(layers, limits, ties)
    assert found.cost == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert len(found.choices) == len(layers)
    assert all(found.uses[r] <= limit * (1 + 1e-9) for r, limit in limits.items())
    for group in ties:
        assert len({found.choices[int(name[1:])] for name in group}) == 1


def test_among_equals_the_least_use_then_the_earlier_choice() -> None:
    layers = [options("a", [1.0] * 6), options("b", [3, 2, 2, 2, 2, 2])]
    found = solve(layers, {"bits": 16})
    assert found.choices == (Choice(2), Choice(3))
    free = Options("c", (Choice(4), Choice(3)), (1.0, 1.0), {"bits": (1.0, 1.0)})
    assert solve([free], {"bits": 9}).choices == (Choice(4),)


def test_an_infeasible_limit_says_the_nearest_feasible_value() -> None:
    layers = [options(n, [6, 5, 4, 3, 2, 1]) for n in "ab"]
    with pytest.raises(InputError, match=r"avg-bits: 3 asked for, 4 is the nearest that can be had"):
        solve(layers, {"bits": 3}, names={"bits": "avg-bits"})
    assert solve(layers, {"bits": 4}).uses == {"bits": 4.0}


def test_tied_layers_without_a_common_width_are_refused() -> None:
    layers = [options("a", [1], widths=[4]), options("b", [1], widths=[8])]
    with pytest.raises(InputError, match="layers a, b must share their width"):
        solve(layers, {}, [["a", "b"]])


def test_nothing_to_choose_and_costs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="no layer"):
        solve([], {})
    with pytest.raises(InputError, match="not finite"):
        solve([options("a", [float("nan")] * 6)], {})


def test_two_hundred_layers_are_solved_to_the_optimum_of_the_relaxation() -> None:
    random = np.random.default_rng(0)
    layers = []
    for i in range(200):
        size, scale = float(random.integers(100, 100_000)), float(random.lognormal(0, 2))
        layers.append(options(f"l{i}", [scale * 4.0**-b for b in WIDTHS], size))
    limit = 5 * sum(x.uses["bits"][0] / 2 for x in layers)
    found: Assignment = solve(layers, {"bits": limit})
    assert found.uses["bits"] <= limit
    # Lagrange's bound: no assignment within the limit costs less, whatever the multiplier.
    bounds = []
    for price in np.geomspace(1e-12, 1e-3, 400):
        inner = sum(min(c + price * u for c, u in zip(x.costs, x.uses["bits"], strict=True)) for x in layers)
        bounds.append(inner - price * limit)
    assert found.cost >= max(bounds) * (1 - 1e-9)
    assert found.cost <= max(bounds) * 1.01


@pytest.mark.skipif(os.name != "posix", reason="asks the C library")
def test_what_native_code_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with no_stray_output():
        ctypes.CDLL(None).puts(b"stray")
    print("wanted")
    assert capfd.readouterr().out == "wanted\n"


@st.composite
def linked_programs(draw: st.DrawFn) -> tuple[list[Options], dict[str, float], dict[str, list[str]], list[list[str]]]:
    """Layers with (weights, activations), float among them, and one or two groups of activations."""
    count = draw(st.integers(2, 4))
    whole = st.integers(0, 50)
    pairs = [Choice(w, a) for w in (2, 8) for a in (4, 8)]
    layers = []
    for i in range(count):
        choices = [*pairs, Choice(32, 32)] if draw(st.booleans()) else list(pairs)
        choices += [Choice(2, 32), Choice(8, 32)] if draw(st.booleans()) else []
        costs = tuple(float(draw(whole)) for _ in choices)
        layers.append(Options(f"l{i}", tuple(choices), costs, {"bops": tuple(float(c.weights * c.activations) for c in choices)}))
    split = draw(st.integers(1, count))
    links = {
        name: members
        for name, members in (("g", [f"l{i}" for i in range(split)]), ("h", [f"l{i}" for i in range(split, count)]))
        if members
    }
    for name in links:
        open_to = tuple(Choice(32, a) for a in (4, 8, 32))
        layers.append(Options(name, open_to, tuple(float(draw(whole)) for _ in open_to), {"bops": (0.0,) * 3}))
    ties = [["l0", f"l{count - 1}"]] if draw(st.booleans()) else []
    return layers, {"bops": float(draw(st.integers(0, 70 * count)))}, links, ties


@settings(max_examples=150, deadline=None)
@given(linked_programs())
def test_groups_of_activations_against_brute_force(
    program: tuple[list[Options], dict[str, float], dict[str, list[str]], list[list[str]]],
) -> None:
    layers, limits, links, ties = program
    group_of = {name: group for group, members in links.items() for name in members}
    best = None
    for picked in itertools.product(*(x.choices for x in layers)):
        chosen = dict(zip((x.layer for x in layers), picked, strict=True))
        if any(chosen[n].weights != 32 and chosen[n].activations != chosen[g].activations for n, g in group_of.items()):
            continue
        if any(len({chosen[n].weights for n in group}) > 1 for group in ties):
            continue
        if sum(x.uses["bops"][x.choices.index(c)] for x, c in zip(layers, picked, strict=True)) > limits["bops"]:
            continue
        cost = sum(x.costs[x.choices.index(c)] for x, c in zip(layers, picked, strict=True))
        best = cost if best is None else min(best, cost)
    if best is None:
        with pytest.raises(InputError, match="no assignment of widths keeps the limits"):
            solve(layers, limits, ties, links=links)
        return
    found = solve(layers, limits, ties, links=links)
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    chosen = dict(zip((x.layer for x in layers), found.choices, strict=True))
    assert all(chosen[n].weights == 32 or chosen[n].activations == chosen[g].activations for n, g in group_of.items())
