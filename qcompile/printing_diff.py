"""The result of `qcompile diff` on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from qcompile.printing import print_rows

if TYPE_CHECKING:
    from qcompile.diff import Difference, Point

_AROUND = 3  # points shown before and after the first


def print_difference(found: Difference, out: Console, *, every: bool = False) -> None:
    """The tensors around the first difference (all with `every`), then the first and the worst in words."""
    points = list(found.points)
    shown = points
    if not every:
        at = points.index(found.first) if found.first is not None else 0
        shown = points[max(0, at - _AROUND) : at + _AROUND + 1]
    rows = [(p.layer, p.op, p.tensor, _cell(p.identical, p.sqnr_db), _decibels(p.own_db)) for p in shown]
    print_rows(("layer", "operator", "tensor", "SQNR dB", "by itself dB"), rows, out)
    out.print(f"compared {len(points)} tensors on {found.samples} samples; {found.nodes[0]} and {found.nodes[1]} nodes")
    if found.first is None:
        far = "bit for bit" if found.within_db is None else f"within {found.within_db:g} dB"
        out.print(f"the models agree {far} wherever they were compared")
        return
    out.print(f"they part first at {found.first.op} {found.first.layer}{_changes(found.first)}")
    worst = found.worst
    if worst is not None:
        out.print(f"most is added at {worst.op} {worst.layer}: {_decibels(worst.own_db)} dB by itself{_changes(worst)}")


def _changes(point: Point) -> str:
    if not point.constants:
        return ""
    shown = ", ".join(f"{name} by {100 * change:.3g} %" for name, change in point.constants[:4])
    more = f" and {len(point.constants) - 4} more" if len(point.constants) > 4 else ""
    return f"; constants that differ: {shown}{more}"


def _cell(identical: bool, value: float | None) -> str:
    return "equal" if identical else _decibels(value)


def _decibels(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"
