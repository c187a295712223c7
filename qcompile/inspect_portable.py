"""`qcompile inspect --portable`: what in a file differs on which machine, as a table, and exit status 3 where that is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from qcompile.errors import LimitError
from qcompile.portable import RULES, Portability, portability
from qcompile.printing import console, print_rows

_MOST = 8  # findings of one rule that are printed


def inspect_portable(model: Path, required: bool, among: str) -> None:
    """Print the findings. Raises LimitError where `required` and one concerns `among` (onnxruntime | all)."""
    found = portability(model)
    print_portable(found, console())
    against = found.among(among)
    if required and against:
        first = against[0]
        place = f" at '{first.node}'" if first.node else ""
        where = ", ".join(first.machines)
        raise LimitError(f"{model}: not portable: {len(against)} findings, first {first.rule}{place} ({first.detail}) on {where}")


def print_portable(found: Portability, out: Console) -> None:
    """One row a finding, at most `_MOST` a rule, and which versions read the file."""
    shown: Counter[str] = Counter()
    rows = []
    for finding in found.findings:
        shown[finding.rule] += 1
        if shown[finding.rule] <= _MOST:
            rows.append((finding.rule, finding.node, finding.op, finding.effect, ", ".join(finding.machines), finding.detail))
    if rows:
        print_rows(("rule", "node", "operator", "effect", "on", "why"), rows, out)
    for rule, count in shown.items():
        more = f"; {_MOST} of {count} shown, --json lists all" if count > _MOST else ""
        out.print(f"{rule}: {RULES[rule]}{more}")
    needs = ", ".join(f"{runtime} {version or 'none yet'}" for runtime, version in found.needs.items())
    out.print(f"least versions that read it: {needs}")
    out.print(
        "portable: yes, the same bits on every machine" if found.portable else f"portable: no, {len(found.findings)} findings"
    )
