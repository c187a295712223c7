"""Level the channels of a tensor, exactly in float: cross-layer equalisation (Nagel et al. 2019), through residual streams too.

    W2 f(W1 x + b1)  =  (W2 diag(s)) f(diag(1/s) W1 x + b1 / s),      f positively homogeneous: Relu, pools, Concat, ...

One scale for a whole tensor leaves little of 8 bits to channels much smaller than the largest. All tensors that Adds, Concats and
pools tie together (`_streams`) change by one vector s; outputs of the Convs that start the stream are divided by it, inputs of
the Convs and Gemms that end it multiplied. A depthwise Conv ends one stream and starts another.

1. s[k] = spread[k]^a * weight[k]^-(1 - a), its geometric mean 1: spread is the largest extreme of channel k in the quantised
   tensors, each relative to its tensor's, weight that of what the sinks read it with. `strengths` are the a tried.
2. Streams without Relu whose sinks do not pad are centred as well (`centre`): each source's bias moves the middles of its
   channels' ranges to zero, and the sinks' biases take that back. One zero point a tensor cannot do this.

Which of them, if any, is decided for each stream by the measured error of the sinks' outputs (`_stream_trial`).

It must not fire where a Clip bounds the channels (Relu6 is not homogeneous), where they are read by anything else, or are an
output of the graph, on excluded nodes, on synthetic data, with effort `fast`, or where the gain is below `least_gain_db`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Graph, Node
from qcompile.passes._balance import balance
from qcompile.passes._linear import Linear, bias_of, input_shift, linear_at, scaled, scaled_inputs, weight_of, write
from qcompile.passes._stream_trial import Change, Extremes, StreamTrial, moved_extremes, scaled_constant
from qcompile.passes._streams import ChannelStream, channel_streams
from qcompile.placement import place
from qcompile.rewrite import Close, Promise, Report
from qcompile.walk import Stream


@dataclass(frozen=True)
class Equalise:
    """Scales, and shifts, of the channels of each stream; strengths are tried in order, none of them wins ties.

    strengths: the exponents a. centre: whether ranges may be moved. samples: how many, at most, the error is measured on.
    """

    strengths: tuple[float, ...] = (0.5, 0.75, 1.0)
    centre: bool = True
    samples: int = 12
    least_gain_db: float = 1.0
    name: str = "equalise"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a stream. `context.observers` follow; a stream is judged once."""
        report = Report()
        if not context.measures or any(n.op == "QuantizeLinear" for n in graph.nodes):
            return report
        graph.infer_shapes()
        linears = set(place(graph, context.settings).linears)
        excluded = frozenset(n for n in graph.nodes if context.settings.excluded(n.name))
        streams = []
        for stream in channel_streams(graph, excluded):
            quantised = [t for t in stream.channels if t.name in context.observers]
            if any(context.observers[t.name].levelled for t in quantised):
                continue
            reason = stream.refusal or _refusal(stream, context, linears)
            if reason:
                report.refuse(next(iter(stream.sources)).label, reason)
            else:
                streams.append(stream)
        chosen: list[tuple[ChannelStream, Change, float]] = []
        for trial in _trials(graph, context, streams, self.samples):
            if context.progress is not None:
                context.progress("equalising")
            for tensor in trial.classes:
                context.observers[tensor.name].levelled = True
            found = self._choose(trial)
            if found is None:
                report.refuse(next(iter(trial.stream.sources)).label, "no gain on the samples")
            else:
                chosen.append((trial.stream, *found))
        for stream, change, factor in chosen:
            _rewrite(graph, stream, change)
            _carry(context, stream, change, factor)
            report.rewrites += 1
        graph.cleanup()
        return report

    def _choose(self, trial: StreamTrial) -> tuple[Change, float] | None:
        """The change with the least error, and the part of the ranges it was measured with; None where none gains enough."""
        limit, _ = trial.error(trial.unchanged)
        best, least = None, limit * 10 ** (-self.least_gain_db / 10)
        for centred in (False, True) if self.centre and trial.shifts else (False,):
            for strength in (None, *self.strengths) if centred else self.strengths:
                error, factor = trial.error(change_of(trial, trial.extremes, strength, centred))
                if error < least:
                    best, least = (strength, centred, factor), error
        return None if best is None else (change_of(trial, trial.calibrated, *best[:2]), best[2])


def change_of(trial: StreamTrial, extremes: Extremes, strength: float | None, centred: bool) -> Change:
    """Scales of `strength` (None: 1), of the channels as they are or centred; all from `extremes`."""
    none = trial.unchanged
    shift = centring(trial, extremes) if centred else none.shift
    return Change(none.scale if strength is None else stream_scale(trial, extremes, shift, strength), shift)


