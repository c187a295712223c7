"""Tables of sensitivities and of mixed precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_FLOAT = 32


def print_sensitivity(found: Mapping[str, Any], out: Console) -> None:
    """One row a layer: trace, and the KL of each width where that layer alone has it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    widths = [c["bits"] for c in found["layers"][0]["widths"]] if found["layers"] else []
    table.add_column("layer")
    top = any(layer["eigenvalue"] is not None for layer in found["layers"])
    eigenvalue = ("top eigenvalue",) if top else ()
    for name in ("weights", "trace", "95 % interval", "probes", *eigenvalue, *(f"KL at {b}" for b in widths)):
        table.add_column(name, justify="right")
    for layer in found["layers"]:
        measured = (f"{c['kl']:.2e}" for c in layer["widths"])
        shown = (_eigenvalue(layer["eigenvalue"]),) if top else ()
        table.add_row(layer["node"], str(layer["weights"]), *_trace(layer["trace"]), *shown, *measured)
    out.print(table)
    if found.get("groups"):
        out.print(_groups_table(found["groups"]))
    out.print(_correlation(found))


def _groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """One row a group of activations of one width: who reads it, and the KL of each width where it alone has that."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("activations of one width")
    table.add_column("tensors", justify="right")
    table.add_column("read by", justify="right")
    for cost in groups[0]["widths"]:
        table.add_column(f"KL at {cost['bits']}", justify="right")
    for group in groups:
        first, counts = group["tensors"][0], (len(group["tensors"]), len(group["read_by"]))
        table.add_row(first, *map(str, counts), *(f"{c['kl']:.2e}" for c in group["widths"]))
    return table


def mixed_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What mixed precision chose, in a few lines."""
    mixed = report.get("mixed")
    if not mixed:
        return
    limits = ", ".join(f"{name} <= {value:g}" for name, value in mixed["limits"].items())
    counts: dict[int, int] = {}
    for layer in mixed["layers"]:
        counts[layer["bits"]] = counts.get(layer["bits"], 0) + 1
    spread = ", ".join(f"{n} x {'float' if b == _FLOAT else f'{b} bits'}" for b, n in sorted(counts.items()))
    yield f"mixed precision ({limits}): {mixed['average_bits']:.3f} bits a weight, by {mixed['by']}; layers: {spread}"
    yield from _activation_lines(mixed)
    for row in mixed["candidates"]:
        reached = "no error" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f} dB"
        yield f"  by {row['by']}: {row['average_bits']:.3f} bits, {reached} on calibration samples held out"
    yield _correlation(mixed)


def _activation_lines(mixed: Mapping[str, Any]) -> Iterator[str]:
    """Widths of what layers read, and which layers had to share one."""
    counts: dict[int, int] = {}
    for layer in mixed["layers"]:
        counts[layer["activation_bits"]] = counts.get(layer["activation_bits"], 0) + 1
    if any(layer["activation_bits"] != 8 and layer["bits"] != _FLOAT for layer in mixed["layers"]):
        spread = ", ".join(f"{n} x {'float' if b == _FLOAT else f'{b} bits'}" for b, n in sorted(counts.items()))
        yield f"activations that layers read: {spread}"
    layers = {layer["node"] for layer in mixed["layers"]}
    for group in mixed.get("groups", ()):
        tied = [name for name in group["read_by"] if name in layers]
        if len(tied) > 1:
            more = f" ... {tied[-1]}" if len(tied) > 2 else f", {tied[-1]}"
            width = "float" if group["bits"] == _FLOAT else f"{group['bits']} bits"
            yield f"  one width, {width}, for {len(tied)} layers: {tied[0]}{more}"


def _correlation(found: Mapping[str, Any]) -> str:
    value = found["rank_correlation"].get("all")
    if value is None:
        return f"no traces; measured on {found['samples']} samples"
    return f"rank correlation of prediction and measured KL: {value:.2f} (Hessian of {found['loss']}, {found['samples']} samples)"


def _trace(trace: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if trace is None:
        return "-", "-", "0"
    ends = "-" if trace["low"] is None else f"{trace['low']:.3g} .. {trace['high']:.3g}"
    return f"{trace['mean']:.3g}", ends, str(trace["probes"])


def _eigenvalue(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['value']:.3g}" + ("" if found["tight"] else " (not settled)")
