"""What an attention mask says, read back to its integer or boolean sources.

Masks reach Softmax as floats: 0 where a position counts, -10000 or -inf where it does not. They are made of 0s and 1s by a few
elementwise steps. So each tensor on that way is followed as a *table*: conditions (booleans, one an element), and the number
that the tensor holds for every combination of them. A constant of two different numbers is a condition, too.

    mask int64 {0, 1}  --Cast-->  {0., 1.}  --1 - x-->  {1., 0.}  --* -10000-->  {-10000., -0.}

An integer input of the graph is taken to hold 0 and 1 only, where arithmetic is done with it. Comparisons of integers are
conditions as they stand, so that other numbers (token ids, positions, lengths) are never mistaken for 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._match import ints_of, is_op, scalar_of

_BOOL = TensorProto.BOOL
_INTEGERS = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64})
_MOST = 4  # conditions in one table
_DEPTH = 40
_MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice", "Flatten", "Tile")
_UNARY: dict[str, Callable[[Any], Any]] = {"Identity": lambda a: a, "Neg": np.negative, "Not": np.logical_not}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: _quotient(a, b),
    "Min": np.minimum,
    "Max": np.maximum,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
}


@dataclass(frozen=True)
class Source:
    """True where `tensor` (bool, or integers 0 and 1) is not 0."""

    tensor: Tensor


@dataclass(frozen=True)
class Fixed:
    """True where the constant equals `value`."""

    constant: Const
    value: float


@dataclass(frozen=True)
class Triangle:
    """What Trilu keeps of a matrix whose shape is the contents (or, `of_tensor`, the shape) of `tensor`."""

    tensor: Tensor
    of_tensor: bool
    offset: Tensor | None
    upper: int


@dataclass(frozen=True)
class Moved:
    """`inner` through a data movement: operator, its other inputs, its attributes (name, serialised)."""

    op: str
    inner: Condition
    others: tuple[Tensor | None, ...]
    attributes: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Not:
    """True where `inner` is not."""

    inner: Condition


@dataclass(frozen=True)
class All:
    """True where every part is; parts broadcast."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Some:
    """True where some part is; parts broadcast."""

    parts: tuple[Condition, ...]


Condition = Source | Fixed | Triangle | Moved | Not | All | Some
Row = tuple[bool, ...]


@dataclass(frozen=True)
class Table:
    """The number that a tensor holds for each combination of `conditions` (numpy scalars of its element type).

    whole: the conditions, broadcast together, have the shape of the tensor; else only one that broadcasts to it.
    """

    conditions: tuple[Condition, ...]
    rows: dict[Row, Any]
    whole: bool = True

    @property
    def values(self) -> list[Any]:
        """The numbers, one a combination."""
        return list(self.rows.values())

    def where(self, holds: Callable[[Any], bool]) -> Condition | bool:
        """The condition under which `holds` is true of the number; a plain bool where it always or never is."""
        return _condition(self.conditions, {row: bool(holds(v)) for row, v in self.rows.items()})


def table_of(tensor: Tensor | None, depth: int = _DEPTH) -> Table | None:
    """`tensor` as a table of conditions, None where it is not made of 0s, 1s and constants in steps that are known."""
    if tensor is None or depth == 0:
        return None
    if isinstance(tensor, Const):
        return _constant_table(tensor)
    node = tensor.producer
    found = _node_table(node, depth - 1) if node is not None else None
    if found is not None and len(found.conditions) <= _MOST:
        return found
    if tensor.elem_type == _BOOL or (node is None and tensor.elem_type in _INTEGERS):
        zero, one = (np.asarray(v, helper.tensor_dtype_to_np_dtype(tensor.elem_type))[()] for v in (0, 1))
        return Table((Source(tensor),), {(False,): zero, (True,): one}, whole=tensor.dims != ())
    return None


def _constant_table(constant: Const) -> Table | None:
    if constant.elem_type not in _INTEGERS | {_BOOL, TensorProto.FLOAT, TensorProto.DOUBLE}:
        return None
    values = np.unique(constant.array())
    if len(values) == 1:
        return Table((), {(): values[0]}, whole=constant.dims in ((), (1,)))
    if len(values) != 2 or values[1] != values[1]:
        return None
    return Table((Fixed(constant, float(values[1])),), {(False,): values[0], (True,): values[1]})


def _quotient(a: Any, b: Any) -> Any:
    """a / b, of integers cut off towards 0 as ONNX does."""
    exact = np.divide(a, b)
    return exact if np.asarray(a).dtype.kind == "f" else np.trunc(exact).astype(np.asarray(a).dtype)


