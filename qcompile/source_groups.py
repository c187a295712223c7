"""Activations that have one width, because Adds join them: how each width would round them, and which layers read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qcompile.context import FLOAT_BITS, Context
from qcompile.graph import Graph, Node
from qcompile.passes.search_ranges import ranges_at
from qcompile.placement import shares_scale
from qcompile.plan import WidthGroup
from qcompile.qparams import activation_params


@dataclass(frozen=True)
class Step:
    """How a tensor is rounded: x -> min(max(round(x / scale), low), high) * scale."""

    scale: float
    low: int
    high: int


@dataclass(frozen=True)
class SourceGroup:
    """tensors: of the float model, those that are rounded; readers: all integer nodes that read one of them; layers: those of
    them that have weights. convolved: an integer convolution writes one of them, so that they are integers whoever reads them.
    steps: by width, one a tensor."""

    tensors: tuple[str, ...]
    readers: tuple[str, ...]
    layers: tuple[str, ...]
    steps: dict[int, tuple[Step, ...]] = field(default_factory=dict)
    convolved: bool = False

    @property
    def name(self) -> str:
        """What the integer program calls it."""
        return f"activations {self.tensors[0]}"


def source_groups(graph: Graph, context: Context, layers: Sequence[str], widths: Sequence[int]) -> list[SourceGroup]:
    """The groups of `context.plan` whose width is free and which one of `layers` reads; `graph`: the float model.

    Ranges are searched for each of `widths`, which takes a walk over the samples each. Classes are left with 8 bits.
    """
    plan = context.plan
    assert plan is not None
    made_by = {v.name: v.producer for v in graph.values()}
    written = {site.result for site in plan.linears if site.node.op == "Conv"}
    groups: list[tuple[WidthGroup, SourceGroup]] = []
    for group in plan.groups:
        read_by = tuple(name for name in group.readers if name in layers)
        if group.fixed is not None or not read_by:
            continue
        tensors = [t for place in group.classes for t in place.tensors if not _moved(made_by.get(t), place.tensors)]
        convolved = not written.isdisjoint(group.classes)
        groups.append((group, SourceGroup(tuple(tensors), tuple(group.readers), read_by, convolved=convolved)))
    for bits in sorted({*widths} - {FLOAT_BITS}):
        found = ranges_at(graph, context, [p for g, _ in groups for p in g.classes], bits)
        kind = context.activations.narrowed(bits)
        for group, source in groups:
            steps = {}
            for place in group.classes:
                scale, zero = activation_params(*found[place], kind)
                steps.update(dict.fromkeys(place.tensors, Step(float(scale), kind.low - zero, kind.high - zero)))
            source.steps[bits] = tuple(steps[t] for t in source.tensors)
    return [source for _, source in groups]


def _moved(node: Node | None, rounded: Sequence[str]) -> bool:
    """Whether data movement makes the tensor out of `rounded` ones; behind a float one it is itself where values are rounded."""
    return node is not None and shares_scale(node) and any(v.name in rounded for v in node.inputs)
