"""Ranges by least squared error of what is computed from them: each reader is run on the error itself.

A narrower range rounds finer and clips more. The squared error of a reader's output (Conv, Gemm, Add, pool: all linear) splits
into  R * (step / step_0)^2  for rounding, measured once at the full range, and the clipping errors of the two ends,
measured by sending  clip(x) - x  through the reader. Measuring at the output matters: clipping errors share one sign, so that
the taps of a depthwise kernel add them up, and a transformer's outlier channels are read by large weights. Their mean is left out
where bias correction will remove it. The tensor's own squared error misses all that: it cost mobilenet_v1 14 dB.

Inputs of the model hold few distinct values, evenly spaced (pixels), and their rounding does not follow the step squared: pixels
scaled to [-1, 1] all lie half-way between two steps of their exact range, the worst place there is. Their ranges are
measured slightly wider as well (`WIDENINGS`), and where one of those rounds far better it is what is narrowed.

With fewer than 8 bits rounding does not follow the step squared either (most values may lie within one step of 0): it is then
measured with both ends shrunk by each factor, on what is left inside, and taken between those where the ends differ.

What a function reads in 8 bits (GELU as a table) is judged by the output of the linear operator behind the function: rounded and
clipped values go through both, and what comes out is compared with what the exact values give.

Starts from the exact extremes of the whole calibration; `ranges` other than `mse` and effort `fast` leave it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.context import Context
from qcompile.graph import Graph, Node, Value
from qcompile.kernel_operands import TABULATED
from qcompile.passes._match import is_op
from qcompile.plan import Plan, ScaleClass
from qcompile.qparams import ActivationType, activation_params
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.runtime import Session
from qcompile.sessions import segment_session
from qcompile.walk import Stream

Array = npt.NDArray[Any]

FACTORS = (1.0, 0.95, 0.9, 0.82, 0.74, 0.66, 0.55, 0.4)
NARROW_FACTORS = (*FACTORS, 0.3, 0.22, 0.16, 0.12)  # with fewer than 8 bits: the coarser the steps, the more clipping pays
WIDENINGS = (1.0, 1.001, 1.002, 1.004, 1.008, 1.016)  # of the range of an input of the model
_FAR_BETTER = 0.7  # of the exact range's rounding error
_READERS = ("Conv", "Gemm", "Add", "GlobalAveragePool")
_HOPELESS = 4.0  # clipping that costs this many times the rounding is not followed further


@dataclass
class _Errors:
    """Relative squared errors of one class's readers, summed: rounding for each widening, clipping by factor at each end.

    inner: with fewer than 8 bits, rounding by the factor of both ends.
    """

    widenings: tuple[float, ...]
    factors: tuple[float, ...] = FACTORS
    rounding: Array = field(init=False)
    low: Array = field(init=False)
    high: Array = field(init=False)
    inner: Array = field(init=False)

    def __post_init__(self) -> None:
        self.rounding = np.zeros(len(self.widenings))
        self.low, self.high, self.inner = (np.zeros(len(self.factors)) for _ in range(3))


@dataclass(frozen=True)
class SearchRanges:
    """Move the ranges of `context.plan` where the readers' output error falls; at most `samples` feeds are used."""

    samples: int = 64
    name: str = "search_ranges"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a range that moved. Runs once."""
        report = Report()
        plan, original, settings = context.plan, context.float_graph, context.settings
        if plan is None or original is None or plan.searched or settings.ranges != "mse" or settings.effort == "fast":
            return report
        plan.searched = True
        decided_by = _decided_by(plan, original)
        if decided_by not in context.ranges:
            errors = _measure(plan, original, context, self.samples)
            context.ranges[decided_by] = [_best(p, errors[p]) if p in errors else (p.low, p.high) for p in plan.classes]
        for place, (low, high) in zip(plan.classes, context.ranges[decided_by], strict=True):
            if (low, high) == (place.low, place.high):
                continue
            place.low, place.high = low, high
            place.scale, place.zero_point = activation_params(low, high, place.kind(context.activations))
            assert place.scale_const is not None and place.zero_const is not None
            place.scale_const.assign(np.asarray(place.scale, np.float32))
            place.zero_const.assign(np.asarray(place.zero_point, context.activations.dtype))
            report.rewrites += 1
        return report


def ranges_at(
    original: Graph, context: Context, places: Sequence[ScaleClass], bits: int
) -> dict[ScaleClass, tuple[float, float]]:
    """The range that each of `places` would get with `bits`; its own where none is searched. The plan stays as it is."""
    plan, settings = context.plan, context.settings
    assert plan is not None
    if settings.ranges != "mse" or settings.effort == "fast":
        return {p: (p.low, p.high) for p in places}
    before = {p: p.bits for p in places}
    for place in places:
        place.bits = bits
    try:
        errors = _measure(plan, original, context, SearchRanges.samples, set(places))
        return {p: _best(p, errors[p]) if p in errors else (p.low, p.high) for p in places}
    finally:
        for place, width in before.items():
            place.bits = width


def _decided_by(plan: Plan, original: Graph) -> object:
    """What the ranges of one model on one set of samples follow from: a compilation that differs elsewhere may take them over."""
    classes = tuple((place.low, place.high, place.bits, *place.tensors) for place in plan.classes)
    nodes = [*(s.node for s in plan.linears), *(s.node for s in plan.adds), *(s.node for s in plan.pools)]
    return classes, tuple(n.name for n in nodes), tuple((n.name, n.op) for n in original.nodes)


def _measure(
    plan: Plan, original: Graph, context: Context, samples: int, only: set[ScaleClass] | None = None
) -> dict[ScaleClass, _Errors]:
    """The errors of every class whose range is free; of `only` these where they are given."""
    fixed = {name for name, observer in context.observers.items() if observer.fixed}
    # Equalisation chose its ranges for 8 bits: with fewer they are where the search starts.
    free = [p for p in plan.classes if not p.given and (p.bits < 8 or fixed.isdisjoint(p.tensors))]
    classes = {name: place for place in free if only is None or place in only for name in place.tensors}
    integer = {n.name for n in [*(s.node for s in plan.linears), *(s.node for s in plan.adds), *(s.node for s in plan.pools)]}
    picked = context.samples[:: max(1, len(context.samples) // samples)][:samples]
    stream = Stream(original, picked)
    inputs = {v.name for v in original.inputs}
    errors: dict[ScaleClass, _Errors] = {}
    for node in list(original.nodes):
        behind = _path_behind(node, integer) if is_op(node, *TABULATED) else None
        if behind is None and (node.op not in _READERS or node.name not in integer):
            continue
        if context.progress is not None:
            context.progress("searching ranges")
        for index in range(2 if node.op == "Add" else 1):
            source = node.inputs[index]
            place = classes.get(source.name)
            if place is None or not isinstance(source, Value) or place.low == place.high:
                continue
            widenings = (1.0,) if inputs.isdisjoint(place.tensors) else WIDENINGS
            values = stream.values(source)
            reader = _Reader(node, values, context) if behind is None else _FunctionReader(behind, values, context)
            factors = FACTORS if place.bits == 8 else NARROW_FACTORS
            reader.add(place, errors.setdefault(place, _Errors(widenings, factors)))
    return errors


def _path_behind(node: Node, integer: set[str]) -> list[Node] | None:
    """From a function to the first integer Conv or Gemm behind it, past a factor a channel; None where there is none."""
    path = [node]
    while len(readers := path[-1].outputs[0].consumers) == 1:
        path.append(readers[0])
        if readers[0].op in ("Conv", "Gemm") and readers[0].name in integer:
            return path
        if not is_op(readers[0], "Mul", "Reshape", "Identity") or sum(isinstance(t, Value) for t in readers[0].inputs) != 1:
            return None
    return None


class _Reader:
    """One linear reader and the values it reads."""

    def __init__(self, node: Node, values: list[Array], context: Context) -> None:
        self.node = node
        self.values = values
        self.kind = context.activations
        self.centred = context.settings.bias_correction and node.op in ("Conv", "Gemm")
        self._prepare()
        self.signal = max(self._energy(self._exact()), 1e-30)

    def _prepare(self) -> None:
        self.session = _bare_session(self.node)

    def _exact(self) -> Iterable[Array]:
        return self._outputs(self.values)

    def add(self, place: ScaleClass, errors: _Errors) -> None:
        """Add this reader's relative errors to its class's."""
        kind = place.kind(self.kind)
        rounding = [self._cost(self._rounded(place.low * w, place.high * w, kind)) for w in errors.widenings]
        errors.rounding += rounding
        if place.bits < 8:
            errors.inner += [self._cost(self._rounded_inside(place, factor, kind)) for factor in errors.factors]
        for end, table in ((place.low, errors.low), (place.high, errors.high)):
            if end == 0.0:
                continue
            known = self._clipping(end)  # where a function is flat: part of `rounding`
            for index, factor in enumerate(errors.factors[1:], 1):
                cost = max(self._clipping(end * factor) - known, 0.0)
                table[index] += cost
                if cost > _HOPELESS * rounding[0]:
                    table[index + 1 :] = np.inf
                    break

    def _clipping(self, end: float) -> float:
        edge = np.float32(end)
        clipped = [(np.minimum(x, edge) if end > 0 else np.maximum(x, edge)) - x for x in self.values]
        return self._cost(clipped) if any(c.any() for c in clipped) else 0.0

    def _rounded(self, low: float, high: float, kind: ActivationType) -> list[Array]:
        """The error of each value where the range is [low, high] in the integers of `kind`."""
        scale, zero = activation_params(low, high, kind)
        step, ends = float(scale), (kind.low, kind.high)
        return [((np.clip(np.rint(x / step) + zero, *ends) - zero) * step - x).astype(np.float32) for x in self.values]

    def _rounded_inside(self, place: ScaleClass, factor: float, kind: ActivationType) -> list[Array]:
        """The error that rounding adds to clipping where both ends of the range are shrunk by `factor`."""
        low, high = place.low * factor, place.high * factor
        clipped = [np.clip(x, np.float32(low), np.float32(high)) - x for x in self.values]
        return [a - b for a, b in zip(self._rounded(low, high, kind), clipped, strict=True)]

    def _cost(self, errors: list[Array]) -> float:
        """The energy of what `errors` of the values change, relative to the reader's output."""
        return self._energy(self._outputs(errors)) / self.signal

    def _outputs(self, errors: list[Array]) -> Iterator[Array]:
        """What the reader makes of each sample's errors."""
        for x in errors:
            yield x if self.session is None else self.session.run({"x": np.ascontiguousarray(x, np.float32)})["y"]

    def _energy(self, outputs: Iterable[Array]) -> float:
        """Sum of squares, per-channel mean removed where bias correction removes it."""
        total, mean, count = 0.0, np.zeros(1), 0
        for y in outputs:
            y = y.astype(np.float64)
            total += float(np.square(y).sum())
            if self.centred:
                axes = (0, *range(2, y.ndim))
                mean = mean + y.sum(axis=axes)
                count += y.size // y.shape[1]
        return max(total - float((mean * mean).sum()) / count, 0.0) if self.centred else total


