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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompile.context import ChannelPruning, Context, PrunedRecord
from qcompile.errors import DataError, InputError, ModelError
from qcompile.graph import Array, Graph, Node
from qcompile.layer_counts import output_sizes
from qcompile.passes._match import is_op
from qcompile.passes._prune_budget import Costs, Fixed, Judge, Step, groups_of, order
from qcompile.passes._prune_hessian import hessian
from qcompile.passes._prune_implant import Left, Part, parts_of, refusals, split, with_implants
from qcompile.passes._prune_latency import fewest_for_latency
from qcompile.passes._prune_refit import Refit
from qcompile.passes._prune_rules import trace
from qcompile.passes._prune_scores import hrank, l1
from qcompile.passes._prune_second_order import SecondOrder
from qcompile.passes._prune_trace import Cut, Trace
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
        if options.implant and len(samples) < 2:
            raise DataError("--prune-implant fits on one half of the samples and tries on the other; give 2 at least")
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
        refused = refusals(found, groups) if options.implant else {}
        cuts = _Cuts(steps, [], options.implant, options.multiple, refused, groups)
        cut = _enough(graph, keep, cuts, Left(found, base), options, samples)
        _count_refusals(report, found, cut, refused)
        dense = graph.copy()
        before = {slot.node: len(slot.ids) for slot in found.of_role("out")}
        parts = parts_of(found, cut)
        found.cut(cut)
        split_parts = split(found, cut, parts)
        if options.refit:
            _refit(graph, dense, samples, context, split_parts)
        graph.cleanup()
        implanted = {p.source: len(p.rows) for p in split_parts if p.implant}
        context.pruned = [
            PrunedRecord(p.node.label, p.node.op, before[p.node], len(p.rows) - implants, implants)
            for p in parts
            if len(p.rows) - (implants := implanted.get(p.source, 0)) < before[p.node]
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
    if options.criterion == "hessian":
        return Fixed(hessian(found, graph, samples, seed))
    return Fixed(hrank(found, graph, samples)) if options.criterion == "hrank" else SecondOrder(found, graph, samples, seed)


@dataclass(frozen=True)
class _Cuts:
    """What so many of the steps come to, with their share of implants. Steps are counted only as far as they are asked for."""

    coming: Iterator[Step]
    steps: list[Step]
    share: float
    multiple: int
    refused: Mapping[int, str]
    groups: Sequence[tuple[list[int], int]]

    def most(self) -> int:
        """How many there are."""
        self.steps.extend(self.coming)
        return len(self.steps)

    def growing(self) -> Iterator[Cut]:
        """One step done, two steps, and so on to the last."""
        while (step := next(self.coming, None)) is not None:
            self.steps.append(step)
            yield self.first(len(self.steps))

    def first(self, count: int) -> Cut:
        """`count` steps done."""
        return with_implants(self.steps[:count], self.share, self.multiple, self.refused, self.groups)


def _enough(
    graph: Graph,
    keep: Callable[[Node], bool],
    cuts: _Cuts,
    left: Left,
    options: ChannelPruning,
    samples: list[dict[str, Array]],
) -> Cut:
    """The first steps that meet the budget."""
    target = 1 - options.ratio
    if options.budget == "latency":

        def do(copy: Graph, count: int) -> None:
            found, cut = trace(copy, keep), cuts.first(count)
            parts = parts_of(found, cut)
            found.cut(cut)
            split(found, cut, parts)

        done, reached = fewest_for_latency(graph, do, cuts.most(), target, samples[0])
    else:
        reached, done = 1.0, None
        for count, cut in enumerate(cuts.growing(), 1):
            share = left.share(cut)
            reached = min(reached, share)
            if share <= target:
                done = count
                break
    if done is None:
        fewer = f", or fewer implants than --prune-implant {options.implant:g}" if options.implant else ""
        raise ModelError(
            f"--prune-channels {options.ratio:g}: only {max(1 - reached, 0):.3f} of the {options.budget} can go; "
            f"ask for less, or give a smaller --channel-multiple than {options.multiple}{fewer}"
        )
    return cuts.first(done)


def _count_refusals(report: Report, found: Trace, cut: Cut, refused: Mapping[int, str]) -> None:
    """Each layer that lost filters without a chance of an implant, with the reason."""
    for slot in found.of_role("out"):
        reasons = [refused[r] for r in found.roots(slot.ids).tolist() if r in cut.gone and r in refused]
        if reasons:
            report.refuse(slot.node.label, reasons[0])


def _refit(graph: Graph, dense: Graph, samples: list[dict[str, Array]], context: Context, parts: Sequence[Part]) -> None:
    walk = Refit(graph, dense, samples, context.settings.seed)
    by_node = {part.node: part for part in parts}
    for node in list(graph.nodes):
        weight = node.constant(1) if is_op(node, *_WEIGHTED) else None
        if weight is None or node not in by_node or len(weight.consumers) != 1:
            walk.passed(node)
            continue
        if context.progress is not None:
            context.progress("refitting layers")
        walk.layer(by_node[node])
        walk.passed(node)
