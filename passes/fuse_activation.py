"""Names activations: chains of arithmetic become one operator.

1. x * min(max(x + 3, 0), 6) / 6, x * HardSigmoid(x; 1/6, 1/2)    -> HardSwish(x)                 from opset 14 on
2. min(max(x + 3, 0), 6) / 6, min(max(x / 6 + 1/2, 0), 1)         -> HardSigmoid(x; 1/6, 1/2)
3. x * tanh(softplus(x))                                          -> Mish(x)                      from opset 18 on
4. x * sigmoid(alpha x), x / (1 + exp(-x))                        -> Swish(x; alpha)              from opset 24 on

Every spelling that `_activations` lists. Below opset 24 SiLU stays as it is written, and later passes find it with
`_activations.find_silu`: the only operator there, QuickGelu, is onnxruntime's own, and onnxruntime makes it itself when it loads.

Measured with onnxruntime 1.32 on one thread, 24,576 numbers, ms: HardSwish .012-.019 written out, .009 by name; HardSigmoid
.009-.012, .006; Mish with Softplus .259, .259. Slower by name, and so named for the formats qoperator and integer alone, which
are to replace them: Mish with Log .052, .255; SiLU .007, .014.

It must not fire on other types than float32, on HardSigmoid with other constants, where the Add of form 2 would go into the bias
of the linear layer before it (then Clip goes into its range), nor where a step is read elsewhere or is an output of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Graph, Value
from qcompile.passes._activations import HARD_SIGMOID, HARD_SWISH, MISH, MISH_BY_LOG, SILU, is_sixth
from qcompile.passes._linear import linear_at
from qcompile.passes._match import single_consumer
from qcompile.passes._pattern import NOT_FLOAT, Match, Pattern, put, rewrite_chains
from qcompile.rewrite import Close, Promise, Report

FOLDS = "its Add goes into the bias of the layer before it"
SLOWER = "onnxruntime is slower by the name of this activation"
CONSTANTS = "HardSigmoid with other constants than 1/6 and 1/2"


@dataclass(frozen=True)
class FuseActivation:
    """Replace the arithmetic of HardSwish, HardSigmoid, Mish and SiLU by the operator."""

    name: str = "fuse_activation"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one an activation. HardSwish before the HardSigmoid inside it."""
        report = Report()
        float_end = context.settings.format == "qdq"
        rows: Sequence[tuple[str, int, tuple[Pattern, ...]]] = (
            ("HardSwish", 14, HARD_SWISH),
            ("HardSigmoid", 6, HARD_SIGMOID),
            ("Mish", 18, MISH),
            ("Mish", 18, MISH_BY_LOG),
            ("Swish", 24, SILU),
        )
        for operator, opset, patterns in rows:
            found = rewrite_chains(
                graph, patterns, _Naming(operator, opset, slower=patterns in (MISH_BY_LOG, SILU) and float_end)
            )
            report.rewrites += found.rewrites
            for label, reason in found.refusals:
                report.refuse(label, reason)
        return report


@dataclass(frozen=True)
class _Naming:
    operator: str
    opset: int
    slower: bool

    def __call__(self, graph: Graph, found: Match, output: Value) -> str | None:
        x = found.tensors["x"]
        if x.elem_type != TensorProto.FLOAT:
            return NOT_FLOAT
        if not is_sixth(found):
            return CONSTANTS
        if (graph.opset() or 0) < self.opset:
            return f"opset below {self.opset} has no {self.operator}"
        if self.slower:
            return SLOWER
        attributes: dict[str, Any] = {}
        if self.operator == "HardSigmoid":
            if single_consumer(graph, x) is not None and linear_at(graph, x) is not None:
                return FOLDS
            attributes = {"alpha": 1 / 6, "beta": 0.5}
        elif self.operator == "Swish":
            attributes = {"alpha": found.numbers.get("alpha", 1.0)}
        put(graph, found, output, self.operator, [x], **attributes)
        return None
