"""The neural implant (HAP, Yu et al. 2022, section 3.2): of the filters that are to go, the most sensitive become 1x1 filters.

    Conv k x k [C]  ->  Concat(Conv k x k [C'], Conv 1x1 [C''])        C' + C'' <= C, the implants' channels last

A 1x1 filter at the centre tap costs 1 / k^2 of what it stands for; its weights are fitted by least squares (`_prune_refit`).
Channels keep their meaning, so that an order with implants last is the same permutation for all layers that write or read them.

A filter gets none, with the reason, where its kernel has no centre or pads so that the centre would read outside of what a 1x1
filter with padding can, and where other channels stand between those of its group in a layer that makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from qcompile.compensation import WIDEST
from qcompile.graph import Array, Graph, Node, Tensor, Value
from qcompile.passes._match import is_op, single_consumer
from qcompile.passes._prune_budget import Step, layer_slots
from qcompile.passes._prune_trace import Cut, Slot, Trace, forget

# One input, and each value by itself: they stand in front of the Concat, where the runtime fuses them into the convolutions.
_POINTWISE = (
    "Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Gelu", "Tanh", "Softplus",
)  # fmt: skip
_TIED = "no implant: a layer that makes its channels makes others in between"


@dataclass(frozen=True, eq=False)
class Part:
    """A layer of the pruned graph: rows and columns of K that it has of the dense layer whose output is named `source`."""

    node: Node
    source: str
    rows: Array
    columns: Array
    implant: bool = False


def refusals(found: Trace, groups: Sequence[tuple[list[int], int]]) -> dict[int, str]:
    """Why a unit gets no implant, by unit; the others may."""
    makers: dict[int, list[Slot]] = {}
    for slot in found.of_role("out"):
        for root in np.unique(found.roots(slot.ids)).tolist():
            makers.setdefault(root, []).append(slot)
    runs = [found.roots(label.ids) for label in found.labels.values()]
    runs += [found.roots(slot.ids) for slot in found.slots]
    reasons = {}
    for units, _ in groups:
        reason = _refusal(found, np.asarray(units), makers[units[0]], runs)
        if reason is not None:
            reasons.update(dict.fromkeys(units, reason))
    return reasons


def _refusal(found: Trace, units: Array, makers: Sequence[Slot], runs: Sequence[Array]) -> str | None:
    reasons = [_kernel_refusal(slot.node) for slot in makers]
    if any(reasons):
        return next(r for r in reasons if r)
    if all(_taps(slot.node) == 1 for slot in makers):
        return "no implant: its filters are 1x1"
    if any(not np.array_equal(found.roots(slot.ids), units) for slot in makers):
        return _TIED
    for run in runs:
        own = run[np.isin(run, units)]
        if not np.array_equal(own, np.repeat(units, own.size // units.size)):
            return "no implant: its channels are not read in one order"
    return None


def _kernel_refusal(node: Node) -> str | None:
    weight = node.constant(1)
    if not is_op(node, "Conv") or weight is None:
        return "no implant: no convolution"
    if any(k % 2 == 0 for k in weight.dims[2:]):
        return "no implant: an even kernel has no centre"
    if weight.dims[1] > WIDEST:
        return f"no implant: it reads more than {WIDEST} channels"
    if _taps(node) > 1 and _centre_pads(node) is None:
        return "no implant: its padding does not keep the centre of its kernel inside"
    return None


def _taps(node: Node) -> int:
    weight = node.constant(1)
    return 1 if weight is None or node.op != "Conv" else prod(weight.dims[2:])


def _centre_pads(node: Node) -> list[int] | None:
    """The pads with which a 1x1 filter reads what the centre tap does; None where there are none."""
    weight = node.constant(1)
    assert weight is not None
    kernel = weight.dims[2:]
    strides, dilations = (list(node.attr(name, [1] * len(kernel))) for name in ("strides", "dilations"))
    mode = node.attr("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") and all(s == 1 for s in strides):
        return [0] * 2 * len(kernel)
    if mode != "NOTSET":
        return None
    half = [d * (k - 1) // 2 for k, d in zip(kernel, dilations, strict=True)]
    pads = [p - h for p, h in zip(node.attr("pads", [0] * 2 * len(kernel)), half * 2, strict=True)]
    return pads if min(pads) >= 0 else None


def with_implants(
    steps: Sequence[Step], share: float, multiple: int, refused: Mapping[int, str], groups: Sequence[tuple[list[int], int]]
) -> Cut:
    """At most `share` of all filters that go become implants, from the last ones to go on, `multiple` at a time."""
    most = int(share * sum(len(step.units) for step in steps) + 1e-9)
    chosen: set[int] = set()
    for step in reversed(steps):
        able = [unit for unit in step.units if unit not in refused]  # the cheapest to lose first
        count = min(most - len(chosen), len(able)) // multiple * multiple
        chosen.update(able[len(able) - count :])
    gone = frozenset(u for step in steps for u in step.units if u not in chosen)
    touched = tuple(frozenset(units) for units, _ in groups if not chosen.isdisjoint(units))
    return Cut(gone, frozenset(chosen), touched)


class Left:
    """What share of MACs or parameters a cut leaves: implants count 1 / k^2 of a filter."""

    def __init__(self, found: Trace, base: Mapping[Node, float]) -> None:
        self._total = sum(base.values())
        ends = {**layer_slots(found, "out"), **layer_slots(found, "through")}
        reads = layer_slots(found, "in")
        self._layers = [
            (cost, _taps(node), _roots(found, ends.get(node)), _roots(found, reads.get(node))) for node, cost in base.items()
        ]

    def share(self, cut: Cut) -> float:
        """Of the whole."""
        left = 0.0
        for cost, taps, rows, columns in self._layers:
            filters = 1 - _part(rows, cut.gone) - _part(rows, cut.implants) * (1 - 1 / taps)
            left += cost * filters * (1 - _part(columns, cut.gone))
        return left / max(self._total, 1e-30)


def _roots(found: Trace, slot: Slot | None) -> Array:
    return np.zeros(0, np.int64) if slot is None else found.roots(slot.ids)


def _part(roots: Array, units: frozenset[int]) -> float:
    """The share of `roots` that are among `units`."""
    return float(np.isin(roots, np.fromiter(units, np.int64, len(units))).mean()) if roots.size else 0.0


def parts_of(found: Trace, cut: Cut) -> list[Part]:
    """What every layer that makes or reads traced channels is left with, in graph order. The graph is not touched."""
    reads = layer_slots(found, "in")
    parts = []
    for slot in found.of_role("out"):
        node, weight = slot.node, slot.node.constant(1)
        assert weight is not None
        width = prod(weight.dims[1:]) if node.op == "Conv" else weight.dims[1 if node.attr("transB", 0) else 0]
        taps = _taps(node)
        each = np.arange(width // taps) if node not in reads else found.places(reads[node].ids, cut)
        columns = (np.arange(taps)[:, None] * (width // taps) + each).reshape(-1)
        parts.append(Part(node, node.outputs[0].name, found.places(slot.ids, cut), columns))
    return parts


def split(found: Trace, cut: Cut, parts: Sequence[Part]) -> list[Part]:
    """Split the layers of the graph, `cut` already, whose filters became implants; `parts` with these as layers of their own."""
    slots = layer_slots(found, "out")
    fresh: list[Part] = []
    for part in parts:
        roots, taps = found.roots(slots[part.node].ids)[part.rows], _taps(part.node)
        count = int(np.isin(roots, sorted(cut.implants)).sum()) if taps > 1 else 0
        if not count:
            fresh.append(part)
            continue
        keep = len(roots) - count
        implant = _split(found.graph, part.node, keep)
        centre = part.columns.reshape(taps, -1)[taps // 2]
        fresh.append(Part(part.node, part.source, part.rows[:keep], part.columns))
        fresh.append(Part(implant, part.source, part.rows[keep:], centre, implant=True))
    if len(fresh) > len(parts):
        forget(found.graph)
        found.graph.sort()
        found.graph.infer_shapes()
    return fresh


def _split(graph: Graph, node: Node, keep: int) -> Node:
    """Rows from `keep` on become the centre taps of a convolution of its own; returns that."""
    weight, bias, pads = node.constant(1), node.constant(2), _centre_pads(node)
    assert weight is not None and pads is not None
    values, rank = weight.array(), len(weight.dims) - 2
    centre = (slice(keep, None), slice(None), *(slice(k // 2, k // 2 + 1) for k in values.shape[2:]))
    name = node.outputs[0].name
    chain: list[Node] = []
    end: Tensor = node.outputs[0]
    while (reader := single_consumer(graph, end)) is not None and is_op(reader, *_POINTWISE) and reader.inputs[0] is end:
        chain.append(reader)
        end = reader.outputs[0]
    own: list[Tensor] = [node.inputs[0], graph.constant(weight.name + "_implant", values[centre])]
    node.inputs[1] = graph.constant(weight.name, values[:keep])
    if bias is not None:
        own.append(graph.constant(bias.name + "_implant", bias.array()[keep:]))
        node.inputs[2] = graph.constant(bias.name, bias.array()[:keep])
    strides = list(node.attr("strides", [1] * rank))
    implant = graph.node(
        "Conv", own, [name + "_implant"], name=node.label + "_implant", kernel_shape=[1] * rank, strides=strides, pads=pads
    )
    made = Value(graph.fresh_name(name + "_filters"))
    if chain:
        chain[-1].outputs.clear()
    node.outputs.clear()
    node.outputs.append(made)
    ends = [_behind(graph, tensor, chain) for tensor in (made, implant.outputs[0])]
    for reader in chain:
        graph.remove(reader)
    graph.node("Concat", ends, [end], axis=1)
    return implant


def _behind(graph: Graph, tensor: Value, chain: Sequence[Node]) -> Value:
    """A copy of `chain` on `tensor`; its end."""
    for reader in chain:
        copy = graph.node(reader.op, [tensor, *reader.inputs[1:]], [f"{tensor.name}_{reader.op.lower()}"])
        copy.attrs.update(reader.attrs)
        tensor = copy.outputs[0]
    return tensor
