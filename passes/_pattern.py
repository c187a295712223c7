"""Float patterns as data: what a chain of operators looks like, matched backwards from its last output.

    centred = op("Sub", var("x"), op("ReduceMean", var("x")))      var(name): any tensor, everywhere the same one
    half = op("Mul", centred, number(0.5))                         number(value), number("eps"): a constant of one element
    y = op("Add", either(half, centred), const("beta"))            const(name): any constant

Operands of Add, Mul, Min and Max match in either order. Identity, and Casts between float32 and float64, are looked through.
`rewrite_chains` offers every node to the patterns, last nodes first, so that the longest chain is seen before its parts; it
counts a refusal where a chain was recognised but may not be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from typing import Any

from onnx import TensorProto

from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.passes._match import is_op, scalar_of, set_type
from qcompile.rewrite import Report

SHARED = "a step of it is read elsewhere, or is an output of the graph"
NOT_FLOAT = "not float32"
_COMMUTATIVE = ("Add", "Mul", "Min", "Max")
_WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
_TOLERANCE = 2e-4  # constants of half-precision models are this far off


@dataclass(frozen=True)
class Match:
    """What a pattern found: tensors and numbers by name, every node of the chain, last first, and which pattern it was."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Node, ...] = ()
    index: int = 0


@dataclass(frozen=True)
class Var:
    """Any tensor; the same name is the same tensor."""

    name: str


@dataclass(frozen=True)
class Constant:
    """Any constant."""

    name: str


@dataclass(frozen=True)
class Number:
    """A constant of one element: `value`, or any, bound to a name."""

    value: float | str


@dataclass(frozen=True)
class Op:
    """One of the standard operators `ops` whose first inputs match `inputs`."""

    ops: tuple[str, ...]
    inputs: tuple[Pattern, ...]


@dataclass(frozen=True)
class Either:
    """The first of `choices` that matches."""

    choices: tuple[Pattern, ...]


Pattern = Var | Constant | Number | Op | Either


def var(name: str) -> Var:
    """Any tensor."""
    return Var(name)


def const(name: str) -> Constant:
    """Any constant."""
    return Constant(name)


def number(value: float | str) -> Number:
    """A constant of one element."""
    return Number(value)


def op(ops: str, *inputs: Pattern) -> Op:
    """An operator, or one of several: "Sqrt" or "Pow|Mul"."""
    return Op(tuple(ops.split("|")), inputs)


def either(*choices: Pattern) -> Either:
    """One of several spellings."""
    return Either(choices)


def match(pattern: Pattern, tensor: Tensor) -> Match | None:
    """What `pattern` finds from `tensor` backwards, None where it does not match. Nothing is changed."""
    return next(_matches(pattern, tensor, Match()), None)


def _matches(pattern: Pattern, tensor: Tensor | None, found: Match) -> Iterator[Match]:
    if tensor is None:
        return
    if isinstance(pattern, Either):
        for choice in pattern.choices:
            yield from _matches(choice, tensor, found)
        return
    tensor, passed = _behind_casts(tensor)
    found = replace(found, steps=(*found.steps, *(n for n in passed if n not in found.steps)))
    if isinstance(pattern, Op):
        producer = tensor.producer
        if producer is not None and is_op(producer, *pattern.ops):
            yield from _at_node(pattern, producer, found)
    elif isinstance(pattern, Number):
        value = scalar_of(tensor)
        if value is None:
            return
        if isinstance(pattern.value, str):
            if isclose(found.numbers.get(pattern.value, value), value):
                yield replace(found, numbers={**found.numbers, pattern.value: value})
        elif isclose(value, pattern.value, rel_tol=_TOLERANCE, abs_tol=1e-12):
            yield found
    elif (isinstance(pattern, Var) or isinstance(tensor, Const)) and found.tensors.get(pattern.name, tensor) is tensor:
        yield replace(found, tensors={**found.tensors, pattern.name: tensor})


def _at_node(pattern: Op, producer: Node, found: Match) -> Iterator[Match]:
    here = found if producer in found.steps else replace(found, steps=(*found.steps, producer))
    orders = [pattern.inputs]
    if producer.op in _COMMUTATIVE and len(pattern.inputs) == 2:
        orders.append(pattern.inputs[::-1])
    for order in orders:
        yield from _in_order(order, producer, 0, here)


