"""What the loss of a unit of channels would cost: a number for each, comparable across layers.

l1             mean |w| of the filters that make it, over the mean of its layer (Li et al. 2017)
hrank          mean rank of its feature maps, over the largest rank they could have (HRank, Lin et al. 2020)

The other two look at outputs: `_prune_hessian` and `_prune_second_order`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompile.graph import Array, Graph, Node, Value
from qcompile.passes._linear import output_axis
from qcompile.passes._prune_trace import Slot, Trace
from qcompile.passes.round_weights import weight_matrix
from qcompile.walk import Stream

_MAPS = 16  # samples whose feature maps are looked at: ranks hardly differ from sample to sample (HRank, section 3)


def weight_rows(node: Node, weight: Array) -> Array:
    """[channels, K] of a Conv, Gemm or MatMul in the kernel's order."""
    axis = output_axis(node)
    return weight_matrix(np.asarray(weight, np.float64), node.op, axis)


def columns_of(slot: Slot, weight: Array) -> Array:
    """Which channel of `slot` each of the K columns of `weight_rows` reads."""
    if slot.node.op != "Conv":
        return np.arange(len(slot.ids))
    return np.tile(np.arange(len(slot.ids)), int(np.prod(weight.shape[2:])))


def l1(trace: Trace) -> dict[int, float]:
    """By root."""
    found: dict[int, list[float]] = {}
    for slot in trace.of_role("out"):
        size = np.abs(weight_rows(slot.node, weight_of_node(slot.node))).mean(axis=1)
        size = size / max(float(size.mean()), 1e-30)
        for root, value in zip(trace.roots(slot.ids).tolist(), size.tolist(), strict=True):
            found.setdefault(root, []).append(value)
    return {root: float(np.mean(values)) for root, values in found.items()}


def hrank(trace: Trace, graph: Graph, samples: Sequence[Mapping[str, Array]]) -> dict[int, float]:
    """By root; units without feature maps are left out."""
    found: dict[int, list[float]] = {}
    stream = Stream(graph.copy(), samples[:_MAPS])
    nodes = {n.outputs[0].name: n for n in stream.graph.nodes}
    for slot in trace.of_role("in"):
        source = nodes[slot.node.outputs[0].name].inputs[0]
        assert isinstance(source, Value)
        maps = stream.values(source)
        if maps[0].ndim != 4:
            continue
        ranks = np.mean([np.linalg.matrix_rank(m.astype(np.float64)).mean(axis=0) for m in maps], axis=0)
        share = ranks / max(min(maps[0].shape[2:]), 1)
        for root, value in zip(trace.roots(slot.ids).tolist(), share.tolist(), strict=True):
            found.setdefault(root, []).append(float(value))
    return {root: float(np.mean(values)) for root, values in found.items()}


def weight_of_node(node: Node) -> Array:
    """Its constant weights."""
    const = node.constant(1)
    assert const is not None
    return const.array()