def _node_table(node: Node, depth: int) -> Table | None:
    if not is_op(node, node.op):
        return None
    if node.op in _MOVES:
        return _moved(node, table_of(node.inputs[0], depth))
    if node.op in _UNARY:
        return _combined(_UNARY[node.op], [table_of(node.inputs[0], depth)])
    if node.op == "Cast":
        try:
            dtype = helper.tensor_dtype_to_np_dtype(int(node.attr("to")))
        except KeyError:
            return None
        return _combined(lambda a: np.asarray(a).astype(dtype)[()], [table_of(node.inputs[0], depth)])
    if node.op in _BINARY and len(node.inputs) == 2:
        return _combined(_BINARY[node.op], [table_of(t, depth) for t in node.inputs])
    if node.op in _COMPARISONS:
        parts = [table_of(t, depth) for t in node.inputs]
        return _combined(_COMPARISONS[node.op], parts) if all(p is None or _boolean(p) for p in parts) else None
    if node.op == "Where":
        return _combined(lambda c, a, b: a if c else b, [table_of(t, depth) for t in node.inputs])
    if node.op == "ConstantOfShape":
        fill = node.attr("value")
        value = np.float32(0) if fill is None else numpy_helper.to_array(fill).reshape(-1)[0]
        return Table((), {(): value}, whole=False)
    if node.op == "Trilu":
        return _triangle(node, table_of(node.inputs[0], depth))
    return None


def _boolean(table: Table) -> bool:
    """Whether no integer input of the graph is taken for 0 or 1 in it."""
    return all(_boolean_condition(c) for c in table.conditions)


def _boolean_condition(condition: Condition) -> bool:
    if isinstance(condition, Source):
        return condition.tensor.elem_type == _BOOL
    if isinstance(condition, Moved | Not):
        return _boolean_condition(condition.inner)
    if isinstance(condition, All | Some):
        return all(_boolean_condition(p) for p in condition.parts)
    return True


def _combined(function: Callable[..., Any], tables: Sequence[Table | None]) -> Table | None:
    """`function` of the numbers of `tables`, over the union of their conditions."""
    known = [t for t in tables if t is not None]
    if len(known) != len(tables):
        return None
    conditions = tuple(dict.fromkeys(c for t in known for c in t.conditions))
    if len(conditions) > _MOST:
        return None
    rows: dict[Row, Any] = {}
    with np.errstate(all="ignore"):  # -inf * 0 is NaN, which the reader of the table refuses
        for row in product((False, True), repeat=len(conditions)):
            state = dict(zip(conditions, row, strict=True))
            rows[row] = function(*(t.rows[tuple(state[c] for c in t.conditions)] for t in known))
    return Table(conditions, rows, whole=all(t.whole for t in known))


def _moved(node: Node, table: Table | None) -> Table | None:
    different = list(dict.fromkeys(table.values)) if table is not None else []
    if table is None or len(different) == 1:
        return None if table is None else Table((), {(): different[0]}, whole=False)
    if len(different) > 2:
        return None  # each condition has a shape of its own, so the whole cannot be moved
    second = table.where(lambda v: bool(v == different[1]))
    if isinstance(second, bool):  # a NaN equals nothing
        return None
    whole = table.whole and not any(_flipped(table.rows, i) == table.rows for i in range(len(table.conditions)))
    if not whole and not _moves_broadcast(node, second):
        return None
    attributes = tuple((k, v.SerializeToString(deterministic=True)) for k, v in sorted(node.attrs.items()))
    others = tuple(node.input(i) for i in range(1, len(node.inputs)))
    moved = Moved(node.op, second, others, attributes)
    return Table((moved,), {(False,): different[0], (True,): different[1]}, whole)


def _moves_broadcast(node: Node, condition: Condition) -> bool:
    """Whether moving `condition` moves what it broadcasts to in the same way."""
    if node.op == "Expand":
        return True
    axes = ints_of(node, "axes", 1) if node.op == "Unsqueeze" else None
    if axes is not None and sorted(axes) == list(range(len(axes))):  # leading dimensions of 1
        return True
    dims = node.inputs[0].dims
    return node.op in ("Unsqueeze", "Squeeze", "Transpose") and dims is not None and _rank(condition) == len(dims)


def _rank(condition: Condition) -> int | None:
    """How many dimensions a condition has, None where unknown."""
    if isinstance(condition, Source | Fixed):
        tensor = condition.tensor if isinstance(condition, Source) else condition.constant
        return None if tensor.dims is None else len(tensor.dims)
    if isinstance(condition, Not):
        return _rank(condition.inner)
    if isinstance(condition, All | Some):
        ranks = [_rank(p) for p in condition.parts]
        known = [r for r in ranks if r is not None]
        return max(known) if len(known) == len(ranks) else None
    if isinstance(condition, Moved) and condition.op == "Transpose":
        return _rank(condition.inner)
    if isinstance(condition, Moved) and condition.op == "Unsqueeze" and condition.others:
        axes, inner = condition.others[0], _rank(condition.inner)
        return None if inner is None or not isinstance(axes, Const) else inner + axes.dims[0]
    return None


