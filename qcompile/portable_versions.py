"""Which runtime can read a file: opset, IR, operators of other domains, and the least version of onnxruntime.

The table was measured by `benchmarks/edge/read_limits.py`: a model of each opset and IR was loaded by each version.
onnxruntime-node and onnxruntime-web have the versions of onnxruntime, up to `NEWEST_NODE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnx import TensorProto

from qcompile.inspection_scales import Scales
from qcompile.portable import OTHER_RUNTIMES, Finding

#: (version, newest opset, newest IR) that it loads.
READS = (
    ("1.16", 19, 9),
    ("1.17", 20, 9),
    ("1.18", 21, 10),
    ("1.21", 22, 10),
    ("1.23", 23, 11),
    ("1.24", 25, 13),
    ("1.25", 26, 13),
    ("1.32", 28, 14),
)
NEWEST_NODE = "1.30"
#: The first version with ConvInteger of uint8 by int8, measured likewise.
CONV_INTEGER_S8 = "1.24"
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")


def of_versions(scales: Scales) -> Iterator[Finding]:
    """The findings on what a runtime can load."""
    foreign = [n for wiring in scales.wiring.scopes() for n in wiring.nodes if n.proto.domain not in _STANDARD]
    for (domain, op), count in sorted(Counter((n.proto.domain, n.op) for n in foreign).items()):
        first = next(n for n in foreign if n.op == op)
        detail = f"{count} of {domain}.{op}"
        yield Finding("only-onnxruntime", "does not load", OTHER_RUNTIMES, first.label, op, detail)
    opset, ir_version = _asked(scales)
    needs = least_versions(scales)
    text = f"opset {opset}, IR {ir_version}"
    if needs["onnxruntime"] is None:
        detail = f"{text}: no onnxruntime up to {READS[-1][0]} reads it; write a lower one (--opset)"
        yield Finding("opset", "does not load", ("every machine",), "", "", detail)
    elif needs["onnxruntime-web"] is None:
        detail = f"{text}: onnxruntime {needs['onnxruntime']} reads it, but not onnxruntime-node and -web {NEWEST_NODE}"
        yield Finding("opset", "does not load", ("onnxruntime-node", "onnxruntime-web"), "", "", detail)


def least_versions(scales: Scales) -> dict[str, str | None]:
    """{runtime: the least version that reads the file}; None where no known version does.

    Versions before 1.16 were not measured: "1.16" means 1.16 or older.
    """
    opset, ir_version = _asked(scales)
    least = next((version for version, reads, ir in READS if opset <= reads and ir_version <= ir), None)
    if least is not None and _has_conv_integer(scales):
        least = max(least, CONV_INTEGER_S8, key=_number)
    packaged = least if least is not None and _number(least) <= _number(NEWEST_NODE) else None
    return {"onnxruntime": least, "onnxruntime-node": packaged, "onnxruntime-web": packaged}


def _asked(scales: Scales) -> tuple[int, int]:
    """(opset of the standard domain, IR version)."""
    opsets = [o.version for o in scales.model.opset_import if o.domain in ("", "ai.onnx")]
    return max(opsets, default=1), int(scales.model.ir_version)


def _has_conv_integer(scales: Scales) -> bool:
    wiring = scales.wiring
    found = [n for n in wiring.nodes if n.op == "ConvInteger"]
    return any([wiring.elem_type(i) for i in n.inputs[:2]] == [TensorProto.UINT8, TensorProto.INT8] for n in found)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
