"""`--target wasm`: which linear operators stay float because they, or the way into and out of integers, are slower as int8 there.

The times of operators come from `wasm_table.json`, measured by `benchmarks/edge/wasm_operators.py`. An operator that is not in
the table takes the time a multiply-accumulate of the row of its kind that is nearest in channels and size. Where an integer
operator meets a float one, every element is quantised or dequantised once. The assignment with the least sum is a minimum cut.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log, prod
from pathlib import Path
from typing import Any, TypeAlias

from qcompile.graph import Node, Tensor

#: (maker, reader, elements) of a tensor between two operators; no maker: an end of the graph, or another float operator.
Link: TypeAlias = "tuple[Node | None, Node, int]"

_TABLE = Path(__file__).parent / "wasm_table.json"
_UNKNOWN_ROWS = 32  # of a product, which are tokens more often than samples
_UNKNOWN_SIZE = 28  # of a picture whose size the file does not say
#: Operators that only pass values on, and have no cost of their own here.
_PASSING = frozenset(["Clip", "Relu", "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Pad"])
REASON = "slower as int8 in WebAssembly"
_INTEGER, _FLOAT = 0, 1  # source and sink


@dataclass(frozen=True)
class Cost:
    """Microseconds of an operator in float and in int8, and the elements that it takes and gives."""

    floating: float
    integer: float
    taken: int
    given: int


def slow_as_integers(nodes: Sequence[Node]) -> frozenset[Node]:
    """Those of the linear `nodes` that are better left in float, never all. Deterministic."""
    costs = {node: cost for node in nodes if (cost := _cost(node)) is not None}
    slow = _least_cut(costs, _links(costs))
    if len(slow) == len(nodes) and slow:  # a compiled model holds integers: the one that loses least
        slow -= {min(slow, key=lambda n: costs[n].integer - costs[n].floating)}
    return slow


def _least_cut(costs: Mapping[Node, Cost], links: Sequence[Link]) -> frozenset[Node]:
    """The float side of a minimum cut (Edmonds and Karp 1972): of all assignments the one with the least sum.

    An operator on the source's side is integer. Capacities are whole nanoseconds.
    """
    place = {node: index + 2 for index, node in enumerate(costs)}
    room: list[dict[int, int]] = [{} for _ in range(len(place) + 2)]

    def add(start: int, end: int, microseconds: float) -> None:
        room[start][end] = room[start].get(end, 0) + round(1e3 * microseconds)
        room[end].setdefault(start, 0)

    quantise, dequantise = _per_element()
    for node, cost in costs.items():
        add(_INTEGER, place[node], cost.floating)
        add(place[node], _FLOAT, cost.integer)
    for maker, reader, elements in links:
        start = _FLOAT if maker is None else place[maker]
        add(place[reader], start, quantise * elements)
        if maker is not None:
            add(start, place[reader], dequantise * elements)
    while (came := _reached(room)).get(_FLOAT) is not None:
        path, at = list[tuple[int, int]](), _FLOAT
        while at != _INTEGER:
            path.append((came[at], at))
            at = came[at]
        least = min(room[i][j] for i, j in path)
        for i, j in path:
            room[i][j] -= least
            room[j][i] += least
    return frozenset(node for node, index in place.items() if index not in came)


def _reached(room: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """{place: place before it} of all that the source reaches, nearest first, until the sink is."""
    came, waiting = {_INTEGER: _INTEGER}, deque([_INTEGER])
    while waiting and _FLOAT not in came:
        at = waiting.popleft()
        for end, left in room[at].items():
            if left > 0 and end not in came:
                came[end] = at
                waiting.append(end)
    return came


def _links(costs: Mapping[Node, Cost]) -> list[Link]:
    """(maker, reader, elements) between the operators of `costs`, through operators that pass values on and through Add."""
    found: list[Link] = []
    for node, cost in costs.items():
        makers = _makers(node.inputs[0], costs)
        found += [(maker, node, cost.taken) for maker in makers]
    return found


def _makers(tensor: Tensor, costs: Mapping[Node, Cost]) -> list[Node | None]:
    """The costed operators behind `tensor`; [None] where none is."""
    seen: set[Tensor] = set()
    stack, found = [tensor], dict[Node | None, None]()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        node = getattr(current, "producer", None)
        if node is None:
            found[None] = None
        elif node in costs:
            found[node] = None
        elif node.op in _PASSING:
            stack.append(node.inputs[0])
        elif node.op in ("Add", "Concat"):
            stack += list(node.inputs)
        else:
            found[None] = None
    return list(found) or [None]


def _cost(node: Node) -> Cost | None:
    """None where the weight is not constant or of no known kind."""
    weight = node.constant(1)
    if weight is None or node.op not in ("Conv", "Gemm", "MatMul"):
        return None
    dims = [d if isinstance(d, int) else None for d in node.inputs[0].dims or ()]
    if node.op != "Conv":
        outputs = weight.dims[0 if node.op == "Gemm" and node.attr("transB", 0) else 1]
        rows, inner = prod(d or _UNKNOWN_ROWS for d in dims[:-1]), prod(weight.dims) // max(outputs, 1)
        times = _times("product", rows * inner * outputs, {"rows": rows, "inputs": inner, "outputs": outputs})
        return None if times is None else Cost(*times, rows * inner, rows * outputs)
    outputs, depth, *kernel = weight.dims
    group, strides = int(node.attr("group", 1)), node.attr("strides", [1, 1])
    sizes = [d or _UNKNOWN_SIZE for d in dims[2:]] or [_UNKNOWN_SIZE, _UNKNOWN_SIZE]
    positions = prod(-(-size // stride) for size, stride in zip(sizes, strides, strict=False))
    kind = "depthwise" if depth == 1 and group > 1 else "pointwise" if prod(kernel) == 1 else "spatial"
    size = prod(sizes) ** (1 / len(sizes))
    near = {"inputs": depth * group, "outputs": outputs, "size": size, "stride": strides[0]}
    times = _times(kind, positions * outputs * depth * prod(kernel), near)
    return None if times is None else Cost(*times, depth * group * prod(sizes), outputs * positions)


def _times(kind: str, macs: int, near: Mapping[str, float]) -> tuple[float, float] | None:
    """(float, int8) microseconds of `macs` multiply-accumulates, by the nearest row of the kind."""
    rows = [row for row in _table()["operators"] if row["kind"] == kind]
    if not rows:
        return None
    row = min(rows, key=lambda r: sum(abs(log(max(near[k], 1) / r[k])) for k in near))
    share = macs / row_macs(row)
    return row["float_us"] * share, row["int8_us"] * share


def row_macs(row: Mapping[str, Any]) -> int:
    """Multiply-accumulates of a row of the table."""
    if row["kind"] == "product":
        return int(row["rows"] * row["inputs"] * row["outputs"])
    positions = (-(-row["size"] // row["stride"])) ** 2
    depth = 1 if row["kind"] == "depthwise" else row["inputs"]
    return int(positions * row["outputs"] * depth * row["kernel"] ** 2)


def _per_element() -> tuple[float, float]:
    """Microseconds to quantise and to dequantise one element, at 100,000 of them."""
    row = min(_table()["boundary"], key=lambda r: abs(r["elements"] - 100_000))
    return row["quantise_us"] / row["elements"], row["dequantise_us"] / row["elements"]


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return found
