"""What the readers of a stream lose when its tensors are held in 8 bits and their weights in few: measured by running it.

A session runs the nodes of the stream, its sinks and their activations, with rounding where a tensor is quantised. Scales,
weights and constants are inputs, so that all candidates share it; errors are relative to the variance of the sinks' outputs.

Ranges come from one half of the samples, errors from the other. Levelled channels all come near the ends of the range, so that
values beyond what calibration saw are clipped in all of them, which cannot be seen on the samples that gave the extremes: a = .75
with .8 of the range promised mobilenet_v2's last stream 1.8 dB there, and cost it 8 dB on held-out photos.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._linear import input_shift, scaled_inputs
from qcompile.passes._match import single_consumer
from qcompile.passes._streams import ChannelStream
from qcompile.placement import clip_bounds, shares_scale
from qcompile.qparams import activation_params
from qcompile.runtime import Session
from qcompile.sessions import segment_session

Extremes: TypeAlias = dict[Value, tuple[Array, Array]]  # (lows, highs) of each channel of a quantised tensor
_WEIGHT_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a weight channel's extreme, tried below 8 bits
_RANGE_FACTORS = (1.0, 0.9, 0.8, 0.7)  # of the tensors' ranges, tried in turn while the error falls


@dataclass(frozen=True)
class Change:
    """y = (x - shift) / scale: scale [channels of the stream] > 0; shift [sources, channels], in the units of x."""

    scale: Array
    shift: Array

    def shift_of(self, coefficients: Array | None, numbers: Array) -> Array:
        """How far each place of a tensor moves; `coefficients` are those of `ChannelStream.shifts`, `numbers` its channels."""
        return np.zeros(numbers.size) if coefficients is None else (coefficients @ self.shift)[numbers]


class StreamTrial:
    """A stream with samples of its sources' outputs (one list a source); errors of any change of its channels.

    extremes: of each quantised tensor on every second sample; errors are measured on at most `judged` of the others.
    """

    def __init__(self, stream: ChannelStream, graph: Graph, context: Context, samples: list[list[Array]], judged: int) -> None:
        self.stream = stream
        self.context = context
        self.shifts = stream.shifts() or {}
        self.classes = scale_classes(stream, context)
        self.extremes: Extremes = {}
        self._samples = samples
        self._weights = [weight.array().astype(np.float64) for n in stream.sinks if (weight := n.constant(1)) is not None]
        self._constants = [(f"c{stream.nodes.index(n)}_{i}", c, numbers) for n, i, c, numbers in _constants(stream)]
        count = len(samples[0])
        others = range(1, count, 2) if count > 1 else range(1)
        picked = others[:: -(-len(others) // judged)]
        exact, self._ends, watched = self._session(graph, rounded=False)
        self._rounded, _, _ = self._session(graph, rounded=True)
        self._wanted: dict[int, dict[str, Array]] = {}
        kept = sorted({*range(0, count, 2), *picked})
        for position, feed in zip(kept, self._feeds(self.unchanged, kept, None), strict=True):
            values = {**feed, **exact.run(feed)}
            if position in picked:
                self._wanted[position] = {name: values[name] for name in self._ends}
            if position % 2 == 0:
                for tensor, name in watched.items():
                    self.extremes[tensor] = _widened(self.extremes.get(tensor), values[name])

    @property
    def unchanged(self) -> Change:
        """The change that does nothing."""
        return Change(np.ones(self.stream.size), np.zeros((len(self.stream.sources), self.stream.size)))

    @property
    def calibrated(self) -> Extremes:
        """The extremes of the whole calibration."""
        observers = {t: self.context.observers[t.name] for t in self.classes}
        return {t: (o.lows, o.highs) for t, o in observers.items() if o.lows is not None and o.highs is not None}

    def error(self, change: Change) -> tuple[float, float]:
        """(squared error of each sink's output over its variance, summed over the sinks; part of the ranges that gave it)."""
        searched = self.context.settings.ranges == "mse"
        least, best = np.inf, 1.0
        for factor in _RANGE_FACTORS if searched else (1.0,):
            error = self._error_with(change, factor)
            if error >= least:
                break
            least, best = error, factor
        return float(least), best

    def _error_with(self, change: Change, factor: float) -> float:
        totals = {name: _Moments() for name in self._ends}
        for wanted, feed in zip(self._wanted.values(), self._feeds(change, self._wanted, factor), strict=True):
            got = self._rounded.run(feed)
            for name, moments in totals.items():
                moments.add(wanted[name], got[name])
        return sum(m.ratio(self.context.settings.bias_correction) for m in totals.values())

    def _feeds(self, change: Change, positions: Iterable[int], factor: float | None) -> Iterator[dict[str, Array]]:
        """Inputs of the sessions: rounded weights and scales with `factor` of the ranges, or with None the float ones."""
        common: dict[str, Array] = {}
        for index, (weight, (node, numbers)) in enumerate(zip(self._weights, self.stream.sinks.items(), strict=True)):
            moved = scaled_inputs(node, weight, change.scale[numbers])
            rounded = moved if factor is None else _round_weight(node, moved, self.context.settings.weight_top)
            common[f"w{index}"] = rounded.astype(np.float32)
            bias = node.constant(2)
            if bias is not None:
                coefficients = self.shifts.get(node.inputs[0]) if isinstance(node.inputs[0], Value) else None
                shift = change.shift_of(coefficients, numbers)
                common[f"b{index}"] = (bias.array() + input_shift(node, weight, shift)).astype(np.float32)
        for name, constant, numbers in self._constants:
            common[name] = scaled_constant(constant, numbers.size, 1 / change.scale[numbers])
        if factor is not None:
            common |= self._scales(change, factor)
        for position in positions:
            feed = dict(common)
            for index, (node, numbers) in enumerate(self.stream.sources.items()):
                x = self._samples[index][position]
                along = [-1 if i == 1 else 1 for i in range(x.ndim)]
                shift = change.shift_of(self.shifts.get(node.outputs[0]), numbers).astype(np.float32)
                feed[f"x{index}"] = (x - shift.reshape(along)) * (1 / change.scale[numbers]).astype(np.float32).reshape(along)
            yield feed

    def _scales(self, change: Change, factor: float) -> dict[str, Array]:
        """Step and bounds of each scale class under `change`, for `factor` of its range."""
        kind = self.context.activations.narrowed(self.context.settings.activation_bits)
        ranges: dict[int, tuple[float, float]] = {}
        for tensor, index in self.classes.items():
            lows, highs = moved_extremes(self.extremes, tensor, self.stream, change, self.shifts)
            low, high = ranges.get(index, (0.0, 0.0))
            ranges[index] = min(low, float(lows.min())), max(high, float(highs.max()))
        given: dict[str, Array] = {}
        for index, (low, high) in ranges.items():
            step, zero = activation_params(low * factor, high * factor, kind)
            given[f"step{index}"] = np.asarray(step, np.float32)
            given[f"low{index}"] = np.asarray(kind.low - zero, np.float32)
            given[f"high{index}"] = np.asarray(kind.high - zero, np.float32)
        return given

    def _session(self, graph: Graph, rounded: bool) -> tuple[Session, list[str], dict[Value, str]]:
        """A session, the names of the sinks' outputs, and those of the quantised tensors before rounding."""
        stream = self.stream
        inputs: dict[str, Value] = {}
        nodes: list[Node] = []
        values: dict[Tensor, Value] = {}
        watched: dict[Value, Value] = {}

        def given(name: str) -> Value:
            return inputs.setdefault(name, Value(name))

        def add(op: str, operands: list[Tensor], name: str, like: Node | None = None) -> Value:
            nodes.append(Node(op, f"make_{name}", operands, [Value(name)], attrs=dict(like.attrs) if like is not None else None))
            return nodes[-1].outputs[0]

        def hold(tensor: Value, value: Value) -> None:
            values[tensor] = value
            if tensor not in self.classes:
                return
            watched[tensor] = value
            if rounded:
                index = self.classes[tensor]
                step = given(f"step{index}")
                whole = add("Round", [add("Div", [value, step], f"{value.name}_steps")], f"{value.name}_whole")
                kept = add("Clip", [whole, given(f"low{index}"), given(f"high{index}")], f"{value.name}_kept")
                values[tensor] = add("Mul", [kept, step], f"{value.name}_rounded")

        for index, node in enumerate(stream.sources):
            hold(node.outputs[0], given(f"x{index}"))
        for index, node in enumerate(stream.nodes):
            operands = [
                given(f"c{index}_{i}") if (node, i) in stream.constants else values.get(t, t) for i, t in enumerate(node.inputs)
            ]
            hold(node.outputs[0], add(node.op, operands, f"n{index}", node))
        ends: list[Value] = []
        for index, node in enumerate(stream.sinks):
            bias = [given(f"b{index}")] if node.input(2) is not None else []
            ends.append(add(node.op, [values[node.inputs[0]], given(f"w{index}"), *bias], f"y{index}", node))
            follower = single_consumer(graph, node.outputs[0])
            if follower is not None and clip_bounds(follower) is not None:  # what a Relu cuts off is no error
                ends[-1] = add(follower.op, [ends[-1], *follower.inputs[1:]], f"a{index}", follower)
        extra = [] if rounded else [v for v in watched.values() if v.name not in inputs]
        try:
            session = segment_session(graph, nodes, [(v, np.dtype(np.float32)) for v in inputs.values()], [*ends, *extra])
        finally:
            for node in nodes:
                node.inputs.clear()  # constants must not remember these copies as consumers
        return session, [v.name for v in ends], {t: v.name for t, v in watched.items()}


class _Moments:
    """Sums over samples that give an error relative to the variance of what was wanted; channels in axis 1."""

    def __init__(self) -> None:
        self.count = 0
        self.error, self.wanted = np.zeros((2, 1)), np.zeros((2, 1))  # sums and sums of squares a channel

    def add(self, wanted: Array, got: Array) -> None:
        """One sample, [N, C, ...] each."""
        axes = (0, *range(2, wanted.ndim))
        difference = got - wanted
        self.error = self.error + np.stack([_sum(difference, axes), _sum(np.square(difference), axes)])
        self.wanted = self.wanted + np.stack([_sum(wanted, axes), _sum(np.square(wanted), axes)])
        self.count += wanted.size // wanted.shape[1]

    def ratio(self, centred: bool) -> float:
        """The error's squares over the wanted output's variance, without its mean where bias correction removes that."""
        error = self.error[1] - np.square(self.error[0]) / self.count if centred else self.error[1]
        variance = self.wanted[1] - np.square(self.wanted[0]) / self.count
        return float(max(error.sum(), 0.0) / max(variance.sum(), 1e-30))


def _sum(values: Array, axes: tuple[int, ...]) -> Array:
    return np.asarray(values.sum(axis=axes, dtype=np.float64))


def _widened(known: tuple[Array, Array] | None, values: Array) -> tuple[Array, Array]:
    axes = (0, *range(2, values.ndim))
    lows, highs = values.min(axis=axes), values.max(axis=axes)
    return (lows, highs) if known is None else (np.minimum(known[0], lows), np.maximum(known[1], highs))


def moved_extremes(
    extremes: Extremes, tensor: Value, stream: ChannelStream, change: Change, shifts: dict[Value, Array]
) -> tuple[Array, Array]:
    """(lows, highs) of each channel of a quantised tensor after `change`."""
    (lows, highs), numbers = extremes[tensor], stream.channels[tensor]
    shift, scale = change.shift_of(shifts.get(tensor), numbers), change.scale[numbers]
    return (lows - shift) / scale, (highs - shift) / scale


def scale_classes(stream: ChannelStream, context: Context) -> dict[Value, int]:
    """The quantised tensors of a stream whose values decide a scale, each with the number of the scale that it shares."""
    parent: dict[Tensor, Tensor] = {}

    def root(tensor: Tensor) -> Tensor:
        while tensor in parent:
            tensor = parent[tensor]
        return tensor

    for node in stream.nodes:
        for tensor in node.inputs if shares_scale(node) else []:
            if tensor in stream.channels and root(tensor) is not root(node.outputs[0]):
                parent[root(tensor)] = root(node.outputs[0])
    numbers: dict[Tensor, int] = {}
    return {t: numbers.setdefault(root(t), len(numbers)) for t in stream.channels if t.name in context.observers}


def scaled_constant(constant: Const, width: int, factor: Array) -> Array:
    """A constant operand of Add or Sub, one number a channel, multiplied by `factor` [width]; its shape and type are kept."""
    values = constant.array()
    return np.asarray((values.reshape(width) * factor).reshape(values.shape), values.dtype)


def _constants(stream: ChannelStream) -> Iterator[tuple[Node, int, Const, Array]]:
    for (node, index), numbers in stream.constants.items():
        constant = node.constant(index)
        assert constant is not None
        yield node, index, constant, numbers


def _round_weight(node: Node, weight: Array, top: int) -> Array:
    """Rounded to integers within +-top, one scale an output channel; below 8 bits the best of a few clipped ranges."""
    axis = 1 if node.op == "Gemm" and not node.attr("transB", 0) else 0
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    peak = np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0.0), 1e-30)
    best, least = rows, np.full(peak.shape, np.inf)
    for factor in _WEIGHT_FACTORS if top < 127 else (1.0,):
        step = peak * factor / top
        rounded = np.clip(np.rint(rows / step), -top, top) * step
        error = np.square(rounded - rows).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, rounded, best), np.minimum(error, least)
    return np.moveaxis(best.reshape(weight.shape[axis], *np.delete(weight.shape, axis)), 0, axis)