def _in_order(patterns: Sequence[Pattern], producer: Node, index: int, found: Match) -> Iterator[Match]:
    if index == len(patterns):
        yield found
        return
    for partial in _matches(patterns[index], producer.input(index), found):
        yield from _in_order(patterns, producer, index + 1, partial)


def _behind_casts(tensor: Tensor) -> tuple[Tensor, list[Node]]:
    """The tensor without Casts between float32 and float64, and these."""
    passed: list[Node] = []
    while (step := tensor.producer) is not None and _keeps_value(step):
        passed.append(step)
        tensor = step.inputs[0]
    return tensor, passed


def _keeps_value(step: Node) -> bool:
    if is_op(step, "Cast"):
        return step.inputs[0].elem_type in _WIDE and step.attr("to") in _WIDE
    return is_op(step, "Identity") and not isinstance(step.inputs[0], Const)


def chains(graph: Graph, patterns: Sequence[Pattern]) -> Iterator[tuple[Match, Value]]:
    """Every chain that one of `patterns` describes and nothing else reads, with its output; last nodes first, no chain in two."""
    taken: set[Node] = set()
    lasts = {o for p in patterns for o in _last_ops(p)}
    for last in reversed(list(graph.nodes)):
        if is_op(last, *lasts):
            for found in _candidates(last, patterns):
                if _refusal(graph, found) is None and taken.isdisjoint(found.steps):
                    taken.update(found.steps)
                    yield found, last.outputs[0]
                    break


def rewrite_chains(graph: Graph, patterns: Sequence[Pattern], rewrite: Callable[[Graph, Match, Value], str | None]) -> Report:
    """Offer what `patterns` find to `rewrite(graph, match, output)`, last nodes first, longer patterns before shorter; clean up.

    `rewrite` returns None where it put the operator that computes `output` now (see `put`), an empty text where the match is no
    candidate, else the reason for leaving it. A chain with a step that is read elsewhere is refused here. A chain that is part of
    a refused one is tried, too; it counts as refused once.
    """
    report = Report()
    graph.infer_shapes()
    graph.sort()
    lasts = {o for p in patterns for o in _last_ops(p)}
    refused: list[tuple[Node, str, set[Node]]] = []
    for last in reversed(list(graph.nodes)):
        for found in _candidates(last, patterns) if is_op(last, *lasts) else ():
            steps, reason = set(found.steps), _refusal(graph, found)
            reason = rewrite(graph, found, last.outputs[0]) if reason is None else reason
            if reason is None:
                refused = [r for r in refused if steps.isdisjoint(r[2])]
                report.rewrites += 1
                graph.cleanup()
                break
            if reason and all(steps.isdisjoint(r[2]) for r in refused):
                refused.append((last, reason, steps))
    for last, reason, _steps in refused:
        report.refuse(last.label, reason)
    return report


def _candidates(last: Node, patterns: Sequence[Pattern]) -> Iterator[Match]:
    for index, pattern in enumerate(patterns):
        if last.outputs and (found := match(pattern, last.outputs[0])) is not None:
            yield replace(found, index=index)


def _last_ops(pattern: Pattern) -> tuple[str, ...]:
    if isinstance(pattern, Either):
        return tuple(o for c in pattern.choices for o in _last_ops(c))
    return pattern.ops if isinstance(pattern, Op) else ()


def _refusal(graph: Graph, found: Match) -> str | None:
    """Why the steps of `found` may not go: something else reads one of them."""
    inner, kept = set(found.steps), set(found.tensors.values())
    for step in found.steps[1:]:
        output = step.outputs[0]
        if output in kept or (_keeps_value(step) and step.inputs[0] in kept):
            continue
        if graph.is_pinned(output) or not inner.issuperset(output.consumers):
            return SHARED
    return None


def nodes_of(found: Match, *ops: str) -> list[Node]:
    """The nodes of the chain that are one of the operators `ops`."""
    return [s for s in found.steps if is_op(s, *ops)]


def put(graph: Graph, found: Match, output: Value, operator: str, inputs: Sequence[Tensor | None], **attributes: Any) -> None:
    """Let `operator`, in float32, compute `output` instead of the chain; it takes the name of the chain's last node."""
    name, double = found.steps[0].name, output.elem_type == TensorProto.DOUBLE
    graph.remove(found.steps[0])
    made = graph.node(operator, inputs, [output.name + "_float" if double else output], name=name or None, **attributes)
    if double:
        set_type(made.outputs[0], TensorProto.FLOAT, output.dims)
        graph.node("Cast", [made.outputs[0]], [output], to=TensorProto.DOUBLE)
