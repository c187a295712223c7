"""`qcompile inspect` on a terminal: the facts of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from qcompile.printing import print_rows
from qcompile.printing_lines import bytes_text, count_text

_MOST = 12


def print_facts(found: Mapping[str, Any], out: Console) -> None:
    """The head of a file: what it is, what it takes and gives, how much it computes, and what onnxruntime makes of it."""
    file, macs = found["file"], found["macs"]
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    made_by = found["producer"] or "unknown"
    out.print(f"{file['path']}: {bytes_text(file['size_bytes'])}, IR {found['ir_version']}, opset {opsets}, by {made_by}")
    ends = [("input", v) for v in found["inputs"]] + [("output", v) for v in found["outputs"]]
    print_rows(("end", "name", "type", "shape"), [(end, v["name"], v["type"], _shape(v["shape"])) for end, v in ends], out)
    out.print(f"nodes: {found['nodes']}; parameters: {count_text(found['parameters'])}")
    if macs["total"] is None:
        out.print(f"multiply-accumulates: unknown: {macs['reason']}")
    else:
        shapes = ", ".join(f"{name} {shape}" for name, shape in macs["inputs"].items())
        out.print(f"multiply-accumulates: {count_text(macs['total'])} at {shapes}")
    sparsity = found["sparsity"]
    out.print(f"zeros among {count_text(sparsity['values'])} stored values: {100 * sparsity['zeros']:.1f} %")
    rescales = found["rescales"]
    if rescales["count"]:
        out.print(f"rescales: {rescales['count']}, {rescales['exact']} exact")
    at_run_time = found["nodes_at_run_time"]
    if at_run_time is None:
        out.print(f"onnxruntime cannot load it: {found['fusion_unknown']}")
        return
    out.print(f"nodes at run time: {at_run_time['quantised']} integer, {at_run_time['float']} float")
    for key, said in (("not_fused", "was to be integer but runs in float"), ("leftover", "stays at run time")):
        for left in found["fusion"][key][:_MOST]:
            out.print(f"{left['op']} {left['node']} {said}: {left['reason']}")
        if len(found["fusion"][key]) > _MOST:
            out.print(f"... and {len(found['fusion'][key]) - _MOST} more; --json lists all")


def print_layers(found: Mapping[str, Any], out: Console) -> None:
    """Multiply-accumulates and weights by layer, then the quantisation parameters."""
    zeros = {entry["tensor"]: entry["zeros"] for entry in found["sparsity"]["tensors"]}
    total = found["macs"]["total"] or 1
    rows = [
        (
            e["node"],
            e["op"],
            count_text(e["macs"]),
            f"{100 * e['macs'] / total:.1f} %",
            e["parameters"],
            _shape(e["output_shape"]),
        )
        for e in found["macs"]["layers"]
    ]
    print_rows(("layer", "operator", "MACs", "share", "weights", "output"), rows, out)
    quantised = [
        (e["node"], e["tensor"], e["type"], e["channels"], f"{e['scale_low']:.4g}", f"{e['scale_high']:.4g}", e["zero_point"])
        for e in found["quantisation"]
    ]
    if quantised:
        columns = ("node", "tensor", "type", "scales", "least", "largest", "zero point")
        print_rows(columns, quantised, out, title="quantisation parameters")
    if zeros:
        print_rows(("tensor", "zeros"), [(name, f"{100 * share:.1f} %") for name, share in zeros.items()], out, title="sparsity")


def _shape(dims: Any) -> str:
    return "unknown" if dims is None else "[" + ", ".join("?" if d is None else str(d) for d in dims) + "]"
