"""`qcompile inspect --portable`: what in a file differs on which machine, read from the file alone; nothing is run.

Each rule is one thing that was measured on the machines of `docs/edge-matrix.md`, and has a broken file there that shows it.
A file without findings gives the same bits on all of them. The rules of weights stand in `portable_weights`, those of rescales
and of what is computed in float in `portable_rescales`, those of what a runtime can load in `portable_versions`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx

from qcompile.inspection_scales import Scales

Effect: TypeAlias = Literal["other bits", "does not load"]

#: What each rule is about, in one line.
RULES = {
    "pair-saturation": "u8 x s8 products are added in pairs in int16, which these weights can leave",
    "minus-128": "a weight of -128: two of its products with -128 leave int16",
    "dynamic-s8": "a signed right operand that is computed at run time: no pair rule holds for it",
    "add-ties": "an Add or Mul whose ratios can tie, which machines round in different ways",
    "s8-qdq": "Conv or MatMul between int8 Q/DQ: not fused by every machine, and then float arithmetic",
    "inexact-rescale": "a multiplier that is not b/2^c: integer machines cannot compute it",
    "float": "computed in float: machines differ by an ulp",
    "only-onnxruntime": "an operator that only onnxruntime has",
    "opset": "newer than a runtime reads",
    "no-kernel": "types for which onnxruntime has no kernel",
}


@dataclass(frozen=True)
class Finding:
    """One thing in the file: the rule, where it stands ("" for the whole file), the machines on which it shows, and why."""

    rule: str
    effect: Effect
    machines: tuple[str, ...]
    node: str
    op: str
    detail: str


@dataclass(frozen=True)
class Portability:
    """All findings, in the order of the rules and then of the nodes; `needs`: {runtime: least version that reads the file}.

    `needs` is None for a runtime of which no known version reads it.
    """

    findings: tuple[Finding, ...]
    needs: dict[str, str | None]

    @property
    def portable(self) -> bool:
        """Whether nothing differs anywhere."""
        return not self.findings

    def among(self, runtimes: str) -> tuple[Finding, ...]:
        """The findings that concern `onnxruntime` (on any machine), or `all` runtimes."""
        if runtimes == "all":
            return self.findings
        return tuple(f for f in self.findings if any(m not in OTHER_RUNTIMES for m in f.machines))

    def as_json(self) -> dict[str, Any]:
        """The report's `portable`."""
        return {
            "holds": self.portable,
            "findings": [{**asdict(f), "machines": list(f.machines)} for f in self.findings],
            "needs": self.needs,
        }


AVX2 = "x86 AVX2 without VNNI"
X86 = "x86"
ARM64 = "ARM64"
ARM_OLD = "ARM64 without dot products"
WASM = "WebAssembly"
#: Not onnxruntime.
OTHER_RUNTIMES = ("OpenVINO", "tract", "TensorRT", "integer hardware")


def portability(model: onnx.ModelProto | str | Path) -> Portability:
    """Judge a file or model, whoever made it. Raises ModelError where it cannot be read."""
    from qcompile.portable_rescales import of_rescales
    from qcompile.portable_versions import least_versions, of_versions
    from qcompile.portable_weights import of_weights

    scales = Scales(model)
    folder = Path() if isinstance(model, onnx.ModelProto) else Path(model).parent
    found: list[Finding] = [
        *of_weights(scales, folder),
        *of_rescales(scales, model),
        *of_versions(scales),
    ]
    return Portability(_ordered(found), least_versions(scales))


def _ordered(found: Iterable[Finding]) -> tuple[Finding, ...]:
    place = {rule: index for index, rule in enumerate(RULES)}
    return tuple(sorted(found, key=lambda f: place[f.rule]))
