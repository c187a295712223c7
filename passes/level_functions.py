"""A range a channel for what functions read in 8 bits: x -> (x - middle) / width, undone in front of the function.

    GELU(x),  x = W u + b     becomes     GELU(x' * width + middle),  x' = (W u + b - middle) / width

A few channels of a transformer reach 24 in front of GELU, the others 3: with one scale most of them use 60 of its 256 steps.
`ChannelTable` computes the right-hand side as one look-up, so the ranges cost nothing. Exact in float but for rounding.

A channel's range is its extremes and an eighth more, without the ends where the function is flat (`_flat_ends`), widened to half
octaves below the tensor's range: channels of one kind share a table. For the same reason what smoothing put behind the function
is rounded to eighths of an octave; the weights behind it make up for that.

It must not fire where the result of the linear node is read by anything else, on ranges that a user gave, on synthetic data, with
effort `fast`, for `--kernels ibert`, or where the channels' ranges are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Graph, Node, Value
from qcompile.kernel_operands import TABULATED, kernel_operands
from qcompile.levelled import channel_factors, levelled
from qcompile.passes._flat_ends import bent_range
from qcompile.passes._linear import Linear, bias_of, linear_at, scaled, scaled_inputs, weight_of, write
from qcompile.passes._match import is_op, set_type
from qcompile.placement import place
from qcompile.rewrite import Close, Promise, Report

_HEADROOM = 0.125  # of a channel's width, at both ends: held-out values pass one channel's extremes far sooner than a tensor's
_OCTAVES = 4  # below the tensor's range, in halves
_STEPS = 8  # of an octave, that factors behind the function are rounded to: 4 % at most, more costs accuracy
_HIGHEST = 127 / 128  # x' lies in [-1, 127/128]: the steps are 1/128, the zero point 128


@dataclass(frozen=True)
class LevelFunctions:
    """Gives each channel in front of a function its own range.

    most_alike: the mean square of the channels' widths, relative to the widest, from which on nothing is done.
    """

    most_alike: float = 0.7
    name: str = "level_functions"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a function. `context.observers` follow."""
        report, settings = Report(), context.settings
        if not context.measures or settings.kernels != "table" or any(n.op == "QuantizeLinear" for n in graph.nodes):
            return report
        graph.infer_shapes()
        linears = set(place(graph, settings).linears)
        for node, _ in list(kernel_operands(graph, settings)):
            if not is_op(node, *TABULATED) or levelled(graph, node) is not None:
                continue
            linear = linear_at(graph, node.inputs[0])
            reason = _refusal(graph, context, node, linear, linears)
            if reason or linear is None:
                report.refuse(node.label, reason)
                continue
            observer = context.observers[node.inputs[0].name]
            assert observer.lows is not None and observer.highs is not None
            lows, highs = channel_ranges(node, observer.lows.astype(np.float64), observer.highs.astype(np.float64))
            widths = highs - lows
            if not 0 < float(np.square(widths / widths.max()).mean()) <= self.most_alike:
                report.refuse(node.label, "the ranges of its channels are alike")
                continue
            _level(graph, context, node, linear, lows, highs)
            _round_factors(graph, context, node, linears)
            report.rewrites += 1
        if report.rewrites:
            graph.sort()
        return report


def _refusal(graph: Graph, context: Context, node: Node, linear: Linear | None, linears: set[Node]) -> str:
    source = node.inputs[0]
    if linear is None or linear.node not in linears or linear.add is not None or bias_of(linear) is None:
        return "no quantised layer computes its input"
    if len(source.consumers) != 1 or graph.is_pinned(source):
        return "something else reads its input"
    if context.settings.range_for(linear.node.name) is not None:
        return "the range of its input was given"
    observer = context.observers.get(source.name)
    if observer is None or observer.lows is None or observer.lows.shape != (linear.channels,) or linear.rank is None:
        return "no extremes of each channel were kept"
    return ""