def stream_scale(trial: StreamTrial, extremes: Extremes, shift: Array, strength: float) -> Array:
    """s [channels] float64, its geometric mean 1; channels that are dead or read by nothing keep 1."""
    stream = trial.stream
    spread, weight = np.zeros(stream.size), np.zeros(stream.size)
    for tensor in trial.classes:
        lows, highs = moved_extremes(extremes, tensor, stream, Change(np.ones(stream.size), shift), trial.shifts)
        extreme = np.maximum(np.abs(lows), np.abs(highs)).astype(np.float64)
        np.maximum.at(spread, stream.channels[tensor], extreme / max(float(extreme.max()), 1e-30))
    for node, numbers in stream.sinks.items():
        size = input_extremes(node, numbers.size)
        np.maximum.at(weight, numbers, size / max(float(size.max()), 1e-30))
    return balance(spread, weight, strength)


def input_extremes(node: Node, width: int) -> Array:
    """The largest |w| that each input channel or column is read with, [width] float64."""
    const = node.constant(1)
    assert const is not None
    weight = np.abs(const.array().astype(np.float64))
    if node.op == "Gemm":
        return np.asarray(weight.max(axis=0 if node.attr("transB", 0) else 1))
    groups = int(node.attr("group", 1))  # [M, C/g, k...]
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return np.asarray(split.max(axis=(1, 3)).reshape(width))


def centring(trial: StreamTrial, extremes: Extremes) -> Array:
    """Shifts [sources, channels] that bring the middles of all quantised tensors' ranges as near to zero as can be.

    Least squares over the tensors, each relative to its range: a sum moves by the sum of what its terms move by.
    """
    stream, none = trial.stream, trial.unchanged
    rows: list[Array] = []
    middles: list[Array] = []
    for tensor in trial.classes:
        lows, highs = moved_extremes(extremes, tensor, stream, none, trial.shifts)
        size = max(float((highs - lows).max()), 1e-30)
        middle = np.zeros(stream.size)
        middle[stream.channels[tensor]] = (lows + highs) / 2 / size
        rows.append(trial.shifts[tensor] / size)
        middles.append(middle)
    return np.asarray(np.linalg.lstsq(np.stack(rows), np.stack(middles), rcond=None)[0])


def _refusal(stream: ChannelStream, context: Context, linears: set[Node]) -> str:
    if not any(n in linears for n in stream.sinks):
        return "nothing quantised reads its channels"
    observers = [(context.observers[t.name], c) for t, c in stream.channels.items() if t.name in context.observers]
    if not observers or any(o.lows is None or o.lows.size != c.size for o, c in observers):
        return "no extremes of each channel were kept"
    return ""


def _trials(graph: Graph, context: Context, streams: list[ChannelStream], judged: int) -> Iterator[StreamTrial]:
    """One trial a stream, as soon as the walk has passed its last source; samples are held no longer than that."""
    waiting = {node: stream for stream in streams for node in stream.sources}
    held: dict[Node, list[Array]] = {}
    walk = Stream(graph, context.samples)
    for node in [n for n in graph.nodes if n in waiting]:
        held[node] = walk.values(node.outputs[0])
        stream = waiting[node]
        if all(n in held for n in stream.sources):
            yield StreamTrial(stream, graph, context, [held.pop(n) for n in stream.sources], judged)


def _rewrite(graph: Graph, stream: ChannelStream, change: Change) -> None:
    """Write the change into weights and biases. A Conv may be the sink of one stream and the source of another."""
    shifts = stream.shifts() or {}
    for node, numbers in stream.sinks.items():
        linear = linear_at(graph, node.outputs[0])
        assert linear is not None
        weight = weight_of(linear)
        shift = change.shift_of(next((c for t, c in shifts.items() if t is node.inputs[0]), None), numbers)
        bias = _bias(linear, shift)
        moved = None if bias is None else bias + input_shift(node, weight, shift)
        write(graph, linear, scaled_inputs(node, weight, change.scale[numbers]), moved)
    for node, numbers in stream.sources.items():
        linear = linear_at(graph, node.outputs[0])
        assert linear is not None
        shift, factor = change.shift_of(shifts.get(node.outputs[0]), numbers), 1 / change.scale[numbers]
        bias = _bias(linear, shift)
        write(graph, linear, scaled(linear, weight_of(linear), factor), None if bias is None else (bias - shift) * factor)
    for (node, index), numbers in stream.constants.items():
        old = node.constant(index)
        assert old is not None
        node.inputs[index] = graph.constant(old.name, scaled_constant(old, numbers.size, 1 / change.scale[numbers]))


def _bias(linear: Linear, shift: Array) -> Array | None:
    """The bias, where there is one or a shift needs it."""
    return bias_of(linear) if linear.node.input(2) is not None or np.any(shift) else None


def _carry(context: Context, stream: ChannelStream, change: Change, factor: float) -> None:
    """Let the statistics follow; `factor` of each range is kept, which no later search on the same samples could judge."""
    shifts = stream.shifts() or {}
    for tensor, numbers in stream.channels.items():
        observer = context.observers.get(tensor.name)
        if observer is not None:
            inverse = (1 / change.scale[numbers]).astype(np.float32)
            moved = observer.rescaled(inverse, change.shift_of(shifts.get(tensor), numbers).astype(np.float32))
            moved.low, moved.high, moved.fixed = moved.low * factor, moved.high * factor, True
            context.observers[tensor.name] = moved
