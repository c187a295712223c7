"""Which layers of a model may have widths of their own, in the float model as it stands in front of rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from qcompile.compilation import Data
from qcompile.context import Context, Settings
from qcompile.cut_layer import LayerSpec
from qcompile.data import Dataset, Sample
from qcompile.graph import Const, Graph
from qcompile.layer_counts import output_sizes
from qcompile.load import Loaded
from qcompile.passes import passes_for
from qcompile.passes._match import is_op
from qcompile.passes.quantise import Quantise
from qcompile.passes.quantise_embeddings import table_refusal
from qcompile.probing import Study
from qcompile.run_passes import run_passes
from qcompile.source_groups import source_groups

_CHECK_FEEDS = 2
_SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Survey:
    """The study of a model's layers. macs: of each layer on the first sample, in the order of `study.layers`; 0 for tables."""

    study: Study
    macs: tuple[int, ...]


def survey(
    loaded: Loaded, settings: Settings, data: Data, *, samples: int, loss: str = "kl", activations: Sequence[int] = ()
) -> Survey:
    """Run the passes up to the insertion of Q/DQ on `loaded` (used up) and list what will be quantised.

    samples: how many of the calibration samples the study keeps at most, spread evenly; activations: the widths that groups of
    activations are to be measured at. Raises ModelError, DataError.
    """
    context = Context(settings, calibration=lambda: (s.feeds for s in data.calibration))
    steps = passes_for("real")
    last = next(i for i, step in enumerate(steps) if isinstance(step, Quantise))
    feeds = [s.feeds for s in islice(data.calibration, _CHECK_FEEDS)]
    run_passes(loaded.graph, context, steps[: last + 1], feeds)
    original = context.float_graph
    assert original is not None and context.plan is not None
    layers = _layers(original, context)
    kept = spread(data.calibration, samples)
    study = Study(
        original.to_proto(embed=True).SerializeToString(deterministic=True),
        [dict(s.feeds) for s in kept],
        [s.label for s in kept],
        layers,
        loss,
        settings.seed,
        groups=source_groups(original, context, [x.node for x in layers], activations),
    )
    by_name = {n.name: n for n in original.nodes}
    linear = [by_name[x.node] for x in layers if x.kind == "linear"]
    sizes = output_sizes(original, linear, kept[0].feeds) if linear else {}
    macs = tuple(sizes.get(by_name[x.node], 0) * (x.weights // x.channels) for x in layers)
    return Survey(study, macs)


def spread(data: Dataset, most: int) -> list[Sample]:
    """At most `most` samples, evenly spaced over the whole of `data`, whose memory is bounded too."""
    kept: list[Sample] = []
    stride = 1
    for index, sample in enumerate(data):
        if index % stride:
            continue
        kept.append(sample)
        size = sum(np.asarray(a).nbytes for a in sample.feeds.values()) * len(kept)
        if len(kept) > 1 and (len(kept) > most or size > _SAMPLE_BYTES):
            kept, stride = kept[::2], stride * 2
    return kept


def _layers(graph: Graph, context: Context) -> list[LayerSpec]:
    assert context.plan is not None
    names = {s.node.name: s for s in context.plan.linears}
    found: list[LayerSpec] = []
    tables: set[Const] = set()
    for node in graph.nodes:
        site, weight = names.get(node.name), node.constant(1)
        if site is not None and weight is not None:
            bias = node.constant(2)
            size = int(np.prod(weight.dims))
            own = None if bias is None or not _only(bias, node.name) else bias.name
            paired = context.settings.target == "any" and not site.depthwise
            channels = weight.dims[site.axis]
            found.append(LayerSpec(node.name, node.op, "linear", weight.name, own, site.axis, size, channels, paired))
        elif is_op(node, "Gather") and isinstance(node.inputs[0], Const):
            table = node.inputs[0]
            if table not in tables and len(table.dims) == 2 and table_refusal(graph, table, context) is None:
                tables.add(table)
                found.append(LayerSpec(node.name, node.op, "table", table.name, None, 0, int(np.prod(table.dims)), table.dims[0]))
    return found


def _only(const: Const, node: str) -> bool:
    """Whether nothing but that node reads it."""
    return [n.name for n in const.consumers] == [node]