def channel_ranges(node: Node, lows: Array, highs: Array) -> tuple[Array, Array]:
    """(lows, highs) [channels] float64 of the ranges that the channels of a function's input get."""
    low, high = bent_range([node], float(lows.min()), float(highs.max()))
    room = _HEADROOM * (highs - lows)
    lows, highs = lows - room, highs + room
    # the high end first: where the function is flat below, how far depends on its span, so on the high end
    highest = _fitting(np.clip(highs, low, high), high)
    result_low, result_high = np.empty_like(highest), highest.copy()
    for top in np.unique(highest):
        those = highest == top
        bottom, inner = bent_range([node], low, float(top)) if low < top else (low, float(top))
        result_high[those] = inner
        result_low[those] = _fitting(np.clip(lows[those], bottom, inner), bottom)
    narrowest = (high - low) * 2.0**-_OCTAVES
    thin = result_high - result_low < narrowest  # a channel that hardly moves
    result_low[thin] = result_high[thin] - narrowest
    return result_low, result_high


def _fitting(ends: Array, end: float) -> Array:
    """`end`, shrunk by as many half octaves as leave each of `ends` inside; where an end lies across 0, by all."""
    if end == 0:
        return np.zeros_like(ends)
    with np.errstate(divide="ignore", invalid="ignore"):
        halves = np.floor(np.log2(end / ends) * 2)
    halves = np.where(ends / end > 0, halves, 2 * _OCTAVES)
    return np.asarray(end * 2.0 ** (-np.clip(halves, 0, 2 * _OCTAVES) / 2))


def _level(graph: Graph, context: Context, node: Node, linear: Linear, lows: Array, highs: Array) -> None:
    """x' in place of x, and Mul and Add behind it."""
    source, axis = node.inputs[0], linear.channel_axis
    assert isinstance(source, Value)
    if axis > 0:
        axis -= linear.rank or 0
    width = ((highs - lows) / (1 + _HIGHEST)).astype(np.float32)
    middle = (lows + width).astype(np.float32)
    bias = bias_of(linear)
    assert bias is not None
    factor = 1 / width.astype(np.float64)
    write(graph, linear, scaled(linear, weight_of(linear), factor), (bias - middle) * factor)
    shape = (-1, *[1] * (-axis - 1))
    graph_width = graph.constant(source.name + "_width", width.reshape(shape))
    graph_middle = graph.constant(source.name + "_middle", middle.reshape(shape))
    stretched = graph.node("Mul", [source, graph_width], [source.name + "_stretched"])
    moved = graph.node("Add", [stretched.outputs[0], graph_middle], [source.name + "_moved"])
    for made in (stretched, moved):
        set_type(made.outputs[0], source.elem_type, source.dims)
    node.inputs[0] = moved.outputs[0]
    observer = context.observers[source.name].rescaled(factor.astype(np.float32), middle)
    observer.low, observer.high, observer.fixed = -1.0, _HIGHEST, True
    context.observers[source.name] = observer


def _round_factors(graph: Graph, context: Context, node: Node, linears: set[Node]) -> None:
    """Half octaves in place of what smoothing multiplies the function's result by; the Gemms that read it make up for them."""
    output = node.outputs[0]
    product = output.consumers[0] if len(output.consumers) == 1 and not graph.is_pinned(output) else None
    found = channel_factors(graph, product) if product is not None else None
    if product is None or found is None:
        return
    readers = product.outputs[0].consumers
    ends = [linear_at(graph, reader.outputs[0]) for reader in readers if reader in linears and reader.op == "Gemm"]
    if len(ends) != len(readers) or any(end is None for end in ends):
        return
    factors = found[1]
    rounded = 2.0 ** (np.rint(_STEPS * np.log2(factors)) / _STEPS)
    for end in ends:
        assert end is not None
        bias = bias_of(end) if end.node.input(2) is not None else None
        write(graph, end, scaled_inputs(end.node, weight_of(end), factors / rounded), bias)
    index = product.inputs.index(found[0])
    old = product.constant(1 - index)
    assert old is not None
    product.inputs[1 - index] = graph.constant(old.name, rounded.astype(np.float32).reshape(old.dims))
    name = product.outputs[0].name
    if name in context.observers:
        context.observers[name] = replace(context.observers[name].rescaled((rounded / factors).astype(np.float32)))
