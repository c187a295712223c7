"""The report's `sparsity` and `complexity`: what became sparse, and what the model holds and costs before and after."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.check import quantised_feeds
from qcompile.context import Context
from qcompile.data import Dataset
from qcompile.layer_counts import count_layers, share_that_follows, totals
from qcompile.sparsity import Pattern, parse_sparsity


def sparsity_json(source: Path, written: Path, context: Context, data: Dataset) -> dict[str, Any]:
    """{"sparsity", "pruning", "complexity"} of a compilation that pruned, else nothing. MACs are those of one sample."""
    settings = context.settings
    if settings.sparsity is None and settings.pruning is None:
        return {}
    feeds = next(sample.feeds for sample in data)
    before, after = count_layers(source, feeds), count_layers(written, quantised_feeds(source, written, feeds))
    complexity = {"float": totals(before), "quantised": totals(after)}
    report: dict[str, Any] = {"complexity": complexity}
    if settings.pruning is not None:
        report["pruning"] = {**asdict(settings.pruning), "layers": [asdict(record) for record in context.pruned or []]}
    if settings.sparsity is None:
        return report
    rule = parse_sparsity(settings.sparsity)
    records = context.sparse or []
    report["sparsity"] = {
        "rule": str(rule),
        "criterion": settings.criterion,
        "scope": settings.sparsity_scope,
        "storage": settings.sparse_storage if isinstance(rule, Pattern) else "dense",
        "share_that_follows": share_that_follows(after, rule) if isinstance(rule, Pattern) else None,
        "zeros": sum(r.zeros for r in records),
        "weights": sum(r.weights for r in records),
        "layers": [
            {
                "node": r.node,
                "op": r.op,
                "weights": r.weights,
                "zeros": r.zeros,
                "sparsity": round(r.zeros / r.weights, 6),
                "sqnr_db": None if r.sqnr_db is None else round(r.sqnr_db, 2),
            }
            for r in records
        ],
    }
    return report
