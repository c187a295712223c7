"""What a model holds and costs, in words: the report's `sparsity`, `complexity` and counts with units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def sparsity_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """What became sparse, and what the whole model holds and costs before and after."""
    found = report.get("sparsity")
    if found:
        zeros = f"{found['zeros']} of {found['weights']} weights are zero in {len(found['layers'])} layers"
        follows = found["share_that_follows"]
        whole = "" if follows is None else f"; {100 * follows:.1f} % of all weights (depthwise aside) follow {found['rule']}"
        yield f"sparsity {found['rule']} by {found['criterion']}: {zeros}{whole}"
    pruned = report.get("pruning")
    if pruned:
        counted = sum(x["channels"] for x in pruned["layers"]), sum(x["kept"] for x in pruned["layers"])
        share = f"{pruned['ratio']:g} of the {pruned['budget']} was to go"
        layers, implanted = len(pruned["layers"]), sum(x["implanted"] for x in pruned["layers"])
        implants = f" and {implanted} 1x1 filters" if implanted else ""
        yield f"pruned by {pruned['criterion']}: {counted[0]} channels of {layers} layers became {counted[1]}{implants}; {share}"
    for side, counts in (report.get("complexity") or {}).items():
        costs = "".join(f", {engineering(counts[key])} {name}" for key, name in (("macs", "MACs"), ("bops", "BOPS")))
        yield f"{side}: {engineering(counts['parameters'])} weights, {engineering(counts['zeros'])} of them zero{costs}"


def engineering(count: int | None) -> str:
    """Three digits and a unit; `?` where it is not known."""
    if count is None:
        return "?"
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)
