"""`qcompile inspect --sparsity`: which layers of a file are sparse in which pattern, and who can make use of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qcompile.errors import LimitError
from qcompile.layer_counts import LayerCount, count_layers, share_that_follows
from qcompile.printing import console, print_rows
from qcompile.semi_structured import export
from qcompile.sparsity import Rule, parse_sparsity


def inspect_sparsity(model: Path, text: str, required: float | None) -> None:
    """Print zeros and pattern `text` of each layer of the file. Raises LimitError where less than `required` of it follows."""
    rule = parse_sparsity(text)
    layers = count_layers(model)
    print_layers(layers, rule, console())
    share = share_that_follows(layers, rule)
    if required is not None and share < required:
        raise LimitError(f"{model}: {100 * share:.1f} % of the weights follow {rule}, less than {100 * required:g} %")


def inspect_export(model: Path, folder: Path) -> None:
    """Write the file's 2:4 layers into `folder` and say which."""
    manifest, out = export(model, folder), console()
    rows = [(e["file"], e["node"], e["op"], e["rows"], e["columns"], e["dtype"]) for e in manifest["layers"]]
    print_rows(("file", "layer", "operator", "rows", "reduction", "values"), rows, out)
    out.print(f"wrote {len(rows)} layers to {folder}; {len(manifest['skipped'])} left out, with reasons in manifest.json")


def print_layers(found: Sequence[LayerCount], rule: Rule, out: Console) -> None:
    """Zeros of each weighted layer, whether it follows `rule`, and whether 2:4 sparse tensor cores can use it."""
    rows = []
    for layer in found:
        refusal = layer.sparse_refusal()
        zeros = f"{100 * layer.zeros / max(layer.weights, 1):.1f} %"
        follows = "yes" if layer.follows(rule) else "no"
        usable = f"no: {refusal}" if refusal else "yes"
        rows.append((layer.node, layer.op, layer.weights, zeros, layer.weight_bits, follows, usable))
    if rows:
        print_rows(("layer", "operator", "weights", "zeros", "bits", str(rule), "sparse tensor cores"), rows, out)
    suit = sum(not layer.sparse_refusal() for layer in found)
    share = f"{100 * share_that_follows(found, rule):.1f} % of the weights (depthwise aside) follow {rule}"
    out.print(f"{share}; {suit} of {len(found)} layers suit sparse tensor cores")
