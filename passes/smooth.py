"""Move part of an activation's channel spread into the weights behind it, exactly in float (SmoothQuant, Xiao et al. 2023).

    x @ W  =  (x / s) @ (diag(s) W),      s[c] = max|x[c]|^a / max|W[c]|^(1 - a),  for all Gemms that read x

8 bits for the whole tensor leave little to channels a hundred times smaller than the largest; a scale for each of them costs the
weights, which have one scale an output channel, next to nothing. How much to move (a) is decided by the measured error of the
Gemms' outputs, group by group, x / s in 8 bits and s * W in 8 bits, its mean removed (bias correction takes care of that).

1 / s goes
1. into scale and bias of the LayerNormalization that computes x, where these Gemms alone read it;
2. into the output channels of the Gemm or Conv that computes x, also through Relu, heads and the product with attention weights
   (`_channels`), where nothing else reads the channels concerned;
3. else into a Mul in front of the Gemms (`insert`): x also feeds a residual Add, or comes from GELU.

It must not fire on tensors that integer nodes compute (a Mul would break the chain), on inputs of the model, on synthetic data,
with effort `fast`, on excluded nodes, or where the gain is below `least_gain_db`. Constants are never changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Array, Graph, Node, Tensor, Value
from qcompile.passes._balance import balance
from qcompile.passes._channels import Reach, Tracer, behind_moves, is_layer_norm, same_columns, source_of
from qcompile.passes._linear import bias_of, linear_at, scaled, weight_of, write
from qcompile.passes._match import set_type
from qcompile.passes.quantise import scale_sources
from qcompile.placement import Placement, place
from qcompile.qparams import ActivationType, activation_params
from qcompile.ranges import Observer
from qcompile.rewrite import Close, Promise, Report
from qcompile.walk import Stream


@dataclass(frozen=True)
class Smooth:
    """Per-channel scales moved from Gemm inputs into weights; strengths are tried in order, none of them wins ties.

    strengths: the exponents a. insert: whether a Mul may be added. rows: of x, at most, that the error is measured on.
    """

    strengths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    insert: bool = True
    rows: int = 2048
    least_gain_db: float = 0.3
    name: str = "smooth"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a group of Gemms with a common input. `context.observers` follow; a group is judged once."""
        report = Report()
        if not context.measures or any(n.op == "QuantizeLinear" for n in graph.nodes):
            return report
        graph.infer_shapes()
        placement = place(graph, context.settings)
        groups = [g for g in _groups(placement) if not _settled(g, context) and not _given(g, context)]
        plans = _Targets(graph, context, placement, self.insert).plans(groups, report)
        stream = Stream(graph, context.samples)
        chosen: list[tuple[_Group, Array]] = []
        for group in plans:
            if context.progress is not None:
                context.progress("smoothing")
            observer = context.observers[group.x.name]
            observer.settled = True
            scale = self._choose(group, observer, _rows(stream.values(group.x), self.rows), context)
            if scale is None:
                report.refuse(group.gemms[0].label, "no gain on the samples")
            else:
                chosen.append((group, scale))
        for group, scale in chosen:
            _rewrite(graph, context, group, scale)
            report.rewrites += 1
        if chosen:
            graph.cleanup()
            graph.sort()
            _check_observers(graph, context)
        return report

    def _choose(self, group: _Group, observer: Observer, rows: Array, context: Context) -> Array | None:
        """The scales [K] with the least error, float32; None where none gains enough."""
        weights = [_matrix(g) for g in group.gemms]
        wanted = [rows @ w for w in weights]
        settings, names = context.settings, [g.name for g in group.gemms]
        tops = [settings.top_for(name) for name in names]
        asked = [settings.activations_for(name) or settings.activation_bits for name in names]
        kind = context.activations.narrowed(max(asked))  # of several readers the widest decides
        plain = _error(rows, weights, wanted, observer, np.ones(rows.shape[1], np.float32), kind, tops)
        best, least = None, plain * 10 ** (-self.least_gain_db / 10)
        for strength in self.strengths:
            scale = migration_scale(observer, weights, strength)
            error = _error(rows, weights, wanted, observer, scale, kind, tops)
            if error < least:
                best, least = scale, error
        return best


def _given(group: _Group, context: Context) -> bool:
    """Whether the range of x is a user's: it then stays what it is."""
    source = group.x.producer
    return context.settings.range_for(group.x.name if source is None else source.name) is not None


