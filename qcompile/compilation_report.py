"""The JSON report of a compilation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import qcompile
from qcompile.audit import Audit
from qcompile.certificate import certify
from qcompile.check import Measured, fusion_json, nodes_json
from qcompile.compilation import Built, Data
from qcompile.context import Context, Settings
from qcompile.limits import Limits
from qcompile.report_file import file_record


def report_of(
    source: Path, path: Path, built: Built, audited: Audit, measured: Measured, given: Data, limits: Limits
) -> dict[str, Any]:
    """All of it but what `compile_model` times and adds itself."""
    settings, loaded, plan = built.context.settings, built.loaded, built.context.plan
    warnings = [*given.warnings, *measured.warnings]
    if given.evaluation is None:
        where = "calibration samples" if given.real else "synthetic inputs"
        warnings.append(f"no --eval: accuracy was measured on {where}")
    return {
        "qcompile": qcompile.__version__,
        "source": {"path": str(source), "sha256": loaded.source_sha256},
        "output": file_record(path),
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "passes": built.rows,
        **_weights(settings, built.context),
        **_imported(built, measured, limits),
        **({} if plan is None or plan.layers is None else {"layers": [layer.as_json() for layer in plan.layers]}),
        "accuracy": measured.accuracy_json(),
        "latency_ms": measured.latency_json(),
        "size_bytes": measured.size_json(),
        "nodes": nodes_json(audited),
        "fusion": fusion_json(audited),
        **({"integer_only": certify(path).as_json()} if settings.format == "integer" else {}),
        "data": {"calibration": given.kind, "samples": built.context.calibrated},
        "notes": loaded.notes,
        "warnings": warnings,
    }


def _weights(settings: Settings, context: Context) -> dict[str, Any]:
    """The report's `weights`: how the weights of a weight-only file are stored and were rounded; nothing for other files."""
    if settings.weight_only is None:
        return {}
    learned = settings.effort != "fast" and not context.synthetic
    rounding = "second order" if learned else "nearest"
    return {"weights": {"bits": settings.bits, **asdict(settings.weight_only), "rounding": rounding}}


def _imported(built: Built, measured: Measured, limits: Limits) -> dict[str, Any]:
    """The report's `imported`: what became of a source's own integers; nothing where the source was a float model."""
    imported = built.context.imported
    if imported is None:
        return {}
    left = next(row["skipped"] for row in built.rows if row["name"] == "quantise_imported")
    sqnr = None if measured.accuracy is None else measured.accuracy.sqnr_db
    return {"imported": imported.as_json(left, sqnr, limits.max_requant_loss)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
