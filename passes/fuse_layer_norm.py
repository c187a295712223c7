"""Names normalisations along the last axis: a chain around ReduceMean becomes one operator.

1. (x - E[x]) / sqrt(E[(x - E[x])^2] + epsilon) * gamma + beta    -> LayerNormalization(x, gamma, beta)     from opset 17 on
2. x / sqrt(E[x^2] + epsilon) * gamma                             -> RMSNormalization(x, gamma)             from opset 23 on

Every spelling that `_norms` lists, also with Casts between float32 and float64 inside; gamma and beta may be missing.

Below opset 23 RMSNorm stays as it is written, and later passes find it with `_norms.find_rms_norms`: onnxruntime (1.23 and 1.32)
runs an operator SimplifiedLayerNormalization, but only in ONNX's own domain, where onnx's checker refuses it; in com.microsoft,
where the checker lets it pass, onnxruntime does not know it. onnxruntime fuses these chains itself when it loads the model.

Measured with onnxruntime 1.32 on one thread, [128, 384], ms: the spelling that it knows .023, others .039-.044, by name .024;
RMSNorm .014, another spelling .033, by name .015.

It must not fire on other axes, other types than float32, where epsilon is not positive, where gamma or beta is not one number a
channel, where the size of the last axis is unknown, or where a step in between is read elsewhere or is an output of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Context
from qcompile.graph import Graph, Value
from qcompile.passes._norms import LAYER_NORM, RMS_NORM, read_norm
from qcompile.passes._pattern import Match, put, rewrite_chains
from qcompile.rewrite import Close, Promise, Report


@dataclass(frozen=True)
class FuseLayerNorm:
    """Replace the arithmetic of LayerNorm and RMSNorm by the operator."""

    name: str = "fuse_layer_norm"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a normalisation. LayerNorm first: what it divides is an RMSNorm of centred values."""
        return rewrite_chains(graph, LAYER_NORM + RMS_NORM, _named)


def _named(graph: Graph, found: Match, output: Value) -> str | None:
    norm = read_norm(found, output)
    if isinstance(norm, str):
        return norm
    centred = found.index < len(LAYER_NORM)
    operator, opset = ("LayerNormalization", 17) if centred else ("RMSNormalization", 23)
    if (graph.opset() or 0) < opset:
        return f"opset below {opset} has no {operator}"
    inputs = [norm.x, graph.constant("gamma", norm.gamma)]
    if norm.beta is not None:
        inputs.append(graph.constant("beta", norm.beta))
    put(graph, found, output, operator, inputs, axis=-1, epsilon=norm.epsilon)
    return None
