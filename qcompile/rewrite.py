"""What a pass is: options as fields, a promise that the pipeline verifies, and a report of rewrites and refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from qcompile.context import Context
from qcompile.graph import Graph


@dataclass(frozen=True)
class Exact:
    """No float operation is added, removed or reordered: outputs stay the same, bit for bit, on every sample.

    The check allows 2e-6 of max |output| where onnxruntime itself picks another kernel (it packs constant operands).
    fused: compare finished integer models as onnxruntime runs them, Q/DQ fused at level ALL; then not one bit may differ.
    """

    fused: bool = False


@dataclass(frozen=True)
class Close:
    """Float algebra reordered: |difference| <= rtol * max |output|, tensor by tensor, on every sample."""

    rtol: float = 1e-4


@dataclass(frozen=True)
class Lossy:
    """Quantisation: the SQNR against the model before is reported; against the float model it must exceed `least_sqnr_db`.

    asked_for: the loss is what the user asked for (pruning): later passes are held against the model after it.
    """

    least_sqnr_db: float = 0.0
    asked_for: bool = False


Promise: TypeAlias = Exact | Close | Lossy


@dataclass
class Report:
    """What one run of a pass did: how many rewrites, and why other candidates were left alone."""

    rewrites: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refusals: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, node: str, reason: str) -> None:
        """Count one refusal; `reason` is a constant text (no names in it), so that equal reasons add up."""
        self.skipped[reason] += 1
        self.refusals.append((node, reason))


class Pass(Protocol):
    """A graph rewrite. Implementations are frozen dataclasses whose fields are their options."""

    @property
    def name(self) -> str:
        """Name in reports and on the command line."""

    @property
    def keeps(self) -> Promise:
        """What the outputs keep; verified by the pipeline."""

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrite `graph` in place. A second run rewrites nothing."""
