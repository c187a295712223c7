"""How many bits the activations of each scale class have: 8, or as many as are asked for where integer layers read them.

A width is asked for by a node that reads the tensor. All classes that Adds join have one width: the widest that any of their
readers asks for. With widths apart, an operand's step could be many times the sum's, and a scale that Adds in a cycle share would
fit one of them alone.

8 bits stay where the group holds an input of the model, a result of the model, or nothing that a layer with weights reads: what
only functions, products of two activations and float nodes read costs no products with weights. So does the branch that only an
Add reads; in HAWQ-V3 (Yao et al. 2021) it has even 32. (resnet20 with 4 bits: 13.6 dB with narrow branches, 15.8 without.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qcompile.context import FLOAT_BITS, Settings, matches
from qcompile.errors import InputError
from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.placement import Placement, clip_bounds, shares_scale
from qcompile.plan import ScaleClass, WidthGroup

INPUT = "an input of the model keeps 8 bits"
RESULT = "a result of the model keeps 8 bits"
BRANCH = "only sums read it: 8 bits"
UNREAD = "no integer layer reads it: 8 bits"
WIDER = "more bits than asked for: it shares the width of tensors that Adds join"
NARROWER = "fewer bits than usual: a node that reads it, or what Adds join with it, asks for them"


def width_groups(graph: Graph, placement: Placement, class_of: Mapping[Tensor, ScaleClass]) -> list[WidthGroup]:
    """The groups of one width, in the order of their first class. `graph` is the float model, folded Relu/Clip taken out."""
    leader = {place: place for place in dict.fromkeys(class_of.values())}

    def find(place: ScaleClass) -> ScaleClass:
        while leader[place] is not place:
            place = leader[place]
        return place

    readers: dict[ScaleClass, list[Node]] = {}
    sums: dict[ScaleClass, None] = {}
    nodes = list(_compute(graph, placement))
    for node in nodes:
        for place in (class_of[t] for t in _operands(node) if t in class_of):
            readers.setdefault(place, []).append(node)
        if node.op == "Add":
            sums.update(dict.fromkeys(class_of[o] for o in _results(node, placement) if o in class_of))
    branches = {p for p, found in readers.items() if p not in sums and all(n.op == "Add" for n in found)}
    for node in nodes:
        if node.op == "Add":
            joined = [class_of[t] for t in (*_operands(node), *_results(node, placement)) if t in class_of]
            joined = [p for p in joined if p not in branches]
            for place in joined[1:]:
                leader[find(place)] = find(joined[0])
    fixed: dict[ScaleClass, str] = {find(p): BRANCH for p in branches}
    for tensor, place in class_of.items():
        if isinstance(tensor, Value) and tensor.producer is None:
            fixed[find(place)] = INPUT
        elif graph.is_output(tensor):
            fixed.setdefault(find(place), RESULT)
    members: dict[ScaleClass, list[ScaleClass]] = {}
    for place in leader:
        members.setdefault(find(place), []).append(place)
    groups = []
    for root, places in members.items():
        names = list(dict.fromkeys(n.name for p in places for n in readers.get(p, [])))
        groups.append(WidthGroup(places, names, fixed.get(root, None if names else UNREAD)))
    return groups


def _compute(graph: Graph, placement: Placement) -> Iterable[Node]:
    """Nodes that compute in integers on what they read: no data movement, no Clip."""
    linears = set(placement.linears)
    for node in graph.nodes:
        if node in linears or (node in placement.integer and not shares_scale(node) and clip_bounds(node) is None):
            yield node


def _operands(node: Node) -> list[Tensor]:
    return list(node.inputs[:2]) if node.op == "Add" else list(node.inputs[:1])


def _results(node: Node, placement: Placement) -> list[Tensor]:
    """What the node computes, and what folded Relu/Clip behind it make of that (they stand where ranges are symmetric)."""
    found: list[Tensor] = list(node.outputs)
    while len(found[-1].consumers) == 1 and found[-1].consumers[0] in placement.folded:
        found.append(found[-1].consumers[0].outputs[0])
    return found


@dataclass
class ActivationWidths:
    """What the settings ask for, given to the classes of `groups`. used: patterns that named a reader of anything."""

    settings: Settings
    groups: list[WidthGroup]
    used: set[str] = field(default_factory=set)

    def assign(self) -> list[tuple[str, str]]:
        """Set `bits` of every class. Returns (tensor, reason) of those that have more than was asked for, or less than is usual.

        Raises InputError for a pattern that names nothing that reads activations in integers.
        """
        settings, notes = self.settings, []
        for group in self.groups:
            wanted = [self._asked(name) for name in group.readers]
            asked, usual = [bits for bits in wanted if bits is not None], settings.activation_bits
            others = len(asked) < len(wanted) or not wanted  # readers of which nothing is asked
            bits = 8 if group.fixed is not None else max(asked, default=usual)
            least = min([*asked, usual] if others else asked)
            for place in group.classes:
                place.bits = bits
            if bits > least:
                notes += [(place.tensors[0], group.fixed or WIDER) for place in group.classes]
            elif others and bits < usual:
                notes += [(place.tensors[0], NARROWER) for place in group.classes]
        for pattern, bits in settings.node_activations:
            if bits != FLOAT_BITS and pattern not in self.used and not settings.names_float(pattern):
                raise InputError(f"[nodes] {pattern}: activations {bits}: no such node reads activations in integers")
        return notes

    def _asked(self, name: str) -> int | None:
        self.used |= {pattern for pattern, _ in self.settings.node_activations if matches(name, pattern)}
        return self.settings.activations_for(name)
