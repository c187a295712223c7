"""What a CI server shows of a check: JUnit XML, GitHub's step summary and annotations. All made from the JSON report alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qcompile.errors import InputError
from qcompile.report_file import write_text

_EPOCH = "1970-01-01T00:00:00"  # the schema wants a time; a file with the real one would differ at every run


def junit_xml(report: Mapping[str, Any]) -> str:
    """One test case a limit, in the form of Apache Ant's JUnit task, which CI servers read; without limits one that passes.

    An inconclusive limit is a failure where it makes the exit status 3, else skipped.
    """
    gate = report.get("gate") or {"limits": [], "on_inconclusive": "fail"}
    rows = list(gate["limits"])
    fails = [r for r in rows if r["outcome"] == "fail" or (r["outcome"] == "inconclusive" and gate["on_inconclusive"] == "fail")]
    name = Path(str(report["output"]["path"])).name
    seconds = f"{report.get('seconds', 0.0):.3f}"
    counts = {"tests": str(max(1, len(rows))), "failures": str(len(fails)), "errors": "0"}
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        {
            "package": "qcompile",
            "id": "0",
            "name": f"qcompile check {name}",
            "timestamp": _EPOCH,
            "hostname": "localhost",
            **counts,
        }
        | {"time": seconds},
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _facts(report):
        ElementTree.SubElement(properties, "property", {"name": key, "value": value})
    for row in rows or [{"limit": "measured", "outcome": "pass", "reason": "no limit was asked for"}]:
        case = ElementTree.SubElement(
            suite, "testcase", {"name": row["limit"], "classname": f"qcompile.check.{name}", "time": "0"}
        )
        if row in fails:
            failure = ElementTree.SubElement(case, "failure", {"message": row["reason"], "type": row["outcome"]})
            failure.text = row["reason"]
        elif row["outcome"] == "inconclusive":
            ElementTree.SubElement(case, "skipped")
    ElementTree.SubElement(suite, "system-out").text = "\n".join(f"{r['limit']}: {r['outcome']}: {r['reason']}" for r in rows)
    ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def write_junit(report: Mapping[str, Any], path: str | Path) -> None:
    """Write `junit_xml` to `path`, whole or not at all. Raises InputError where it cannot be written."""
    write_text(junit_xml(report), path, "--junit")


def github_summary(report: Mapping[str, Any]) -> str:
    """The check in Markdown, for GitHub's step summary."""
    gate = report.get("gate") or {"outcome": "pass", "limits": []}
    lines = [
        f"## qcompile check: {gate['outcome']}",
        "",
        f"`{report['output']['path']}` against `{report['source']['path']}`",
        "",
    ]
    if gate["limits"]:
        lines += ["| limit | outcome | what was found |", "|---|---|---|"]
        lines += [f"| `{_cell(r['limit'])}` | {_MARKS[r['outcome']]} | {_cell(r['reason'])} |" for r in gate["limits"]]
        lines.append("")
    lines += ["| measure | value |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in _facts(report))]
    lines += [f"\n> {_cell(warning)}" for warning in report.get("warnings") or ()]
    return "\n".join(lines) + "\n"


def github_annotations(report: Mapping[str, Any]) -> Iterator[str]:
    """Workflow commands for each limit that does not pass, an error where it fails the job and a warning where it does not."""
    gate = report.get("gate") or {"limits": [], "on_inconclusive": "fail"}
    for row in gate["limits"]:
        if row["outcome"] == "pass":
            continue
        error = row["outcome"] == "fail" or gate["on_inconclusive"] == "fail"
        title = _escaped(f"qcompile check {row['limit']}: {row['outcome']}", inside=True)
        yield f"::{'error' if error else 'warning'} title={title}::{_escaped(row['reason'])}"


def summary_path(environment: Mapping[str, str] = os.environ) -> Path:
    """The file for the summary. Raises InputError outside of GitHub Actions."""
    path = environment.get("GITHUB_STEP_SUMMARY")
    if not path:
        raise InputError("--github: the variable GITHUB_STEP_SUMMARY is not set; it is for jobs of GitHub Actions")
    return Path(path)


def append_summary(report: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Add the summary to the file that GitHub Actions names. Raises InputError outside of GitHub Actions."""
    path = summary_path(environment)
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(github_summary(report))
    except OSError as error:
        raise InputError(f"--github: {path} cannot be written ({error.strerror})") from error


_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "⚠️ inconclusive"}


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    accuracy, latency, size = (report.get(key) for key in ("accuracy", "latency_ms", "size_bytes"))
    if accuracy:
        yield "samples", str(accuracy["samples"])
        if accuracy["metric"]:
            scores = f"{accuracy['float']:.4f} -> {accuracy['quantised']:.4f}"
            yield accuracy["metric"], f"{scores} (drop {accuracy['drop_points']:.2f})"
        if accuracy["top1_agreement"] is not None:
            yield "top-1 agreement", f"{accuracy['top1_agreement']:.4f}"
        yield "SQNR", "infinite" if accuracy["sqnr_db"] is None else f"{accuracy['sqnr_db']:.2f} dB"
    if latency:
        yield "latency", f"{latency['float']:.3g} -> {latency['quantised']:.3g} ms ({latency['speedup']:.2f} x as fast)"
    if size:
        yield "size", f"{size['float']} -> {size['quantised']} bytes ({size['ratio']:.3f} x)"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _escaped(text: str, *, inside: bool = False) -> str:
    """Text of a workflow command; `inside` its properties, where two more characters end it."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if inside else text
