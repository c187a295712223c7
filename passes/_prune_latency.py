"""A latency budget: how many steps of pruning it takes, measured on the pruned graphs themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np

from qcompile.graph import Array, Graph
from qcompile.runtime import Session
from qcompile.sessions import graph_session

_ROUNDS = 15
_SECONDS = 0.02  # a turn


def fewest_for_latency(
    graph: Graph, cut: Callable[[Graph, int], None], most: int, target: float, feeds: Mapping[str, Array]
) -> tuple[int | None, float]:
    """(the fewest steps behind which the model takes at most `target` of its time, None where none do; the least share seen).

    cut: does that many of `most` steps to a sorted graph with shapes. One thread; both models in turn, medians. Found by halving:
    latency falls with the steps but for noise.
    """
    dense = graph_session(graph, threads=1)

    def share(count: int) -> float:
        copy = graph.copy()
        copy.sort()
        copy.infer_shapes()
        cut(copy, count)
        return _ratio(dense, graph_session(copy, threads=1), feeds)

    if not most:
        return None, 1.0
    least = share(most)
    if least > target:
        return None, least
    failed, enough = 0, most
    while enough - failed > 1:
        middle = (failed + enough) // 2
        if share(middle) <= target:
            enough = middle
        else:
            failed = middle
    return enough, least


def _ratio(dense: Session, pruned: Session, feeds: Mapping[str, Array]) -> float:
    """Median time of `pruned` over that of `dense`."""
    times: list[list[float]] = [[], []]
    for session in (dense, pruned):
        session.run(feeds)
    start = perf_counter()
    dense.run(feeds)
    runs = max(1, round(_SECONDS / max(perf_counter() - start, 1e-6)))
    for _ in range(_ROUNDS):
        for session, seen in zip((dense, pruned), times, strict=True):
            start = perf_counter()
            for _ in range(runs):
                session.run(feeds)
            seen.append(perf_counter() - start)
    return float(np.median(times[1]) / np.median(times[0]))
