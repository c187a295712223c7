"""What target `any` costs on a model: the same compiled for `vnni`, on the same samples, and how the pair rule moved weights.

`any` gives the same bits on every machine: no two neighbouring weights of one sign add up to more than 128 (docs/dyadic.md).
`vnni` leaves the weights free. Everything is read from the two written files; the second one is removed afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from qcompile.errors import QcompileError
from qcompile.inspection_scales import Scales, integer
from qcompile.qparams import PAIR_LIMIT
from qcompile.runtime import Array
from qcompile.wiring import Node

FREE = "vnni"  # the target without the pair rule, in all else like `any`
WORTH_A_REASON_DB = 1.0
_KEPT = ("sqnr_db", "cosine", "top1_agreement", "metric", "quantised", "drop_points", "lost", "won")
_PLACES = {"QLinearConv": (3, 4), "QLinearMatMul": (3, 4), "QGemm": (3, 4)}  # inputs: weights, their scales
_DEQUANTISED = ("Conv", "Gemm", "MatMul")
_BARE = ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")

Compile = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Weights:
    """Stored integer weights of one node: `[channels, K]` in the kernel's K order, and its scales (None: not beside the weights).

    paired: whether kernels add their products in pairs (depthwise ones do not).
    """

    integers: Array
    scales: Array | None
    paired: bool


def add_targets(
    path: Path,
    report: dict[str, Any],
    compile_free: Callable[..., Mapping[str, Any]],
    progress: Callable[[str, int, int | None], None] | None,
) -> None:
    """Add the report's `targets`; where the model does not compile for the other target, a warning says so.

    compile_free: as for `both_targets`, with a keyword `progress`.
    """

    def shown(stage: str, done: int, total: int | None) -> None:
        if progress is not None:
            progress(f"target {FREE}: {stage}", done, total)

    try:
        report["targets"] = both_targets(path, report, lambda other: compile_free(output=other, progress=shown))
    except QcompileError as error:
        report["warnings"].append(f"target {FREE} was not measured: {error}")


def both_targets(path: Path, report: Mapping[str, Any], compile_free: Compile) -> dict[str, Any]:
    """The report's `targets`, of the model at `path` (target `any`) whose report is `report`.

    compile_free: writes the same model for target `vnni` to a path and returns its report. Raises what it raises.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        other = Path(folder) / path.name
        free = compile_free(other)
        rule = pair_rule(path, other)
    cost = _difference(free["accuracy"]["sqnr_db"], report["accuracy"]["sqnr_db"])
    found: dict[str, Any] = {
        "any": _selected(report["accuracy"]),
        FREE: _selected(free["accuracy"]),
        "any_costs_db": cost,
        "pair_rule": rule,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if cost is not None and cost > WORTH_A_REASON_DB:
        found["reason"] = explain(rule)
    return found


def pair_rule(bound: Path, free: Path) -> dict[str, Any]:
    """What the rule did: `bound` is the file that obeys it, `free` the one that need not. Counts, and the change of the weights.

    pairs_over: neighbouring weights of the free file that the rule forbids; channels_over: channels that hold one;
    scale_ratio: by how much their scales were widened (median); weights_db: the free weights against what the rule made of
    them, as a signal-to-noise ratio; node, node_pairs_over: where most of them are. None where there is nothing to tell.
    """
    ours, theirs = dict(stored_weights(bound)), dict(stored_weights(free))
    both = {label: (w, theirs[label]) for label, w in ours.items() if label in theirs}
    both = {label: pair for label, pair in both.items() if pair[0].paired and pair[0].integers.shape == pair[1].integers.shape}
    over = {label: _over(w.integers) for label, (_, w) in both.items()}
    counts = {label: int(o.sum()) for label, o in over.items()}
    ratios: list[Array] = []
    signal = noise = 0.0
    for label, (w, f) in both.items():
        if w.scales is None or f.scales is None:
            continue
        channels = over[label].any(axis=1)
        ratios.append((w.scales.astype(np.float64) / f.scales)[channels])
        values, rounded = (np.asarray(x.integers, np.float64) * np.asarray(x.scales, np.float64)[:, None] for x in (f, w))
        signal, noise = signal + float(np.square(values).sum()), noise + float(np.square(values - rounded).sum())
    every = np.concatenate(ratios) if ratios else np.empty(0)
    worst = max(counts, key=lambda label: counts[label], default=None)
    return {
        "nodes": len(both),
        "channels": sum(o.shape[0] for o in over.values()),
        "channels_over": sum(int(o.any(axis=1).sum()) for o in over.values()),
        "pairs": sum(o.size for o in over.values()),
        "pairs_over": sum(counts.values()),
        "scale_ratio": round(float(np.median(every)), 3) if every.size else None,
        "weights_db": round(10 * float(np.log10(signal / noise)), 2) if signal > 0 and noise > 0 else None,
        "node": worst if worst is not None and counts[worst] else None,
        "node_pairs_over": counts[worst] if worst is not None else 0,
    }


def explain(rule: Mapping[str, Any]) -> str:
    """One sentence on why `any` is less exact than `vnni`, from the counts of `pair_rule`."""
    if not rule["pairs_over"]:
        return f"no pair of free weights exceeds {PAIR_LIMIT} in {rule['nodes']} nodes: the difference is not the pair rule's"
    text = (
        f"the pair rule forbids {rule['pairs_over']} of {rule['pairs']} pairs of free weights (sum above {PAIR_LIMIT}), "
        f"in {rule['channels_over']} of {rule['channels']} channels"
    )
    if rule["scale_ratio"] is not None:
        text += f", whose scales are {rule['scale_ratio']:.2f} x as wide under it (median)"
    if rule["weights_db"] is not None:
        text += f"; it moved the weights by {100 * 10 ** (-rule['weights_db'] / 20):.2g} % rms ({rule['weights_db']:.1f} dB)"
    return text + f"; most are in '{rule['node']}' ({rule['node_pairs_over']})"


def stored_weights(path: Path) -> Iterator[tuple[str, Weights]]:
    """(node label, its weights) of every linear node with integer weights stored inside the file, in node order."""
    scales = Scales(path)
    for node in scales.wiring.nodes:
        found = _weights(scales, node)
        if found is not None:
            yield node.label, found


def _weights(scales: Scales, node: Node) -> Weights | None:
    factor: Array | None = None
    if node.op in _PLACES:
        name, scale_name = (node.inputs[i] for i in _PLACES[node.op])
        factor = scales.constant(scale_name)
    elif node.op in _BARE:
        name = node.inputs[1]
    elif node.op in _DEQUANTISED:
        link = scales.dequantised(node.inputs[1])
        if link is None:
            return None
        name, factor = link.tensor, link.scale
    else:
        return None
    values = _stored(scales, name)
    if values is None or values.ndim < 2:
        return None
    if node.op.endswith(("Conv", "ConvInteger")):
        matrix = np.moveaxis(values, 1, -1).reshape(values.shape[0], -1)
        paired = values.shape[1] > 1 or integer(node, "group", 1) == 1
    else:
        matrix = values if integer(node, "transB", 0) else np.swapaxes(values, -1, -2)
        matrix, paired = matrix.reshape(-1, matrix.shape[-1]), True
    if factor is not None:
        factor = np.broadcast_to(np.asarray(factor).reshape(-1), matrix.shape[:1]) if factor.size in (1, len(matrix)) else None
    return Weights(matrix, factor, paired)


def _stored(scales: Scales, name: str) -> Array | None:
    """The integers of a weight, a Cast in front (4-bit storage) undone; None where computed or outside the file."""
    maker = scales.wiring.producer(name)
    if maker is not None and maker.op == "Cast":
        name = maker.inputs[0]
    tensor = scales.wiring.stored.get(name)
    if tensor is None or uses_external_data(tensor):
        return None
    return np.asarray(numpy_helper.to_array(tensor)).astype(np.int32)


def _over(integers: Array) -> Array:
    """[channels, K // 2]: which pairs of neighbours the rule forbids. (Of opposite signs they never add up to that much.)"""
    even = integers.shape[1] // 2 * 2
    return np.asarray(np.abs(integers[:, 0:even:2] + integers[:, 1:even:2]) > PAIR_LIMIT)


def _difference(free: float | None, bound: float | None) -> float | None:
    """Decibels; None where one of the two is exact (infinite or not stated)."""
    if free is None or bound is None or not np.isfinite([free, bound]).all():
        return None
    return round(free - bound, 3)


def _selected(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    return {key: accuracy[key] for key in _KEPT if key in accuracy}
