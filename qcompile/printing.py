"""The report as tables on a terminal, in a file or in a log; it states nothing that the JSON report does not hold."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from qcompile.printing_counts import sparsity_lines
from qcompile.printing_lines import (
    MOST_LINES,
    bytes_text,
    count_text,
    decibels,
    float_lines,
    imported_line,
    raised_lines,
    targets_line,
    three_figures,
    worst_lines,
)
from qcompile.printing_mixed import mixed_lines

if TYPE_CHECKING:  # they load onnxruntime, which `--help` need not wait for
    from qcompile.certificate import Certificate
    from qcompile.dyadic import Int64
    from qcompile.inspection import Summary
    from qcompile.inspection_written import Rescale
    from qcompile.rewrite import Pass, Promise

_LOG_WIDTH = 10_000  # where there is no terminal: nothing is broken into lines, so that it can be searched
_REDRAW_SECONDS = 0.1


class ReaderGone(Exception):
    """Whoever read the output has gone (`qcompile ... | head`)."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let Python close stdout in peace, and end the program in its own way instead of by SystemExit(1)."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGone


def console(stream: IO[str] | None = None) -> Console:
    """A console that prints names as they are: brackets are no markup, numbers get no colour of their own."""
    stream = sys.stdout if stream is None else stream
    width = None if stream.isatty() else _LOG_WIDTH
    return _Console(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


class TerminalProgress:
    """Progress bars on `stream` while it is a terminal; says nothing elsewhere. Use as a context manager.

    Called as `progress(stage, done, total)`: a new stage ends the one before; `total` is None where nobody knows. Drawn only
    when called, and not by a thread: that would take its share of the processor while latency is measured.
    """

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        stream = sys.stderr if stream is None else stream
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
        disable = quiet or not stream.isatty()
        self._bars = Bars(*columns, console=console(stream), transient=True, auto_refresh=False, disable=disable)
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._drawn = 0.0

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` steps of `stage` are finished."""
        new = stage != self._stage or self._task is None
        if self._task is None or new:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._stage, self._task = stage, self._bars.add_task(stage, total=total, count="")
        count = f"{done}/{total}" if total is not None else str(done or "")
        self._bars.update(self._task, completed=done, total=total, count=count)
        if new or time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._bars.refresh()
            self._drawn = time.monotonic()


def print_report(report: Mapping[str, Any], out: Console) -> None:
    """Passes, results, what stayed float, the verdict and the warnings of one compilation or check."""
    if report.get("passes"):
        out.print(_pass_table(report["passes"]))
    out.print(_result_table(report))
    for line in (*mixed_lines(report), *sparsity_lines(report), *float_lines(report), *worst_lines(report)):
        out.print(line)
    if report.get("imported"):
        out.print(imported_line(report["imported"]))
    if report.get("targets"):
        out.print(targets_line(report["targets"]))
    for line in raised_lines(report):
        out.print(line)
    for line in _limit_lines(report):
        out.print(line)
    for warning in report.get("warnings") or ():
        out.print(f"warning: {warning}")


def _limit_lines(report: Mapping[str, Any]) -> Iterable[str]:
    gate = report.get("gate")
    if gate:
        yield from (f"limit: {entry['outcome']}: {entry['limit']}: {entry['reason']}" for entry in gate["limits"])
        return
    for key in ("verdict", "agreement_verdict"):
        verdict = report.get(key)
        if verdict:
            yield f"limit: {verdict['outcome']}: {verdict['reason']}"


def print_bench(bench: Mapping[str, Any], out: Console) -> None:
    """One row a model, then the time by operator of each."""
    rows = []
    for entry in bench["models"]:
        latency, speedup, cold = entry["latency_ms"], entry["speedup"], entry["cold_start"]
        share = None if entry["peak_share"] is None else f"{100 * entry['peak_share']:.1f} %"
        row = [
            entry["path"],
            f"{three_figures(latency['median'])} ms",
            f"{three_figures(latency['low'])} to {three_figures(latency['high'])}",
        ]
        row += [f"{speedup['median']:.2f} x ({speedup['low']:.2f} to {speedup['high']:.2f})", bytes_text(entry["size_bytes"])]
        row += ["" if entry["macs"] is None else count_text(entry["macs"]), share or "unknown"]
        row += ["", ""] if cold is None else [f"{three_figures(cold['load_ms'])} ms", f"{cold['peak_rss_mb']:.0f} MB"]
        rows.append(row)
    columns = ("model", "median", "95 %", "as fast", "size", "MACs", "of int8 peak", "cold load", "peak memory")
    print_rows(columns, rows, out)
    for entry in bench["models"]:
        shown = (entry["operators"] or [])[:MOST_LINES]
        if shown:
            times = [(o["op"], o["calls"], f"{o['ms']:.4f}", f"{100 * o['share']:.1f} %") for o in shown]
            print_rows(("operator", "calls", "ms", "share"), times, out, title=entry["path"])
    threads = f"{bench['threads']} thread{'s' if bench['threads'] != 1 else ''}"
    if bench["peak_gops"] is None:
        out.print(f"{threads}; {bench['runtime']}")
        return
    out.print(f"{threads}; int8 peak {bench['peak_gops']:.0f} GOP/s, measured by a large MatMulInteger in the same rounds")


def print_passes(passes: Iterable[Pass], out: Console) -> None:
    """Each pass with its promise and the first line of its description."""
    rows = []
    for entry in passes:
        text = inspect.getdoc(entry) or ""
        rows.append((entry.name, _promise(entry.keeps), text.split("\n", 1)[0]))
    print_rows(("pass", "outputs stay", "what it does"), rows, out)


def print_rescales(found: Sequence[Rescale], out: Console) -> None:
    """Each rescale: b and c of b/2^c, or p and q of p/q for sums and products; then how many are exact."""
    rows = [(r.node, r.op, r.kind, *_factors(r), "yes" if r.exact else f"no: {r.reason}") for r in found]
    if rows:
        print_rows(("node", "op", "kind", "channels", "b (p)", "c (q)", "exact"), rows, out)
    inexact = sum(not r.exact for r in found)
    verdict = "all exact" if not inexact else f"{len(found) - inexact} exact, {inexact} not"
    out.print("no rescales" if not found else f"{len(found)} rescale{'s' if len(found) != 1 else ''}, {verdict}")


def print_summary(found: Summary, out: Console) -> None:
    """What a file holds, as `inspection.summary` counted it."""
    out.print(f"formats: {', '.join(found.formats) or 'none'}")
    ops = [(op, found.integer_ops.get(op), found.float_ops.get(op)) for op in sorted({*found.integer_ops, *found.float_ops})]
    print_rows(("operator", "integer", "float"), ops, out)
    print_rows(("stored as", "size"), [(kind, bytes_text(count)) for kind, count in found.weight_bytes.items()], out)
    out.print(f"QuantizeLinear nodes on activations: {found.activation_quantisers}")


def print_certificate(found: Certificate, out: Console, *, every: bool = False) -> None:
    """Whether a file is integer-only, its ends, and the float tensors between them: the first few, or with `every` all."""
    kinds = [(kind, count) for kind, count in found.element_types.items()]
    print_rows(("computes in", "tensors"), kinds, out)
    if found.functions:
        print_rows(("function", "calls"), list(found.functions.items()), out)
    out.print(f"integer-only: {'yes' if found.integer_only else 'no'}")
    if found.integer_only:
        print_rows(("end", "node", "operator"), [(e.kind, e.node, e.op) for e in found.ends], out)
        return
    shown = found.floats if every else found.floats[:MOST_LINES]
    print_rows(("float tensor", "node", "operator", "why"), [(f.tensor, f.node, f.op, f.reason) for f in shown], out)
    if len(shown) < len(found.floats):
        out.print(f"... and {len(found.floats) - len(shown)} more; --require-integer-only names them all")


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], out: Console, *, title: str | None = None) -> None:
    """A plain table; numbers stand to the right, anything else to the left, None is left blank."""
    body = list(rows)
    table = _table(title)
    for index, column in enumerate(columns):
        numeric = any(_is_number(row[index]) for row in body)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    out.print(table)


def _promise(promise: Promise) -> str:
    from qcompile.rewrite import Close, Exact, Lossy

    match promise:
        case Exact():
            return "the same, bit for bit"
        case Close(rtol):
            return f"within {rtol:g} of the largest"
        case Lossy(least):
            return f"above {least:g} dB"


def _factors(rescale: Rescale) -> tuple[int | None, str, str]:
    """(channels, b or p, c or q); ranges where channels differ."""
    if rescale.p is not None:
        return None, ", ".join(map(str, rescale.p)), str(rescale.q)
    if rescale.b is None or rescale.c is None:
        return None, "", ""
    return rescale.b.size, _range(rescale.b), _range(rescale.c)


def _range(values: Int64) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _table(title: str | None = None) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, show_edge=False)


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _pass_table(passes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("passes")
    for column in ("pass", "rewrites", "left alone", "seconds", "SQNR dB"):
        table.add_column(column, justify="left" if column in ("pass", "left alone") else "right", overflow="fold")
    for entry in passes:
        skipped = "\n".join(f"{count} x {reason}" for reason, count in entry.get("skipped", {}).items())
        seconds = entry.get("seconds")
        table.add_row(
            str(entry["name"]),
            str(entry["rewrites"]),
            skipped,
            "" if seconds is None else f"{seconds:.2f}",
            decibels(entry["sqnr_db"]) if "sqnr_db" in entry else "",
        )
    return table


def _result_table(report: Mapping[str, Any]) -> Table:
    table = _table("result")
    table.add_column("measure")
    for column in ("imported" if report.get("imported") else "float", "quantised"):
        table.add_column(column, justify="right")
    table.add_column("difference", overflow="fold")
    for row in (*_accuracy_rows(report), *_latency_rows(report), *_size_rows(report), *_node_rows(report)):
        table.add_row(*row)
    return table


def _accuracy_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    accuracy = report.get("accuracy")
    if not accuracy:
        return
    over = _over(report, accuracy["samples"])
    if accuracy.get("metric"):
        share = accuracy["metric"] == "f1" or accuracy["metric"].startswith("top")
        scores = (f"{100 * accuracy[side]:.2f} %" if share else f"{accuracy[side]:.6g}" for side in ("float", "quantised"))
        counts = f" ({accuracy['lost']} lost, {accuracy['won']} won)" if accuracy.get("lost") is not None else ""
        unit = "%" if accuracy["metric"] == "mse" else "points"
        yield accuracy["metric"], *scores, f"drop {accuracy['drop_points']:.2f} {unit}{counts}"
    if accuracy.get("top1_agreement") is not None:
        yield "top-1 agreement", "", f"{100 * accuracy['top1_agreement']:.2f} %", over
        over = ""
    yield "SQNR", "", f"{decibels(accuracy['sqnr_db'])} dB", over
    if accuracy.get("cosine") is not None:
        yield "cosine", "", f"{accuracy['cosine']:.6f}", ""


def _over(report: Mapping[str, Any], samples: int) -> str:
    kind = ((report.get("data") or {}).get("evaluation") or {}).get("kind", "evaluation")
    which = "" if kind == "evaluation" else f"{kind} "
    return f"over {samples} {which}sample{'s' if samples != 1 else ''}"


def _latency_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    latency = report.get("latency_ms")
    if not latency:
        return
    low, high = latency.get("speedup_low"), latency.get("speedup_high")
    interval = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    threads = f"{latency['threads']} thread{'s' if latency['threads'] != 1 else ''}"
    speedup = f"{latency['speedup']:.2f} x as fast{interval}, {threads}"
    yield "latency", f"{three_figures(latency['float'])} ms", f"{three_figures(latency['quantised'])} ms", speedup


def _size_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    size = report.get("size_bytes")
    if size:
        yield "size", bytes_text(size["float"]), bytes_text(size["quantised"]), f"{size['ratio']:.2f} x the size"


def _node_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    nodes = report.get("nodes")
    if nodes:
        yield "nodes at run time", "", f"{nodes['quantised']} integer", f"{nodes['float']} float"