def _triangle(node: Node, table: Table | None) -> Table | None:
    if table is None:
        return None
    source, of_tensor = node.inputs[0], True
    maker = source.producer
    if maker is not None and is_op(maker, "ConstantOfShape", "Expand") and scalar_of(maker.inputs[0]) is not None:
        source, of_tensor = maker.inputs[1] if maker.op == "Expand" else maker.inputs[0], False
    elif maker is not None and is_op(maker, "ConstantOfShape"):
        source, of_tensor = maker.inputs[0], False
    kept = Table((Triangle(source, of_tensor, node.input(1), int(node.attr("upper", 1))),), {(False,): False, (True,): True})
    return _combined(lambda k, v: v if k else np.asarray(v).dtype.type(0), [kept, table])


def _turned(row: Row, index: int) -> Row:
    return (*row[:index], not row[index], *row[index + 1 :])


def _flipped(rows: dict[Row, Any], index: int) -> dict[Row, Any]:
    """The rows with condition `index` turned round."""
    return {row: rows[_turned(row, index)] for row in rows}


def _condition(conditions: tuple[Condition, ...], rows: dict[Row, bool]) -> Condition | bool:
    """The shortest of: a constant, one condition, all of several, any of several, any of several alls."""
    for index in range(len(conditions)):  # a condition that changes nothing is left out
        if _flipped(rows, index) == rows:
            rest = {(*row[:index], *row[index + 1 :]): v for row, v in rows.items()}
            return _condition((*conditions[:index], *conditions[index + 1 :]), rest)
    if not conditions:
        return rows[()]
    true = [row for row, v in rows.items() if v]
    false = [row for row, v in rows.items() if not v]
    if len(false) == 1:
        return _any([_literal(c, not v) for c, v in zip(conditions, false[0], strict=True)])
    return _any([_all([_literal(c, v) for c, v in zip(conditions, row, strict=True)]) for row in true])


def _literal(condition: Condition, positive: bool) -> Condition:
    if positive:
        return condition
    return condition.inner if isinstance(condition, Not) else Not(condition)


def _all(parts: list[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _any(parts: list[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else Some(tuple(parts))


class Conditions:
    """Writes conditions into a graph as bool tensors, each once. Use it before `cleanup`: what they read must still be there."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made: dict[Condition, Tensor] = {}

    def tensor(self, condition: Condition) -> Tensor:
        """The bool tensor; its shape broadcasts to that of what it masks."""
        made = self._made.get(condition)
        if made is None:
            made = self._made[condition] = self._write(condition)
        return made

    def _write(self, condition: Condition) -> Tensor:
        graph = self._graph
        if isinstance(condition, Source):
            if condition.tensor.elem_type == _BOOL:
                return condition.tensor
            return self._node("Cast", [condition.tensor], to=_BOOL)
        if isinstance(condition, Fixed):
            return graph.constant("keep", _holds(condition))
        if isinstance(condition, Not):
            return self._node("Not", [self.tensor(condition.inner)])
        if isinstance(condition, All | Some):
            op, made = "And" if isinstance(condition, All) else "Or", self.tensor(condition.parts[0])
            for part in condition.parts[1:]:
                made = self._node(op, [made, self.tensor(part)])
            return made
        if isinstance(condition, Triangle):
            shape = self._node("Shape", [condition.tensor], TensorProto.INT64) if condition.of_tensor else condition.tensor
            full = self._node("Expand", [graph.constant("keep", np.asarray(True)), shape])
            return self._node("Trilu", [full, condition.offset], upper=condition.upper)
        moved = graph.node(condition.op, [self.tensor(condition.inner), *condition.others], ["keep"])
        moved.attrs.update((name, AttributeProto.FromString(text)) for name, text in condition.attributes)
        return self._typed(moved)

    def _node(self, op: str, inputs: Sequence[Tensor | None], elem_type: int = _BOOL, **attributes: Any) -> Value:
        return self._typed(self._graph.node(op, inputs, ["keep"], **attributes), elem_type)

    @staticmethod
    def _typed(node: Node, elem_type: int = _BOOL) -> Value:
        output = node.outputs[0]
        output.type = helper.make_tensor_type_proto(elem_type, None)
        return output


def _holds(condition: Fixed) -> Array:
    held: Array = condition.constant.array() == condition.value
    return held
