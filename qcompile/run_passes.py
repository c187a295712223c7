"""Passes in order, each timed, verified against its promise, and run twice: the rows of the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.context import Context
from qcompile.errors import PassError, QcompileError
from qcompile.graph import Graph
from qcompile.promises import Verifier
from qcompile.rewrite import Pass, Report
from qcompile.runtime import Feeds


def run_passes(
    graph: Graph, context: Context, steps: Sequence[Pass], feeds: Sequence[Feeds], dump: Path | None = None
) -> list[dict[str, Any]]:
    """Run `steps` in order; every pass that rewrote something is verified on `feeds` before the next one starts.

    Returns the report's row of each. dump: a folder for the model after each pass. Raises PassError for a broken promise, a pass
    that finds more to do when run twice, or a fault of the program.
    """
    verifier = Verifier(graph, feeds)
    rows: list[dict[str, Any]] = []
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
    for index, step in enumerate(steps):
        row = _run_pass(step, graph, context, verifier)
        rows.append(row)
        if dump is not None:
            graph.save(dump / f"{index:02d}-{step.name}.onnx")
    return rows


def _run_pass(step: Pass, graph: Graph, context: Context, verifier: Verifier) -> dict[str, Any]:
    if context.progress is not None:
        context.progress(step.name)
    nodes, size = len(graph.nodes), _constant_bytes(graph)
    verifier.before(graph, step)
    start = time.perf_counter()
    report = _apply(step, graph, context)
    seconds = time.perf_counter() - start
    ratio = None
    if report.rewrites:
        rough = context.settings.narrow_activations and context.plan is not None
        ratio = verifier.after(graph, step, finished=_finished(context), rough=rough)
        again = _apply(step, graph, context)
        if again.rewrites:
            raise PassError(f"pass '{step.name}' found {again.rewrites} more rewrites when run twice; please report this model")
    return _row(step, report, seconds, ratio, len(graph.nodes) - nodes, _constant_bytes(graph) - size)


def _apply(step: Pass, graph: Graph, context: Context) -> Report:
    """Run `step`; a fault of the program becomes a PassError that names it (its cause stays chained)."""
    try:
        return step.run(graph, context)
    except (QcompileError, MemoryError):
        raise
    except Exception as error:  # a pass may fail in any way; whatever it was, the user must learn where
        words = " ".join(str(error).split())[:300]
        raise PassError(f"pass '{step.name}' failed: {type(error).__name__}: {words}; please report this model") from error


def _row(step: Pass, report: Report, seconds: float, ratio: float | None, nodes: int, size: int) -> dict[str, Any]:
    return {
        "name": step.name,
        "rewrites": report.rewrites,
        "skipped": dict(sorted(report.skipped.items())),
        "refusals": [{"node": node, "reason": reason} for node, reason in report.refusals],
        "seconds": round(seconds, 3),
        "sqnr_db": None if ratio is None else round(ratio, 2),
        "nodes_added": nodes,
        "bytes_added": size,
    }


def _finished(context: Context) -> bool:
    """Whether no node that was quantised holds float weights (or, where they become int32, a float bias) any more."""
    inputs = (1,) if context.settings.target == "tensorrt" else (1, 2)
    return context.plan is None or all(s.node.constant(i) is None for s in context.plan.linears for i in inputs)


def _constant_bytes(graph: Graph) -> int:
    return sum(c.nbytes for c in graph.constants.values())