class _FunctionReader(_Reader):
    """A function with the linear operator behind it (`path`); what an error changes there is no sum of outputs."""

    def __init__(self, path: list[Node], values: list[Array], context: Context) -> None:
        self.path = path
        super().__init__(path[-1], values, context)

    def _prepare(self) -> None:
        source, result = self.path[0].inputs[0], self.path[-1].outputs[0]
        assert isinstance(source, Value)
        self.names = source.name, result.name
        self.whole = segment_session(None, self.path, [(source, np.dtype(np.float32))], [result])
        self.exact = [self._run(x) for x in self.values]

    def _run(self, x: Array) -> Array:
        return self.whole.run({self.names[0]: np.ascontiguousarray(x, np.float32)})[self.names[1]]

    def _exact(self) -> Iterable[Array]:
        return self.exact

    def _outputs(self, errors: list[Array]) -> Iterator[Array]:
        for x, error, exact in zip(self.values, errors, self.exact, strict=True):
            yield self._run(x + error) - exact


def _bare_session(node: Node) -> Session | None:
    """A session of the reader without its bias; None for Add, which passes errors on as they are."""
    if node.op == "Add":
        return None
    source, result = Value("x"), Value("y")
    constants = list(node.inputs[1:2])
    copy = Node(node.op, "reader", [source, *constants], [result], attrs=dict(node.attrs))
    try:
        return segment_session(None, [copy], [(source, np.dtype(np.float32))], [result])
    finally:
        copy.inputs.clear()  # the weight must not remember this copy as a consumer


def _best(place: ScaleClass, errors: _Errors) -> tuple[float, float]:
    """The pair of ends with the least total error."""
    factors, wider = np.asarray(errors.factors), int(np.argmin(errors.rounding))
    if errors.rounding[wider] > _FAR_BETTER * errors.rounding[0]:
        wider = 0
    lows, highs = place.low * factors, place.high * factors
    step = (highs[None, :] - lows[:, None]) / (place.high - place.low)
    rounding = errors.rounding[wider] * step**2 if place.bits == 8 else np.interp(step, factors[::-1], errors.inner[::-1])
    total = rounding + errors.low[:, None] + errors.high[None, :]
    i, j = np.unravel_index(int(np.argmin(total)), total.shape)
    return float(lows[i] * errors.widenings[wider]), float(highs[j] * errors.widenings[wider])
