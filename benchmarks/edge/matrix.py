"""`make edge`: every case on every machine, bit for bit against the file interpreter; a matrix, printed and as markdown.

Exit status 1 where a machine gives other bits on a case that promises them, where a broken file does not show on the machine it
names, or where OpenVINO or tract leave the tolerance. What is not installed is skipped with its name.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

from cases import ROOT, Built, build
from machines import Machine, machines, others

#: OpenVINO and tract on `qdq` and `integer` files: largest difference as a share of the output's range.
TOLERANCE = {"qdq": 0.05, "integer": 0.05}
#: How many exact ties the set must hold.
LEAST_TIES = 5000
Results = dict[str, dict[str, dict[str, Any]]]


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "edge")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "edge-matrix.md")
    arguments = parser.parse_args()
    cache = arguments.cache.resolve()
    built = build(cache / "cases", cache / "compiled")
    for name, why in built.skipped.items():
        print(f"skipped: {name}: {why}")
    start, versions, skipped = time.monotonic(), {}, dict(built.skipped)
    results: Results = {}
    names = [*built.cases, *(f"broken.{r.removeprefix('broken.')}" for r in built.broken)]
    for machine in machines(cache):
        if machine.missing:
            skipped[machine.name] = f"{machine.missing} is not installed"
            print(f"skipped: {machine.name}: {machine.missing} is not installed")
            continue
        results[machine.name] = _ask(machine, cache / "cases", names, versions)
    loose = {}
    for machine in others(cache):
        if machine.missing:
            skipped[machine.name] = f"{machine.missing} is not installed"
            print(f"skipped: {machine.name}: {machine.missing} is not installed")
            continue
        asked = [n for n, f in built.cases.items() if f in TOLERANCE] + ["broken.only-onnxruntime"]
        loose[machine.name] = _ask(machine, cache / "cases", asked, versions)
    text, faults = report(built, results, loose, versions, skipped)
    print(text)
    arguments.output.write_text(text, encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s after set-up; wrote {arguments.output}")
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _ask(machine: Machine, cases: Path, names: list[str], versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    found, start = {}, time.monotonic()
    for line in machine.run(cases, names):
        if "ready" in line:
            versions[machine.name] = str(line["ready"])
        else:
            found[str(line.pop("case"))] = line
    print(f"{machine.name}: {len(found)} cases in {time.monotonic() - start:.0f} s", flush=True)
    return found


def _group(name: str, format_: str) -> str:
    return f"{name.split('.')[0]} {format_}"


def report(
    built: Built, results: Results, loose: Results, versions: dict[str, str], skipped: dict[str, str]
) -> tuple[str, list[str]]:
    """(markdown, faults)."""
    faults: list[str] = []
    if built.ties < LEAST_TIES:
        faults.append(f"{built.ties} exact ties, at least {LEAST_TIES} are wanted")
    groups: dict[str, list[str]] = {}
    for name, format_ in built.cases.items():
        groups.setdefault(_group(name, format_), []).append(name)
    floats = built.floats
    lines = [
        "# One file on every machine",
        "",
        "Written by `make edge`; what is compared and how, stands in [deploy.md](deploy.md#the-matrix). Every output of every",
        f"case, bit for bit against the file interpreter. The tie-heavy set holds {built.ties} exact ties.",
        "Emulated: AVX2 (`qemu-x86_64 -cpu Haswell`), SSE",
        "(`Nehalem`) and all of ARM64 (`qemu-aarch64-static`); native is this machine.",
        "",
        f"| case | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    for group, names in groups.items():
        cells = []
        for machine, found in results.items():
            cell, bad = _cell([found[n] for n in names])
            promised = not any(floats.get(n) for n in names)
            if bad and promised:
                faults.append(f"{group} on {machine}: {cell}")
            cells.append(cell if promised or not bad else f"{cell} (float)")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    lines += [
        "",
        "`(float)`: float operators (Softmax, LayerNormalization, GELU) are in the file; no machine promises their last bit.",
    ]
    lines += [
        "",
        "## Broken on purpose",
        "",
        "One file for each rule of `qcompile inspect --portable`. `loads not`: the runtime refuses it.",
    ]
    lines += [
        "",
        f"| rule | meant to show on | {' | '.join([*results, *loose])} |",
        f"|---|---|{'---|' * (len(results) + len(loose))}",
    ]
    for name, place in built.broken.items():
        cells = []
        for machine, found in [*results.items(), *loose.items()]:
            if name not in found:
                cells.append("")
                continue
            cell, bad = _cell([found[name]])
            cells.append(cell)
            if machine == place and (not bad or "fault" in found[name]):
                faults.append(f"{name} does not show on {machine}")
        lines.append(f"| {name.removeprefix('broken.')} | {place} | {' | '.join(cells)} |")
    if loose:
        lines += _loose(built, groups, loose, faults)
    lines += ["", "## Versions", ""]
    lines += [f"- {machine}: onnxruntime {version}" for machine, version in versions.items()]
    lines += [f"- native: {platform.machine()}, Python {platform.python_version()}"]
    lines += [f"- skipped: {name}: {why}" for name, why in skipped.items()]
    lines += [f"- operators in the files: {', '.join(sorted(built.operators))}", ""]
    return "\n".join(lines), faults


def _loose(built: Built, groups: dict[str, list[str]], loose: Results, faults: list[str]) -> list[str]:
    """The table of runtimes that promise no bits."""
    lines = ["", "## Other runtimes", ""]
    limits = ", ".join(f"{100 * share:g} % for `{name}`" for name, share in TOLERANCE.items())
    lines += [f"Largest difference as a share of the output's range, and the share of outputs that differ; tolerance {limits}."]
    lines += ["", f"| case | {' | '.join(loose)} |", f"|---|{'---|' * len(loose)}"]
    for group, names in groups.items():
        format_ = built.cases[names[0]]
        if format_ not in TOLERANCE:
            continue
        cells = []
        for found in loose.values():
            loaded = [found[n] for n in names if "error" not in found[n]]
            if not loaded:
                cells.append(f"loads not: {found[names[0]]['error'][:60]}".replace("|", "/"))
                continue
            largest = max(f["largest"] for f in loaded)
            share = sum(f["differ"] for f in loaded) / sum(f["of"] for f in loaded)
            partly = "" if len(loaded) == len(names) else f", {len(names) - len(loaded)} of {len(names)} load not"
            cells.append(f"{100 * largest:.2g} %, {100 * share:.2g} % of outputs{partly}")
            if largest > TOLERANCE[format_]:
                cells[-1] += " (outside)"
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return lines


def _cell(found: list[dict[str, Any]]) -> tuple[str, bool]:
    """(text, whether something is not the same)."""
    faults = [f["fault"] for f in found if "fault" in f]
    if faults:
        return f"no answer ({faults[0][:60]})".replace("|", "/"), True
    errors = [f for f in found if "error" in f]
    if errors:
        return "loads not", True
    differ, of = sum(f["differ"] for f in found), sum(f["of"] for f in found)
    return ("same", False) if not differ else (f"{differ} of {of} differ", True)


if __name__ == "__main__":
    sys.exit(main())
