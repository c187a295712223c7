"""Sentences below the tables of a report: what stays float, what was imported, raised, and what costs most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WORST = 3  # layers that the summary names
MOST_LINES = 12  # of one kind of finding; the JSON report has them all


def float_lines(report: Mapping[str, Any]) -> Iterable[str]:
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


def imported_line(imported: Mapping[str, Any]) -> str:
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


def targets_line(targets: Mapping[str, Any]) -> str:
    """`any` beside `vnni`: SQNR and agreement of both, and why where `any` costs much."""
    sides = []
    for name in ("any", "vnni"):
        agreement = targets[name].get("top1_agreement")
        agrees = "" if agreement is None else f", agreement {100 * agreement:.2f} %"
        sides.append(f"{name} {decibels(targets[name]['sqnr_db'])} dB{agrees}")
    cost, reason = targets.get("any_costs_db"), targets.get("reason")
    line = "targets: " + "; ".join(sides)
    line += "" if cost is None else f"; the same bits everywhere cost {cost:.2f} dB"
    return line + (f": {reason}" if reason else "")


def worst_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """The layers that cost most, each measured alone; those without any error are never named."""
    noisy = [layer for layer in report.get("layers") or () if layer["own_db"] is not None]
    for layer in sorted(noisy, key=lambda found: float(found["own_db"]))[:_WORST]:
        at_end = f"{decibels(layer['sqnr_out_db'])} dB with all before it"
        read = layer.get("activation_bits", 8)  # reports of earlier versions do not tell
        bits = f"{layer['bits']} bits" + (f", reads {read}" if read != 8 else "")
        yield f"costs most: {layer['op']} {layer['node']} ({bits}): {layer['own_db']:.2f} dB alone, {at_end}"


def raised_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """Which layers were raised to hold a limit, and on how many samples that was decided."""
    fallback = report.get("fallback")
    if not fallback or not fallback["raised"]:
        return
    held = "holds" if fallback["held"] else "does not hold even so"
    raised = f"{len(fallback['raised'])} layer{'s' if len(fallback['raised']) != 1 else ''} raised"
    yield f"{raised}; the limit {held} on the {fallback['samples']['search']} samples to choose by"
    yield from _cut([raised_line(move) for move in fallback["raised"]])


def raised_line(move: Mapping[str, Any]) -> str:
    """One layer raised to hold a limit, and what that cost."""
    width = "float" if move["to_bits"] == 32 else f"{move['to_bits']} bits"
    why = f"{decibels(move['own_db'])} dB alone, for {bytes_text(move['bytes_added'])}"
    read = move.get("from_activation_bits", 8)  # reports of earlier versions do not tell
    before = f"{move['from_bits']} bits" + (f", reading {read}," if read != 8 else "")
    return f"raised: {move['op']} {move['node']} from {before} to {width}: {why}"


def _leftover_line(op: str, reason: str, nodes: list[str]) -> str:
    if len(nodes) == 1:
        return f"{op} {nodes[0]} stays at run time: {reason}"
    return f"{len(nodes)} {op} stay at run time (first {nodes[0]}): {reason}"


def _cut(lines: list[str]) -> Iterable[str]:
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield f"... and {len(lines) - MOST_LINES} more like it; the JSON report (--report) lists all"


def decibels(value: float | None) -> str:
    """Two figures behind the point; no error at all is infinite."""
    return "inf" if value is None else f"{value:.2f}"


def count_text(value: int) -> str:
    """1.2 k, 3.4 M, 5.6 G."""
    number = float(value)
    for unit in ("", " k", " M"):
        if number < 999.5:
            return f"{three_figures(number)}{unit}" if unit else str(value)
        number /= 1000
    return f"{three_figures(number)} G"


def three_figures(value: float) -> str:
    """Three significant digits without an exponent: 0.0177, 4.51, 123."""
    decimals = 0
    while decimals < 6 and abs(value) * 10**decimals < 99.5:
        decimals += 1
    return f"{value:.{decimals}f}"


def bytes_text(count: int) -> str:
    """Decimal units: 95.0 kB, 13.6 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{three_figures(value)} {unit}" if unit != "B" else f"{count} B"
        value /= 1000
    return f"{three_figures(value)} GB"