@dataclass
class _Group:
    """Gemms that read x. source: what absorbs 1 / s (None: a Mul); columns: its channel at each column of x."""

    x: Value
    gemms: list[Node]
    source: Node | None = None
    columns: Array | None = None
    carried: dict[str, Array] = field(default_factory=dict)  # observed tensors on the way: their columns' channels


def migration_scale(observer: Observer, weights: list[Array], strength: float) -> Array:
    """s [K] float32 (equation 4 of Xiao et al.), its geometric mean 1; channels without activations or weights keep 1."""
    assert observer.lows is not None and observer.highs is not None
    spread = np.maximum(np.abs(observer.lows), np.abs(observer.highs)).astype(np.float64)
    weight = np.max([np.abs(w).max(axis=1) for w in weights], axis=0).astype(np.float64)
    return balance(spread, weight, strength).astype(np.float32)


def _error(
    rows: Array,
    weights: list[Array],
    wanted: list[Array],
    observer: Observer,
    scale: Array,
    kind: ActivationType,
    tops: list[int],
) -> float:
    """Squared error of the quantised products (weights within +-tops), relative to their variance, summed over the Gemms."""
    assert observer.lows is not None and observer.highs is not None
    low, high = float((observer.lows / scale).min()), float((observer.highs / scale).max())
    step, zero = activation_params(low, high, kind)
    x = (np.clip(np.rint(rows / scale / step) + zero, kind.low, kind.high) - zero) * step
    total = 0.0
    for weight, product, top in zip(weights, wanted, tops, strict=True):
        moved = weight * scale[:, None]
        grid = np.maximum(np.abs(moved).max(axis=0), np.float32(1e-30)) / np.float32(top)
        difference = x @ (np.rint(moved / grid) * grid) - product
        total += float(np.square(difference - difference.mean(axis=0)).sum(dtype=np.float64)) / max(
            float(np.square(product - product.mean(axis=0)).sum(dtype=np.float64)), 1e-30
        )
    return total


def _groups(placement: Placement) -> list[_Group]:
    """The quantised Gemms by the tensor they read, in graph order."""
    groups: dict[Tensor, _Group] = {}
    for node in placement.linears:
        x = node.inputs[0]
        if node.op == "Gemm" and isinstance(x, Value):
            groups.setdefault(x, _Group(x, [])).gemms.append(node)
    return list(groups.values())


def _settled(group: _Group, context: Context) -> bool:
    observer = context.observers.get(group.x.name)
    return observer is not None and observer.settled


class _Targets:
    """Decides for each group where 1 / s goes, or why nowhere."""

    def __init__(self, graph: Graph, context: Context, placement: Placement, insert: bool) -> None:
        self.graph = graph
        self.context = context
        self.placement = placement
        self.insert = insert

    def plans(self, groups: list[_Group], report: Report) -> list[_Group]:
        """The groups that can be smoothed, `source` and `columns` filled in; the others are refused in `report`."""
        sources = {g.x: source_of(g.x) for g in groups}
        found = [s for s in sources.values() if s is not None]
        tracer = Tracer(self.graph, found, _unlike(self.context.samples)) if found else None
        plans: list[_Group] = []
        for group in groups:
            source = sources[group.x]
            reason = "nothing homogeneous computes the input"
            if source is not None and tracer is not None:
                reason = self._absorb(group, source, tracer.reach(source))
            if reason:
                reason = self._insertion(group)
            if reason or not self._observed(group):
                report.refuse(group.gemms[0].label, reason or "no extremes of each channel were kept")
            else:
                plans.append(group)
        return plans

    def _observed(self, group: _Group) -> bool:
        observer = self.context.observers.get(group.x.name)
        if observer is None and group.source is not None:
            return False
        return observer is not None and observer.lows is not None and observer.lows.size == _width(group.gemms[0])

    def _absorb(self, group: _Group, source: Node, reaches: list[Reach]) -> str:
        """Fill in source and columns; a reason where its channels cannot take 1 / s."""
        linear = linear_at(self.graph, source.outputs[0])
        if self.context.settings.excluded(source.name) or not (is_layer_norm(source) or linear is not None):
            return "the producer is excluded or has no constant weights"
        if linear is not None and bias_of(linear) is None:
            return "the producer adds a whole matrix"
        columns = same_columns(reaches, group.x)
        if columns is None or len(set(columns.tolist())) != columns.size:
            return "the channels of the input do not stand in fixed columns"
        touched = set(columns.tolist())
        for reach in reaches:
            for node, tensor in reach.ends:
                if node in group.gemms and tensor is group.x and node.inputs.count(tensor) == 1:
                    continue
                if touched & set(np.unique(reach.labels[tensor]).tolist()):
                    return "something else reads the same channels"
        carried: dict[str, Array] = {}
        for tensor in reaches[0].labels:
            observer = self.context.observers.get(tensor.name)
            if observer is None:
                continue
            own = same_columns(reaches, tensor)
            if own is None or observer.lows is None or observer.lows.shape != own.shape:
                return "calibration of a tensor on the way cannot be carried over"
            carried[tensor.name] = own
        group.source, group.columns, group.carried = source, columns, carried
        return ""

    def _insertion(self, group: _Group) -> str:
        producer, origin = group.x.producer, behind_moves(group.x)
        if producer is None or origin.producer is None:
            return "an input of the model"
        integer = self.placement.integer | self.placement.folded | set(self.placement.linears)
        if producer in integer:
            return "the input is computed in integers"
        return "" if self.insert else "a Mul would have to be inserted"


