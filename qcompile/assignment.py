"""Which width for which layer: an integer linear program, solved exactly.

    min  sum_lo cost_lo x_lo      s.t.  sum_o x_lo = 1 for every layer l,   sum_lo use_rlo x_lo <= limit_r for every resource r,
                                        sum_(o: weights b) x_lo = sum_(o: weights b) x_mo where l and m are tied,
                                        sum_(o: activations a) x_lo <= z_ga where l reads group g

A choice o is a pair (weight bits, activation bits); resources are bytes, bit operations, seconds, bits (HAWQ-V3, Yao et al.
2021). A group g of activations that have one width (32: float, which integer weights may multiply too) is one more row of
choices, linked with the layers that read it; a layer whose weights stay float leaves it open. Solved by HiGHS (scipy's `milp`)
with no gap. Ties between optimal assignments go to the one with the least use of all resources, each as a share of what all
layers use at their widest, then to the earlier choices, so that the answer is the same every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from qcompile.context import FLOAT_BITS
from qcompile.errors import InputError
from qcompile.runtime import Array
from qcompile.stray_output import no_stray_output

_TIE = 1e-7  # of the cost: what counts as a tie, and how much a tie-break may weigh


@dataclass(frozen=True, order=True)
class Choice:
    """Widths of one layer: of its weights, and of the activations it reads. 32 is float."""

    weights: int
    activations: int = 8


@dataclass(frozen=True)
class Options:
    """What one layer can be: `choices`, the cost of each, and what each uses of every resource (same order)."""

    layer: str
    choices: tuple[Choice, ...]
    costs: tuple[float, ...]
    uses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """choices: one a layer, in the order given. cost: their sum. uses: of every resource."""

    choices: tuple[Choice, ...]
    cost: float
    uses: dict[str, float]


def require_scipy() -> None:
    """Raise InputError where scipy is missing."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise InputError('--bits mixed needs scipy (its solver HiGHS); pip install "qcompile[mixed]"') from error


