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

if TYPE_CHECKING:  # they load onnxruntime, which `--help` need not wait for
    from qcompile.certificate import Certificate
    from qcompile.dyadic import Int64
    from qcompile.inspection import Rescale, Summary
    from qcompile.rewrite import Pass, Promise

_LOG_WIDTH = 10_000  # where there is no terminal: nothing is broken into lines, so that it can be searched
_REDRAW_SECONDS = 0.1
_WORST = 3  # layers that the summary names
_MOST_LINES = 12  # of one kind of finding; the JSON report has them all


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
    for line in (*_float_lines(report), *_worst_lines(report)):
        out.print(line)
    if report.get("imported"):
        out.print(_imported_line(report["imported"]))
    if report.get("targets"):
        out.print(_targets_line(report["targets"]))
    for line in _raised_lines(report):
        out.print(line)
    for key in ("verdict", "agreement_verdict"):
        verdict = report.get(key)
        if verdict:
            out.print(f"limit: {verdict['outcome']}: {verdict['reason']}")
    for warning in report.get("warnings") or ():
        out.print(f"warning: {warning}")


def print_bench(bench: Mapping[str, Any], out: Console) -> None:
    """Latency and size of two models."""
    out.print(_result_table(bench))


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
    print_rows(("stored as", "size"), [(kind, _bytes(count)) for kind, count in found.weight_bytes.items()], out)
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
    shown = found.floats if every else found.floats[:_MOST_LINES]
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
            _decibels(entry["sqnr_db"]) if "sqnr_db" in entry else "",
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
        scores = (f"{100 * accuracy[side]:.2f} %" for side in ("float", "quantised"))
        counts = f" ({accuracy['lost']} lost, {accuracy['won']} won)" if accuracy.get("lost") is not None else ""
        yield accuracy["metric"], *scores, f"drop {accuracy['drop_points']:.2f} points{counts}"
    if accuracy.get("top1_agreement") is not None:
        yield "top-1 agreement", "", f"{100 * accuracy['top1_agreement']:.2f} %", over
        over = ""
    yield "SQNR", "", f"{_decibels(accuracy['sqnr_db'])} dB", over
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
    yield "latency", f"{_three(latency['float'])} ms", f"{_three(latency['quantised'])} ms", speedup


def _size_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    size = report.get("size_bytes")
    if size:
        yield "size", _bytes(size["float"]), _bytes(size["quantised"]), f"{size['ratio']:.2f} x the size"


def _node_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    nodes = report.get("nodes")
    if nodes:
        yield "nodes at run time", "", f"{nodes['quantised']} integer", f"{nodes['float']} float"


def _float_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """Which nodes run in float, and why: by type those that were meant to, by name those that were not."""
    ops = (report.get("nodes") or {}).get("float_ops") or {}
    if ops:
        yield "runs in float: " + ", ".join(f"{count} {op}" for op, count in ops.items())
    fusion = report.get("fusion") or {}
    missed = fusion.get("not_fused") or ()
    yield from _cut([f"{e['op']} {e['node']} was to be integer but runs in float: {e['reason']}" for e in missed])
    alike: dict[tuple[str, str], list[str]] = {}
    for entry in fusion.get("leftover") or ():
        alike.setdefault((entry["op"], entry["reason"]), []).append(entry["node"])
    yield from _cut([_leftover_line(op, reason, nodes) for (op, reason), nodes in alike.items()])


def _imported_line(imported: Mapping[str, Any]) -> str:
    """What became of the scales and integers of an imported Q/DQ model."""
    channels, scales = imported["channels"], imported["scales"]
    line = f"imported: integers of {channels['kept']} channels kept, {channels['rounded']} rounded again"
    line += _counted(channels["reasons"])
    line += f"; {scales['kept']} scales kept, {scales['moved']} moved by up to {100 * scales['largest_move']:.3g} %"
    for words, counts in (("left float", imported["left_float"]), ("changed", imported["changed"])):
        line += f"; {words}{_counted(counts)}" if counts else ""
    return line


def _counted(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} x {reason}' for reason, count in counts.items())})" if counts else ""


def _targets_line(targets: Mapping[str, Any]) -> str:
    """`any` beside `vnni`: SQNR and agreement of both, and why where `any` costs much."""
    sides = []
    for name in ("any", "vnni"):
        agreement = targets[name].get("top1_agreement")
        agrees = "" if agreement is None else f", agreement {100 * agreement:.2f} %"
        sides.append(f"{name} {_decibels(targets[name]['sqnr_db'])} dB{agrees}")
    cost, reason = targets.get("any_costs_db"), targets.get("reason")
    line = "targets: " + "; ".join(sides)
    line += "" if cost is None else f"; the same bits everywhere cost {cost:.2f} dB"
    return line + (f": {reason}" if reason else "")


def _worst_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """The layers that cost most, each measured alone; those without any error are never named."""
    noisy = [layer for layer in report.get("layers") or () if layer["own_db"] is not None]
    for layer in sorted(noisy, key=lambda found: float(found["own_db"]))[:_WORST]:
        at_end = f"{_decibels(layer['sqnr_out_db'])} dB with all before it"
        yield f"costs most: {layer['op']} {layer['node']} ({layer['bits']} bits): {layer['own_db']:.2f} dB alone, {at_end}"


def _raised_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """Which layers were raised to hold a limit, and on how many samples that was decided."""
    fallback = report.get("fallback")
    if not fallback or not fallback["raised"]:
        return
    held = "holds" if fallback["held"] else "does not hold even so"
    raised = f"{len(fallback['raised'])} layer{'s' if len(fallback['raised']) != 1 else ''} raised"
    yield f"{raised}; the limit {held} on the {fallback['samples']['search']} samples to choose by"
    yield from _cut([_raised_line(move) for move in fallback["raised"]])


def _raised_line(move: Mapping[str, Any]) -> str:
    width = "float" if move["to_bits"] == 32 else f"{move['to_bits']} bits"
    why = f"{_decibels(move['own_db'])} dB alone, for {_bytes(move['bytes_added'])}"
    return f"raised: {move['op']} {move['node']} from {move['from_bits']} bits to {width}: {why}"


def _leftover_line(op: str, reason: str, nodes: list[str]) -> str:
    if len(nodes) == 1:
        return f"{op} {nodes[0]} stays at run time: {reason}"
    return f"{len(nodes)} {op} stay at run time (first {nodes[0]}): {reason}"


def _cut(lines: list[str]) -> Iterable[str]:
    yield from lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        yield f"... and {len(lines) - _MOST_LINES} more like it; the JSON report (--report) lists all"


def _decibels(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"


def _three(value: float) -> str:
    """Three significant digits without an exponent: 0.0177, 4.51, 123."""
    decimals = 0
    while decimals < 6 and abs(value) * 10**decimals < 99.5:
        decimals += 1
    return f"{value:.{decimals}f}"


def _bytes(count: int) -> str:
    """Decimal units: 95.0 kB, 13.6 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{_three(value)} {unit}" if unit != "B" else f"{count} B"
        value /= 1000
    return f"{_three(value)} GB"
