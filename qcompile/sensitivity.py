"""What each layer costs at each width: HAWQ-V2's prediction from the Hessian's trace, and what is measured with that layer alone.

    Omega_l(b) = (tr H_l / n_l) |W_l - Q_b(W_l)|^2          Dong et al. 2020, n_l the number of weights
    measured   = KL, and noise / signal, of the model's outputs with only layer l at b bits

Both are in the report, with Spearman's rank correlation between them.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qcompile.check import Progress
from qcompile.context import WIDTHS
from qcompile.cut_layer import LayerSpec
from qcompile.divergence import LOSSES
from qcompile.eigenvalue import Eigenvalue, eigenvalues
from qcompile.errors import InputError
from qcompile.executors import Workers, result_of, workers
from qcompile.hessian import Trace, traces
from qcompile.probing import Study, WidthCost, measure_group, measure_sources, measure_widths
from qcompile.source_groups import SourceGroup
from qcompile.survey import Survey

SAMPLES = 128
ACTIVATION_WIDTHS = (4, 6, 8)
MEASURES = ("noise", "kl", "hessian")


@dataclass(frozen=True)
class Effort:
    """How sensitivities are found. samples: of the calibration data; loss: whose curvature (see `divergence`); tolerance, probes,
    max_seconds: when the trace's estimate stops; workers, scheduler: where it runs."""

    samples: int = SAMPLES
    loss: str = "kl"
    tolerance: float = 0.1
    probes: int = 128
    max_seconds: float | None = None
    workers: int = 1
    scheduler: str | None = None

    def check(self) -> None:
        """Raise InputError for a value that cannot be."""
        if self.loss not in LOSSES:
            raise InputError(f"--loss {self.loss}: choose one of {', '.join(LOSSES)}")
        for name, value, least in (("samples", self.samples, 1), ("probes", self.probes, 8), ("workers", self.workers, 1)):
            if value < least:
                raise InputError(f"--{name} {value}: give a whole number of at least {least}")
        if not 0 < self.tolerance < 1:
            raise InputError(f"--tolerance {self.tolerance:g}: give a share above 0 and below 1, such as 0.1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InputError(f"--max-seconds {self.max_seconds:g}: give seconds above 0")


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. trace, eigenvalue: None where not asked for or not reached in time. weights, activations: measured, by width."""

    spec: LayerSpec
    macs: int
    trace: Trace | None
    weights: tuple[WidthCost, ...]
    activations: tuple[WidthCost, ...] = ()
    eigenvalue: Eigenvalue | None = None

    def omega(self, cost: WidthCost) -> float | None:
        """HAWQ-V2's prediction for one width; None without a trace. A trace below 0 counts as 0."""
        return None if self.trace is None else max(self.trace.trace, 0.0) / self.spec.weights * cost.squared

    def cost(self, cost: WidthCost, measure: str) -> float | None:
        """One of `MEASURES`."""
        return {"noise": cost.noise, "kl": cost.kl}[measure] if measure != "hessian" else self.omega(cost)

    def as_json(self) -> dict[str, Any]:
        """One entry of the report."""
        spec, trace = self.spec, self.trace
        return {
            "node": spec.node,
            "op": spec.op,
            "weights": spec.weights,
            "macs": self.macs,
            "trace": None
            if trace is None
            else {
                "mean": trace.trace,
                "low": trace.low if math.isfinite(trace.low) else None,
                "high": trace.high if math.isfinite(trace.high) else None,
                "average": trace.trace / spec.weights,
                "probes": trace.probes,
                "step": trace.step,
                "step_disagreement": trace.disagreement,
                "tight": trace.tight,
            },
            "eigenvalue": None if self.eigenvalue is None else asdict(self.eigenvalue),
            "widths": [
                {"bits": c.bits, "squared_error": c.squared, "omega": self.omega(c), "kl": c.kl, "noise": c.noise}
                for c in self.weights
            ],
            "activations": [{"bits": c.bits, "kl": c.kl, "noise": c.noise} for c in self.activations],
        }


@dataclass(frozen=True)
class GroupSensitivity:
    """A group of activations that have one width. costs: measured, by width; none where there was nothing to choose."""

    source: SourceGroup
    costs: tuple[WidthCost, ...] = ()

    @staticmethod
    def cost(cost: WidthCost, measure: str) -> float:
        """One of `MEASURES`. For `hessian` twice the measured KL, which is what Omega predicts: d'Hd = 2 KL."""
        return {"noise": cost.noise, "kl": cost.kl, "hessian": 2 * cost.kl}[measure]

    def as_json(self) -> dict[str, Any]:
        """One entry of the report."""
        return {
            "tensors": list(self.source.tensors),
            "read_by": list(self.source.readers),
            "widths": [{"bits": c.bits, "kl": c.kl, "noise": c.noise} for c in self.costs],
        }


@dataclass(frozen=True)
class Sensitivity:
    """All layers, in graph order. samples: how many were used; loss: whose Hessian. groups: of activations that layers read."""

    layers: tuple[LayerSensitivity, ...]
    samples: int
    loss: str
    groups: tuple[GroupSensitivity, ...] = ()

    def rank_correlation(self) -> dict[str, float | None]:
        """Spearman's, between Omega and the measured KL over layers: at each width and over `all` pairs of layer and width."""
        pairs: dict[str, list[tuple[float, float]]] = {}
        for layer in self.layers:
            for cost in layer.weights:
                omega = layer.omega(cost)
                if omega is not None:
                    pairs.setdefault(str(cost.bits), []).append((omega, cost.kl))
        pairs["all"] = [p for found in list(pairs.values()) for p in found]
        return {name: spearman([a for a, _ in found], [b for _, b in found]) for name, found in pairs.items()}

    def as_json(self) -> dict[str, Any]:
        """The report of `qcompile sensitivity`, but for the model's own record."""
        return {
            "loss": self.loss,
            "samples": self.samples,
            "rank_correlation": self.rank_correlation(),
            "layers": [layer.as_json() for layer in self.layers],
            **({"groups": [g.as_json() for g in self.groups]} if any(g.costs for g in self.groups) else {}),
        }

    def as_csv(self) -> str:
        """One line a layer and width."""
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        curvature = ("trace", "trace_low", "trace_high", "eigenvalue")
        out.writerow(["node", "op", "weights", "macs", *curvature, "bits", "squared_error", "omega", "kl", "noise"])
        for layer in self.layers:
            t = layer.trace
            ends = ("", "", "") if t is None else (repr(t.trace), repr(t.low), repr(t.high))
            top = "" if layer.eigenvalue is None else repr(layer.eigenvalue.value)
            for c in layer.weights:
                omega = layer.omega(c)
                shown = "" if omega is None else repr(omega)
                name = (layer.spec.node, layer.spec.op, layer.spec.weights, layer.macs)
                out.writerow([*name, *ends, top, c.bits, repr(c.squared), shown, repr(c.kl), repr(c.noise)])
        return text.getvalue()


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The correlation of ranks, ties sharing their mean rank; None where one side is constant or fewer than 3 pairs exist."""
    if len(first) < 3:
        return None
    a, b = (_ranks(np.asarray(x, np.float64)) for x in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else None


def _ranks(values: Any) -> Any:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def find_sensitivities(
    found: Survey,
    effort: Effort,
    *,
    widths: Sequence[int] = WIDTHS,
    activations: Sequence[int] = (),
    groups: Sequence[int] = (),
    with_trace: bool = True,
    with_eigenvalue: bool = False,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every layer of the survey at each of `widths`, its input at each of `activations`, and estimate its trace.

    groups: widths at which groups of activations are measured; the survey must know them. with_eigenvalue: the Hessian's top
    eigenvalue of each layer too, which needs torch.
    """
    study = found.study
    count = len(study.layers)
    with workers(study, effort.workers, effort.scheduler) as pool:
        measured = _gather(pool, measure_widths, count, tuple(widths), progress)
        inputs = (
            _gather(pool, measure_sources, count, tuple(activations), progress) if activations else [[] for _ in range(count)]
        )
        together: list[list[WidthCost]] = [[] for _ in study.groups]
        if groups:
            together = _gather(pool, measure_group, len(study.groups), tuple(groups), progress, "measuring activations")
        known: list[Trace | None] = [None] * count
        if with_trace:
            known = traces(
                pool,
                count,
                tolerance=effort.tolerance,
                most=effort.probes,
                max_seconds=effort.max_seconds,
                progress=None if progress is None else lambda done, total: progress("estimating traces", done, total),
            )
        tops: list[Eigenvalue | None] = [None] * count
        if with_eigenvalue:
            tops = eigenvalues(
                pool,
                count,
                max_seconds=effort.max_seconds,
                progress=None if progress is None else lambda done, total: progress("finding eigenvalues", done, total),
            )
    rows = zip(study.layers, found.macs, known, measured, inputs, tops, strict=True)
    layers = [
        LayerSensitivity(spec, macs, trace, tuple(costs), tuple(sources), top) for spec, macs, trace, costs, sources, top in rows
    ]
    sources = tuple(GroupSensitivity(g, tuple(costs)) for g, costs in zip(study.groups, together, strict=True))
    return Sensitivity(tuple(layers), len(study.feeds), effort.loss, sources)


def _gather(
    pool: Workers,
    task: Callable[[Study, int, tuple[int, ...]], list[WidthCost]],
    count: int,
    widths: tuple[int, ...],
    progress: Progress | None,
    stage: str = "measuring layers",
) -> list[list[WidthCost]]:
    """`task` of every layer, in order; layers run side by side where there are workers."""
    ahead = [pool.submit(task, index, widths) for index in range(count)] if pool.count > 1 else []
    found = []
    for index in range(count):
        if progress is not None:
            progress(stage, index, count)
        found.append(result_of(ahead[index] if ahead else pool.submit(task, index, widths)))
    return found
