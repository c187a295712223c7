"""Whole channels, heads and hidden units removed (`--prune-channels`): a smaller dense model, faster on any runtime.

    Conv [C, ..] -> Relu -> Conv [M, C, ..]    ->    Conv [C', ..] -> Relu -> Conv [M, C', ..]

Channels that stand or fall together are found by following them through the graph (`_prune_trace`, `_prune_rules`): residual sums
tie them, Concat offsets them, depthwise convolutions carry them, Flatten spreads them, heads bind them. Units go in chunks of
`--channel-multiple`, the smallest loss for what it saves first, until the budget holds; every group, and each part that a Split
makes of one, keeps one chunk. Then each layer is fitted anew by least squares on the calibration samples (`_prune_refit`).

Kept, the reason counted: channels that are outputs of the model, that Softmax or LayerNormalization run over, of grouped
convolutions, of weights that several nodes share, that an unknown operator reads, and of what `--keep` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qcompile.context import ChannelPruning, Context, PrunedRecord
from qcompile.errors import InputError, ModelError
from qcompile.graph import Array, Graph, Node
from qcompile.layer_counts import output_sizes
from qcompile.passes._match import is_op
from qcompile.passes._prune_budget import Costs, Fixed, Judge, Step, groups_of, layer_slots, order
from qcompile.passes._prune_latency import fewest_for_latency
from qcompile.passes._prune_refit import Refit
from qcompile.passes._prune_rules import trace
from qcompile.passes._prune_scores import SecondOrder, columns_of, hrank, l1
from qcompile.passes._prune_trace import Slot, Trace
from qcompile.ranges import Thinned
from qcompile.rewrite import Lossy, Promise, Report

_SAMPLE_BYTES = 64 << 20
_SAMPLES = {"fast": 64, "default": 256, "best": 512}
# Channels that onnxruntime's float convolutions compute at once with AVX-512: 20 of 32 take as long as 32, 16 .65 (measured).
_BLOCK = 16
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class PruneChannels:
    """Remove the channels that matter least; fires with `--prune-channels` alone."""

    name: str = "prune_channels"
    keeps: Promise = field(default_factory=lambda: Lossy(-60.0, asked_for=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a layer that lost channels. Raises ModelError where the budget cannot be met."""
        report = Report()
        options = context.settings.pruning
        if options is None or context.pruned is not None:
            return report
        graph.infer_shapes()
        graph.sort()
        keep = _keeper(graph, options)
        found = trace(graph, keep)
        samples = _samples(context)
        base = _base(graph, samples[0], options.budget)
        judge = _judge(found, graph, options, samples, context.settings.seed)
        for root in {r for s in found.of_role("out") for r in found.roots(s.ids).tolist()} - judge.scores().keys():
            found.freeze(np.array([root]), "nothing tells what its channels are worth")
        for slot in found.of_role("out"):
            reasons = [found.frozen(int(r)) for r in found.roots(slot.ids)]
            if reasons[0] is not None and None not in reasons:
                report.refuse(slot.node.label, reasons[0])
        groups = groups_of(found)
        steps = order(groups, judge, Costs(found, base, _BLOCK), options.multiple)
        gone = {unit for step in _enough(graph, keep, steps, options, samples) for unit in step.units}
        dense = graph.copy()
        before = {slot.node: len(slot.ids) for slot in found.of_role("out")}
        rows = {slot.node: found.kept(slot, gone) for slot in found.of_role("out")}
        columns = _columns(found, gone)
        found.remove(gone)
        if options.refit:
            _refit(graph, dense, samples, context, rows, columns)
        graph.cleanup()
        context.pruned = [
            PrunedRecord(node.label, node.op, before[node], int(mask.sum())) for node, mask in rows.items() if not mask.all()
        ]
        report.rewrites = len(context.pruned)
        return report


def _keeper(graph: Graph, options: ChannelPruning) -> Callable[[Node], bool]:
    for pattern in options.keep:
        if not any(options.keeps(n.name, pattern) for n in graph.nodes):
            raise InputError(f"--keep {pattern}: no node of the model matches; `qcompile inspect MODEL --nodes` lists them")
    return lambda node: any(options.keeps(node.name, pattern) for pattern in options.keep)


def _samples(context: Context) -> list[dict[str, Array]]:
    thinned = Thinned(budget_bytes=_SAMPLE_BYTES, most=_SAMPLES[context.settings.effort])
    for _ in thinned.passing(context.calibration()):
        pass
    return thinned.kept


def _base(graph: Graph, feeds: dict[str, Array], budget: str) -> dict[Node, float]:
    """MACs (a latency is looked for along these too) or parameters of every weighted layer."""
    nodes = [n for n in graph.nodes if is_op(n, *_WEIGHTED) and n.constant(1) is not None]
    sizes = output_sizes(graph, nodes, feeds) if budget != "params" else {}
    found = {}
    for node in nodes:
        weight = node.constant(1)
        assert weight is not None
        count = float(np.prod(weight.dims))
        rows = weight.dims[0 if node.op == "Conv" or node.attr("transB", 0) else -1]
        found[node] = count if budget == "params" else count / max(rows, 1) * sizes[node]
    return found


def _judge(found: Trace, graph: Graph, options: ChannelPruning, samples: list[dict[str, Array]], seed: int) -> Judge:
    if options.criterion == "l1":
        return Fixed(l1(found))
    return Fixed(hrank(found, graph, samples)) if options.criterion == "hrank" else SecondOrder(found, graph, samples, seed)


def _enough(
    graph: Graph, keep: Callable[[Node], bool], steps: list[Step], options: ChannelPruning, samples: list[dict[str, Array]]
) -> list[Step]:
    """The first steps that meet the budget."""
    if options.budget == "latency":
        count, reached = fewest_for_latency(graph, keep, steps, 1 - options.ratio, samples[0])
    else:
        reached = steps[-1].left if steps else 1.0
        count = next((i + 1 for i, s in enumerate(steps) if s.left <= 1 - options.ratio), None)
    if count is None:
        raise ModelError(
            f"--prune-channels {options.ratio:g}: only {1 - reached:.3f} of the {options.budget} can go; ask for less, or give a "
            f"smaller --channel-multiple than {options.multiple}"
        )
    return steps[:count]


def _columns(found: Trace, gone: set[int]) -> dict[Node, Array]:
    """Which columns of K each reader keeps."""

    def mask(slot: Slot) -> Array:
        weight = slot.node.constant(1)
        assert weight is not None
        return np.asarray(found.kept(slot, gone)[columns_of(slot, np.empty(weight.dims, np.bool_))])

    return {node: mask(slot) for node, slot in layer_slots(found, "in").items()}


def _refit(
    graph: Graph,
    dense: Graph,
    samples: list[dict[str, Array]],
    context: Context,
    rows: dict[Node, Array],
    columns: dict[Node, Array],
) -> None:
    walk = Refit(graph, dense, samples, context.settings.seed)
    for node in list(graph.nodes):
        weight = node.constant(1) if is_op(node, *_WEIGHTED) else None
        if weight is None or node not in rows or len(weight.consumers) != 1:
            walk.passed(node)
            continue
        if context.progress is not None:
            context.progress("refitting layers")
        width = int(np.prod(weight.dims[1:])) if node.op == "Conv" else weight.dims[1 if node.attr("transB", 0) else 0]
        walk.layer(node, rows[node], columns.get(node, np.ones(width, np.bool_)))
        walk.passed(node)
