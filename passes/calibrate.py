"""One streaming sweep over the calibration data: ranges of every tensor that will be quantised. The graph is not changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Context
from qcompile.graph import Graph, Value
from qcompile.passes.quantise import scale_sources
from qcompile.placement import place
from qcompile.ranges import Observer, Thinned, observe
from qcompile.rewrite import Exact, Promise, Report
from qcompile.sessions import graph_session

_SAMPLES = {"fast": (64, 64 << 20), "default": (128, 64 << 20), "best": (256, 256 << 20)}  # at most so many, and bytes


@dataclass(frozen=True)
class Calibrate:
    """Fills `context.observers` from `context.calibration`; O(1) feeds in memory.

    `context.samples` becomes an evenly thinned selection of the feeds, for the passes that walk.
    """

    name: str = "calibrate"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """No rewrites. Raises DataError on empty data, NaN or Inf."""
        if context.observers or any(n.op == "QuantizeLinear" for n in graph.nodes):
            return Report()
        graph.infer_shapes()
        names = scale_sources(graph, place(graph, context.settings))
        if not names:
            return Report()
        watched = graph.copy()
        by_name: dict[str, Value] = {v.name: v for v in watched.values()}
        inputs = {v.name for v in watched.inputs}
        present = {o.name for o in watched.outputs}
        watched.outputs += [by_name[n] for n in names if n not in inputs and n not in present]
        session = graph_session(watched, label="calibration")
        progress = context.progress
        tick = None if progress is None else lambda: progress("calibrating")
        keep = context.settings.ranges == "percentile"
        equalised = context.settings.effort != "fast" and not context.synthetic
        maps = equalised and any(n.op == "Conv" for n in graph.nodes)
        context.observers = {name: _observer(by_name[name], keep, maps) for name in names}
        most, budget = _SAMPLES[context.settings.effort]
        thinned = Thinned(budget, most)
        context.calibrated = observe(session, context.observers, thinned.passing(context.calibration()), tick)
        context.samples = thinned.kept
        return Report()


def _observer(value: Value, keep: bool, maps: bool) -> Observer:
    if _is_matrix(value):
        return Observer(keep=keep, channels=True)
    image = maps and value.dims is not None and len(value.dims) > 2
    return Observer(keep=keep, channels=image, axis=1 if image else -1)


def _is_matrix(value: Value) -> bool:
    """Whether it is rows of channels, as Gemm reads and writes: the extremes of each channel are then worth keeping."""
    readers = value.producer is not None and value.producer.op == "Gemm"
    return readers or any(n.op == "Gemm" for n in value.consumers) or (value.dims is not None and len(value.dims) == 2)
