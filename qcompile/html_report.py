"""`--html FILE`: one self-contained page of a report. Needs the extra `report` (Jinja2, matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import InputError
from qcompile.report_file import report_json, write_text

if TYPE_CHECKING:
    from qcompile.check import Progress
    from qcompile.html_data import Details

_TEMPLATE = "report.html.j2"


def require_extra() -> None:
    """Raise InputError where Jinja2 or matplotlib is missing; asked before any work."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"--html needs {error.name}: install qcompile with its extra, pip install 'qcompile[report]'") from error


def html_page(report: Mapping[str, Any], details: Details) -> str:
    """The page. The same report and details give the same text. Raises InputError where the extra is missing."""
    require_extra()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from qcompile.html_figures import figures
    from qcompile.html_mixed import mixed_figures

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"db": _db, "bytes": _size, "num": _num}
    page = environment.get_template(_TEMPLATE)
    name = Path(str(report["output"]["path"])).name
    text: str = page.render(
        name=name,
        report=report,
        details=details,
        figures=figures(report, details) | (mixed_figures(report["mixed"]) if report.get("mixed") else {}),
        limits=_limits(report),
        verdict=_verdict(report),
        cards=_cards(report),
        shown={layer.name for layer in (entry.layer for entry in details.worst)},
        recipe=report_json(report.get("recipe") or {}),
    )
    return text


def make_html(
    report: Mapping[str, Any],
    float_model: str | Path,
    path: str | Path,
    *,
    spec: str | None,
    preprocess: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Gather what the page shows beyond `report`, on the samples of `spec` (None: none), and write it to `path`.

    The quantised file is the report's `output`. Raises InputError, DataError and ModelError.
    """
    require_extra()
    from qcompile.check import paired_inputs
    from qcompile.data import load_dataset
    from qcompile.html_data import gather

    quantised = Path(str(report["output"]["path"]))
    dataset = None
    if spec is not None:
        inputs, _ = paired_inputs(Path(float_model), quantised)
        dataset = load_dataset(spec, inputs, preprocess=preprocess, samples=samples, seed=seed)
    write_html(report, gather(float_model, quantised, dataset, report.get("layers"), progress), path)


def write_html(report: Mapping[str, Any], details: Details, path: str | Path) -> None:
    """Write `html_page` to `path`, whole or not at all."""
    write_text(html_page(report, details), path, "--html")


def _limits(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    gate = report.get("gate")
    if gate is not None:
        return list(gate["limits"])
    found = []
    for key, name in (("verdict", "--max-drop"), ("agreement_verdict", "--min-agreement")):
        if report.get(key):
            found.append({"limit": name, **report[key]})
    return found


def _verdict(report: Mapping[str, Any]) -> tuple[str, str]:
    """(outcome, sentence)."""
    limits = _limits(report)
    if not limits:
        return "none", "No limit was asked for."
    outcomes = [row["outcome"] for row in limits]
    for outcome in ("fail", "inconclusive"):
        if outcome in outcomes:
            row = limits[outcomes.index(outcome)]
            return outcome, f"{row['limit']}: {row['reason']}"
    return "pass", f"All {len(limits)} limits hold." if len(limits) > 1 else f"{limits[0]['limit']}: {limits[0]['reason']}"


def _cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, value, remark) of the headline numbers."""
    accuracy, latency, size, nodes = (report.get(k) or {} for k in ("accuracy", "latency_ms", "size_bytes", "nodes"))
    cards = []
    if accuracy.get("metric"):
        share = accuracy["metric"] == "f1" or accuracy["metric"].startswith("top")
        scores = [f"{100 * accuracy[s]:.2f} %" if share else f"{accuracy[s]:.5g}" for s in ("float", "quantised")]
        cards.append((accuracy["metric"], scores[1], f"float {scores[0]}, drop {accuracy['drop_points']:.2f}"))
    if accuracy.get("top1_agreement") is not None:
        cards.append(("agreement", f"{100 * accuracy['top1_agreement']:.2f} %", f"over {accuracy['samples']} samples"))
    if accuracy:
        cards.append(("SQNR", f"{_db(accuracy['sqnr_db'])} dB", f"over {accuracy['samples']} samples"))
    if latency:
        cards.append(("speed", f"{latency['speedup']:.2f} x", f"{latency['float']:.3g} to {latency['quantised']:.3g} ms"))
    if size:
        cards.append(("size", f"{size['ratio']:.3f} x", f"{_size(size['float'])} to {_size(size['quantised'])}"))
    if nodes:
        cards.append(("integer nodes", str(nodes["quantised"]), f"{nodes['float']} in float"))
    return cards


def _db(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"


def _num(value: float) -> str:
    return f"{value:.4g}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