def _unlike(samples: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """The largest sample and, where there is one of other shapes, the smallest: columns must not depend on the shape."""
    ordered = sorted(samples, key=lambda feed: sum(a.size for a in feed.values()))
    first, last = ordered[0], ordered[-1]
    same = all(first[k].shape == last[k].shape for k in last)
    return [last] if same else [last, first]


def _width(gemm: Node) -> int:
    weight = gemm.constant(1)
    assert weight is not None
    return weight.dims[1] if gemm.attr("transB", 0) else weight.dims[0]


def _matrix(gemm: Node) -> Array:
    """Its weights as [K, N] float32."""
    weight = gemm.constant(1)
    assert weight is not None
    values = weight.array().astype(np.float32)
    return values.T if gemm.attr("transB", 0) else values


def _rows(values: list[Array], most: int) -> Array:
    """[rows, K] float32: at most `most` of them, evenly spaced over all samples."""
    rows = np.concatenate([v.reshape(-1, v.shape[-1]) for v in values])
    if rows.shape[0] > most:
        rows = rows[np.linspace(0, rows.shape[0] - 1, most).astype(np.int64)]
    return rows.astype(np.float32)


def _rewrite(graph: Graph, context: Context, group: _Group, scale: Array) -> None:
    for gemm in group.gemms:
        old = gemm.constant(1)
        assert old is not None
        rows = scale.astype(np.float64) if gemm.attr("transB", 0) else scale.astype(np.float64)[:, None]
        gemm.inputs[1] = graph.constant(old.name, (old.array() * rows).astype(np.float32))
    inverse = (1 / scale.astype(np.float64)).astype(np.float32)
    observers = context.observers
    if group.source is None:
        observed = observers.pop(group.x.name).rescaled(inverse)
        factor = graph.constant(group.x.name + "_smoothing", inverse)
        node = graph.node("Mul", [group.x, factor], [group.x.name + "_smoothed"])
        set_type(node.outputs[0], group.x.elem_type, group.x.dims)
        for gemm in group.gemms:
            gemm.inputs[0] = node.outputs[0]
        observers[node.outputs[0].name] = observed
        return
    assert group.columns is not None
    channels = _scale_source(graph, group.source, group.columns, inverse)
    for name, columns in group.carried.items():
        observers[name] = observers[name].rescaled(channels[columns])


def _scale_source(graph: Graph, source: Node, columns: Array, inverse: Array) -> Array:
    """Multiply the output channels of `source` that stand at `columns`; returns the factors of all its channels."""
    linear = linear_at(graph, source.outputs[0])
    if linear is not None:
        factors = np.ones(linear.channels, np.float32)
        factors[columns] = inverse
        bias = bias_of(linear) if source.input(2) is not None else None
        weight = scaled(linear, weight_of(linear), factors.astype(np.float64))
        write(graph, linear, weight, None if bias is None else bias * factors)
        return factors
    gamma = source.constant(1)
    assert gamma is not None
    factors = np.ones(gamma.dims, np.float32)
    factors[columns] = inverse
    for index in (1, 2):
        old = source.constant(index)
        if old is not None:
            source.inputs[index] = graph.constant(old.name, old.array() * factors)
    return factors


def _check_observers(graph: Graph, context: Context) -> None:
    """Drop statistics of tensors that are quantised no more; every one that will be must have its own."""
    graph.infer_shapes()
    names = scale_sources(graph, place(graph, context.settings))
    missing = [n for n in names if n not in context.observers]
    if missing:
        raise PassError(f"pass 'smooth' left tensor '{missing[0]}' without calibration; please report this model")
    context.observers = {name: context.observers[name] for name in names}