def solve(
    layers: Sequence[Options],
    limits: Mapping[str, float],
    ties: Sequence[Sequence[str]] = (),
    names: Mapping[str, str] = MappingProxyType({}),
    links: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Assignment:
    """The assignment of least cost within `limits` (resource: most of it).

    ties: groups of layers whose weights have the same width; a width must be open to all of a group, or it is none of theirs.
    names: what messages call a resource. links: of a group of activations (in `layers` too), the layers that read it. Raises
    InputError where no assignment keeps the limits, with the nearest value of one that can be kept, or where scipy is missing.
    """
    require_scipy()
    if not layers:
        raise InputError("there is no layer whose width could be chosen")
    program = _Program(layers, ties, links)
    if not np.isfinite(program.cost).all():
        raise InputError("the cost of a choice is not finite; leave its layer out with --exclude")
    found = program.minimise(program.cost, limits)
    if found is None:
        raise InputError(_infeasible(program, limits, names))
    best = float(program.cost @ found)
    # Among equals: the least use of all resources, then the earlier choices. Costs may not rise beyond rounding.
    order = program.tie_break()
    second = program.minimise(order, limits, most=best + _TIE * max(abs(best), 1e-300))
    return program.assignment(found if second is None else second)


class _Program:
    """The arrays of one program: a column a (layer, choice)."""

    def __init__(self, layers: Sequence[Options], ties: Sequence[Sequence[str]], links: Mapping[str, Sequence[str]]) -> None:
        self.layers = list(layers)
        offered = _shared(self.layers, ties)
        self.columns = [(i, k) for i, x in enumerate(self.layers) for k, c in enumerate(x.choices) if c in offered[i]]
        self.cost = np.array([self.layers[i].costs[k] for i, k in self.columns])
        names = sorted({name for x in self.layers for name in x.uses})
        self.uses = {n: np.array([self.layers[i].uses[n][k] for i, k in self.columns]) for n in names}
        self.rows = _equalities(self.layers, self.columns, ties)
        self.links = _links(self.layers, self.columns, links)

    def minimise(self, cost: Array, limits: Mapping[str, float], most: float | None = None) -> Array | None:
        """The 0/1 columns of least `cost`, `self.cost` being at most `most`; None where there are none."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints = [LinearConstraint(self.rows[0], self.rows[1], self.rows[1])]
        if len(self.links):
            constraints.append(LinearConstraint(self.links, -np.inf, 0.0))
        for name, limit in limits.items():
            scale = max(float(np.abs(self.uses[name]).max(initial=0)), 1e-300)
            constraints.append(LinearConstraint(self.uses[name][None] / scale, -np.inf, limit / scale * (1 + 1e-12)))
        size = max(float(np.abs(self.cost).max(initial=0)), 1e-300)
        if most is not None:
            constraints.append(LinearConstraint(self.cost[None] / size, -np.inf, most / size))
        weights = cost / max(float(np.abs(cost).max(initial=0)), 1e-300)
        with no_stray_output():
            found = milp(
                weights,
                constraints=constraints,
                integrality=np.ones(len(weights)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0},
            )
        return None if found.x is None else np.rint(found.x)

    def tie_break(self) -> Array:
        """Use of all resources, as shares of the most there can be, and a little for later choices."""
        total = np.zeros(len(self.columns))
        for uses in self.uses.values():
            widest = sum(max(uses[j] for j, (i, _) in enumerate(self.columns) if i == at) for at in range(len(self.layers)))
            total += uses / max(float(widest), 1e-300)
        places = np.array([k for _, k in self.columns], np.float64)
        return np.asarray(total + _TIE * places)

    def assignment(self, chosen: Array) -> Assignment:
        """What the 0/1 columns say."""
        picked = [self.columns[j] for j in np.flatnonzero(chosen)]
        choices = tuple(self.layers[i].choices[k] for i, k in picked)
        uses = {name: float(values @ chosen) for name, values in self.uses.items()}
        return Assignment(choices, float(self.cost @ chosen), uses)


def _shared(layers: Sequence[Options], ties: Sequence[Sequence[str]]) -> list[set[Choice]]:
    """The choices that each layer may take: in a tied group those that all of it have."""
    offered = [set(x.choices) for x in layers]
    index = {x.layer: i for i, x in enumerate(layers)}
    for group in ties:
        members = [index[name] for name in group if name in index]
        common = set.intersection(*({c.weights for c in offered[i]} for i in members)) if members else set()
        if members and not common:
            raise InputError(f"layers {', '.join(group)} must share their width, and no width is open to all of them")
        for i in members:
            offered[i] = {c for c in offered[i] if c.weights in common}
    return offered


def _equalities(
    layers: Sequence[Options], columns: Sequence[tuple[int, int]], ties: Sequence[Sequence[str]]
) -> tuple[Array, Array]:
    """(matrix, right-hand side): one choice a layer, the weights of tied layers alike."""
    rows, right = [], []
    for at in range(len(layers)):
        rows.append([1.0 if i == at else 0.0 for i, _ in columns])
        right.append(1.0)
    index = {x.layer: i for i, x in enumerate(layers)}
    for group in ties:
        members = [index[name] for name in group if name in index]
        for other in members[1:]:
            for bits in sorted({layers[i].choices[k].weights for i, k in columns if i == members[0]}):
                sides = {members[0]: 1.0, other: -1.0}
                same = [layers[i].choices[k].weights == bits for i, k in columns]
                rows.append([sides.get(i, 0.0) if alike else 0.0 for (i, _), alike in zip(columns, same, strict=True)])
                right.append(0.0)
    return np.array(rows), np.array(right)


def _links(layers: Sequence[Options], columns: Sequence[tuple[int, int]], links: Mapping[str, Sequence[str]]) -> Array:
    """Rows of which each product is at most 0: a layer reads `a` bits only where its group has them."""
    rows = []
    index = {x.layer: i for i, x in enumerate(layers)}
    for group, members in links.items():
        widths = {c.activations for name in members for c in layers[index[name]].choices if c.weights != FLOAT_BITS}
        for name in members:
            for bits in sorted(widths):
                row = [0.0] * len(columns)
                for j, (i, k) in enumerate(columns):
                    choice = layers[i].choices[k]
                    if choice.activations == bits and i == index[group]:
                        row[j] = -1.0
                    elif choice.activations == bits and i == index[name] and choice.weights != FLOAT_BITS:
                        row[j] = 1.0
                rows.append(row)
    return np.array(rows)


def _infeasible(program: _Program, limits: Mapping[str, float], names: Mapping[str, str]) -> str:
    """The message: for each limit the least that can be had with the others kept, or alone."""
    parts = []
    for name, limit in limits.items():
        others = {n: v for n, v in limits.items() if n != name}
        least, note = program.minimise(program.uses[name], others), ""
        if least is None:
            least, note = program.minimise(program.uses[name], {}), " without the other limits"
        if least is None:
            continue
        nearest = float(program.uses[name] @ least)
        if nearest > limit or len(limits) == 1:
            parts.append(f"{names.get(name, name)}: {limit:g} asked for, {nearest:.6g} is the nearest that can be had{note}")
    return f"no assignment of widths keeps the limits: {'; '.join(parts)}"
