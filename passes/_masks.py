"""Softmax with its mask: which scores go in, by which factor, and which positions count.

    Softmax(scores * f + mask)     Softmax((scores + mask) * f)     Softmax(Where(keep, scores, -inf))

An additive mask holds 0 where a position is kept and at most -10000 where it is masked, so that exp underflows to 0 there. Where
the mask comes from integers or booleans, `keep` says which positions count in those terms, without a float. What is added but is
no mask (relative positions, a float input) stays part of the scores.

It is refused, with a reason: an axis other than the last; a mask that holds anything but 0 and <= -10000, or NaN (0 * -inf);
a mask that would enlarge the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qcompile.graph import Const, Graph, Node, Tensor
from qcompile.passes._mask_values import All, Condition, Conditions, Table, table_of
from qcompile.passes._match import is_op, scalar_of

__all__ = ["MASKED", "Condition", "Conditions", "MaskedSoftmax", "masked_softmax", "read_softmax"]

MASKED = -1e4  # an additive value up to here masks: e^-10000 is 0 in every float format
_NO_LIMIT = -1e30  # Max with a number up to here changes no score
_DEPTH = 12
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)

AXIS = "not along the last axis"
VALUES = "the mask holds other numbers than 0 and at most -10000"
ALWAYS = "the mask keeps nothing"
LARGER = "the mask enlarges the scores"


@dataclass(frozen=True)
class MaskedSoftmax:
    """Softmax along the last axis of `factor` * `scores`, over the positions where `keep` is true.

    keep: None where every position counts. Write it with `Conditions(graph).tensor(keep)`; it broadcasts to the scores (apply it
    before sums are taken: where dimensions are unknown it may also enlarge them, as the mask did).
    replaced: masked scores are replaced (Where), so that a row without a kept position is uniform, or NaN where `masked_value` is
    -inf; else they are lowered by `masked_value`, so that such a row is the Softmax of its scores, as without a mask.
    masked_value: the largest number that masks; -inf where there is no mask.
    steps: the nodes between scores and Softmax, last first.
    """

    scores: Tensor
    factor: float
    keep: Condition | None
    masked_value: float
    replaced: bool
    steps: tuple[Node, ...]


def masked_softmax(graph: Graph, softmax: Node) -> MaskedSoftmax | None:
    """What `softmax` computes, None where `read_softmax` refuses it. Shapes must have been inferred; nothing is changed."""
    found = read_softmax(graph, softmax)
    return None if isinstance(found, str) else found


def read_softmax(graph: Graph, softmax: Node) -> MaskedSoftmax | str:
    """What `softmax` computes, or the reason for refusing it."""
    if not _last_axis(graph, softmax):
        return AXIS
    reading = _Reading(softmax.inputs[0])
    for _ in range(_DEPTH):
        refusal = reading.step()
        if refusal == "":
            break
        if refusal is not None:
            return refusal
    if _enlarged(reading.scores, softmax.inputs[0]):
        return LARGER
    keep = None
    if reading.keeps:
        unique = tuple(dict.fromkeys(reading.keeps))
        keep = unique[0] if len(unique) == 1 else All(unique)
    return MaskedSoftmax(reading.scores, reading.factor, keep, reading.masked_value, reading.replaced, tuple(reading.steps))


class _Reading:
    """The way back from Softmax's input: softmax(factor * scores), and what was masked on the way."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.factor = 1.0
        self.keeps: list[Condition] = []
        self.masked_value = -np.inf
        self.replaced = False
        self.steps: list[Node] = []

    def step(self) -> str | None:
        """Go back by one node. None where that was possible, an empty text at the end, else a refusal."""
        node = self.scores.producer
        if node is None:
            return ""
        if is_op(node, "Identity") or (is_op(node, "Cast") and self._widens(node)):
            return self._go(node, node.inputs[0])
        if is_op(node, "Mul", "Div"):
            return self._scaled(node)
        if is_op(node, "Add", "Sub"):
            return self._added(node)
        if is_op(node, "Where"):
            return self._chosen(node)
        if is_op(node, "Max") and len(node.inputs) == 2:
            for index in (0, 1):
                limit = scalar_of(node.input(index))
                if limit is not None and limit * self.factor <= _NO_LIMIT:
                    return self._go(node, node.inputs[1 - index])
        return ""

    def _go(self, node: Node, scores: Tensor) -> str | None:
        self.steps.append(node)
        self.scores = scores
        return None

    def _widens(self, node: Node) -> bool:
        return node.inputs[0].elem_type in _FLOATS and node.attr("to") in _FLOATS

    def _scaled(self, node: Node) -> str | None:
        right = scalar_of(node.input(1))
        number = right if right is not None or node.op == "Div" else scalar_of(node.input(0))
        if number is None or not 0 < number < np.inf:
            return ""
        self.factor *= number if node.op == "Mul" else 1 / number
        return self._go(node, node.inputs[0 if right is not None else 1])

    def _added(self, node: Node) -> str | None:
        sides = (1,) if node.op == "Sub" else (1, 0)
        for side in sides:
            operand = node.inputs[side]
            table = table_of(operand)
            if table is None and isinstance(operand, Const) and _masks_somewhere(operand, self.factor):
                return VALUES
            if table is None:
                continue
            sign = self.factor if node.op == "Add" else -self.factor
            with np.errstate(all="ignore"):
                values = {row: float(v) * sign for row, v in table.rows.items()}
            if isinstance(operand, Const) and all(v > MASKED for v in values.values()):
                return ""  # a bias
            return self._mask(node, Table(table.conditions, values), node.inputs[1 - side], replaced=False)
        return ""

    def _chosen(self, node: Node) -> str | None:
        condition = table_of(node.inputs[0])
        if condition is None:
            return ""
        for side in (1, 2):
            table = table_of(node.inputs[side])
            if table is None:
                continue
            values = {float(v) * self.factor for v in table.values}
            if not all(v <= MASKED for v in values):
                continue
            masks = side == 1  # the condition is true where it masks
            rows = {row: max(values) if bool(v) == masks else 0.0 for row, v in condition.rows.items()}
            return self._mask(node, Table(condition.conditions, rows), node.inputs[3 - side], replaced=True)
        return ""

    def _mask(self, node: Node, table: Table, scores: Tensor, replaced: bool) -> str | None:
        if not all(v == 0 or v <= MASKED for v in table.values):  # NaN is neither
            return VALUES
        keep = table.where(lambda v: bool(v == 0))
        if keep is False:
            return ALWAYS
        if keep is not True:
            self.keeps.append(keep)
            self.masked_value = max(self.masked_value, *(v for v in table.values if v != 0))
            self.replaced = self.replaced or replaced
        return self._go(node, scores)


def _masks_somewhere(constant: Const, factor: float) -> bool:
    """Whether a constant to be added holds a number that masks, or NaN."""
    return constant.elem_type in _FLOATS and not bool(np.all(constant.array() * factor > MASKED))


def _last_axis(graph: Graph, softmax: Node) -> bool:
    """Whether it goes along the last axis; below opset 13 the axis counts from 1 on and all behind it are flattened."""
    axis = softmax.attr("axis", -1 if (graph.opset() or 13) >= 13 else 1)
    dims = softmax.inputs[0].dims
    return axis == -1 or (dims is not None and axis == len(dims) - 1)


def _enlarged(scores: Tensor, whole: Tensor) -> bool:
    """Whether the mask certainly adds dimensions or repeats the scores along one."""
    if scores.dims is None or whole.dims is None:
        return False
    if len(scores.dims) != len(whole.dims):
        return True
    return any(a == 1 and b != 1 and isinstance(b, int) for a, b in zip(scores.dims, whole.dims, strict=True))
