"""Which layer costs how much: every integer Conv and Gemm measured by one walk over the float and the quantised model.

For a layer with float input x and output y, quantised input x' and output y', and L the integer layer between (its rounded
weights and bias, its input's and output's rounding and clipping):

    sqnr_in  = |x|^2 / |x - x'|^2        what reaches it
    sqnr_out = |y|^2 / |y - L(x')|^2     what leaves it, with everything before it quantised
    own      = |y|^2 / |y - L(Q(x))|^2   what leaves it where it alone is quantised

in decibels, over all samples. The layer is one small session that is run on Q(x) and on x', so that a diagnosis costs a pass of
the float model, one of the quantised model, and one of the layers alone, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Graph, Node, Value
from qcompile.plan import LayerRecord, LinearSite, ScaleClass
from qcompile.qparams import ActivationType
from qcompile.sessions import segment_session
from qcompile.walk import Stream, dequantise

Array = npt.NDArray[Any]

_NO_SIGNAL = 1e-30  # stands for the energy of a tensor that is all zeros


def diagnose(graph: Graph, context: Context, samples: int) -> list[LayerRecord]:
    """One record a linear site of `context.plan`, in graph order, on at most `samples` of `context.samples`.

    `graph` is the quantised model with Q/DQ, its weights and biases rounded; it and `context.float_graph` stay as they are.
    """
    plan, original = context.plan, context.float_graph
    if plan is None or original is None:
        return []
    picked = context.samples[:: -(-len(context.samples) // samples)]
    float_world, integer_world = Stream(original, picked), Stream(graph, picked)
    nodes = {n.name: n for n in original.nodes}
    values = {v.name: v for v in original.values()}
    records = []
    for site in plan.linears:
        if context.progress is not None:
            context.progress("diagnosing")
        source, output = nodes[site.node.name].inputs[0], values[site.output]
        assert isinstance(source, Value)
        layer = _Layer(graph, site, context.activations)
        inputs = float_world.values(source)
        outputs, reached = float_world.values(output), integer_world.values(layer.source)
        records.append(layer.measure(inputs, outputs, reached, context.settings.bits_for(site.node.name)))
    return records


@dataclass
class _Ratio:
    """Signal and noise summed over samples in float64."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, wanted: Array, got: Array) -> None:
        exact = wanted.astype(np.float64)
        self.signal += float(np.square(exact).sum())
        self.noise += float(np.square(exact - got).sum())

    @property
    def decibels(self) -> float | None:
        """None where there is no noise."""
        return None if self.noise == 0 else 10 * math.log10(max(self.signal, _NO_SIGNAL) / self.noise)


class _Layer:
    """One site as a session of its own: from the integers that it reads to those (or the floats) that it writes."""

    def __init__(self, graph: Graph, site: LinearSite, kind: ActivationType) -> None:
        self.site = site
        self.kind = kind
        before = [t.producer for t in site.node.inputs if t.producer is not None]
        reader = site.node.inputs[0].producer
        if reader is None or any(n.op != "DequantizeLinear" for n in before):
            raise PassError(f"node '{site.node.label}': an input is not dequantised; please report this model")
        source = reader.inputs[0]
        assert isinstance(source, Value)
        self.source = source
        chain = _chain(site)
        nodes = [*dict.fromkeys(before), *chain]
        self.session = segment_session(graph, nodes, [(source, np.dtype(kind.dtype))], [chain[-1].outputs[0]])

    def measure(self, inputs: Sequence[Array], outputs: Sequence[Array], reached: Sequence[Array], bits: int) -> LayerRecord:
        """inputs, outputs: the float model's x and y, reached: the integers x', one array a sample; bits: of the weights."""
        site = self.site
        into, out, own = _Ratio(), _Ratio(), _Ratio()
        clipped = total = 0
        for x, y, integers in zip(inputs, outputs, reached, strict=True):
            into.add(x, dequantise(integers, site.source.scale, site.source.zero_point))
            written = self._run(integers)
            out.add(y, self._floats(written))
            own.add(y, self._floats(self._run(self._round(x))))
            place, counted = (site.source, integers) if site.result is None else (site.result, written)
            clipped += sum(int((counted == end).sum()) for end in clipping_ends(place, place.kind(self.kind)))
            total += counted.size
        assert site.stored is not None
        return LayerRecord(
            node=site.node.label,
            op=site.node.op,
            bits=bits,
            weights=int(np.prod(site.stored.dims)),
            sqnr_in_db=into.decibels,
            sqnr_out_db=out.decibels,
            own_db=own.decibels,
            method=site.method,
            gain_db=site.gain_db,
            low=site.source.low,
            high=site.source.high,
            saturation=clipped / max(total, 1),
            activation_bits=site.source.bits,
        )

    def _run(self, integers: Array) -> Array:
        return next(iter(self.session.run({self.source.name: integers}).values()))

    def _round(self, x: Array) -> Array:
        """QuantizeLinear: half to even in float32, saturated."""
        steps = np.rint(x.astype(np.float32) / self.site.source.scale) + np.float32(self.site.source.zero_point)
        kind = self.site.source.kind(self.kind)
        rounded: Array = np.clip(steps, kind.low, kind.high).astype(kind.dtype)
        return rounded

    def _floats(self, written: Array) -> Array:
        place = self.site.result
        return written if place is None else dequantise(written, place.scale, place.zero_point)


def _chain(site: LinearSite) -> list[Node]:
    """The site's node and what belongs to it: Relu or Clip that could not be folded, Q, and Clips on its integers."""
    chain = [site.node]
    while site.result is not None and chain[-1].op != "QuantizeLinear":
        readers = chain[-1].outputs[0].consumers
        if len(readers) != 1:
            raise PassError(f"node '{site.node.label}': its float result is read elsewhere; please report this model")
        chain.append(readers[0])
    while site.result is not None and [n.op for n in chain[-1].outputs[0].consumers] == ["Clip"]:
        chain.append(chain[-1].outputs[0].consumers[0])
    return chain


def clipping_ends(place: ScaleClass, kind: ActivationType) -> list[int]:
    """The ends of the integer range at which values of `place` are cut off.

    Not those: an end that stands for 0 (a folded Relu, or a tensor that has one sign), and one that reaches the bound of a
    folded Clip, to within a step (a scale may be moved by that much to be free of ties). There the float model ends too.
    """
    step = float(place.scale)
    bottom, top = ((end - place.zero_point) * step for end in (kind.low, kind.high))
    ends = []
    if place.zero_point != kind.low and (place.floor is None or bottom > place.floor + step):
        ends.append(kind.low)
    if place.zero_point != kind.high and (place.ceiling is None or top < place.ceiling - step):
        ends.append(kind.high)
    return ends
