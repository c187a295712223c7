"""What a BatchNormalization remembers of the training data, used where no data are given.

y = gamma (x - mean) / sqrt(var + eps) + beta      so that, over the training data, y ~ (beta, gamma^2) in each channel
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.graph import Array, Const, Graph, Tensor

_LINEAR = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and deviation, both float64 [channels], of a tensor over the training data."""

    mean: Array
    deviation: Array


@dataclass(frozen=True)
class BatchNormRecord:
    """The statistics that one BatchNormalization gives its output, and the names by which that tensor may be known.

    names: in the order of preference; the later ones hold the tensor only once the earlier ones are gone (`fold_bn` lets the
    linear operator before the BatchNormalization compute it under its own name).
    """

    names: tuple[str, ...]
    statistics: ChannelStatistics


def batch_norm_records(graph: Graph) -> list[BatchNormRecord]:
    """One record for each BatchNormalization in inference mode with constant, finite parameters, in graph order."""
    records = []
    for node in graph.nodes:
        if node.op != "BatchNormalization" or node.domain not in ("", "ai.onnx") or node.attr("training_mode", 0):
            continue
        gamma, beta = node.constant(1), node.constant(2)
        if gamma is None or beta is None:
            continue
        deviation, mean = np.abs(gamma.array().astype(np.float64)), beta.array().astype(np.float64)
        if not (np.isfinite(deviation).all() and np.isfinite(mean).all()):
            continue
        output, before = node.outputs[0], node.inputs[0]
        names = [output.name]
        # A constant factor or summand behind it is fused too: the renamed tensor would then be another one.
        if not any(n.op in ("Add", "Sub", "Mul", "Div") and any(map(_is_const, n.inputs)) for n in output.consumers):
            names.append(output.name + "_bn")
        producer = before.producer
        if (
            len(names) > 1
            and producer is not None
            and producer.op in _LINEAR
            and len(before.consumers) == 1
            and not graph.is_pinned(before)
        ):
            names.append(before.name)
        records.append(BatchNormRecord(tuple(names), ChannelStatistics(mean, deviation)))
    return records


def _is_const(tensor: Tensor) -> bool:
    return isinstance(tensor, Const)


def resolve(graph: Graph, records: Sequence[BatchNormRecord]) -> dict[str, ChannelStatistics]:
    """The records by the names that their tensors have in `graph` now; those that cannot be found are left out."""
    present = {v.name: v for v in graph.values()}
    found = {}
    for record in records:
        name = next((n for n in record.names if n in present), None)
        if name is not None:
            found[name] = record.statistics
    return found
