"""Which layers can be made sparse, and why the others stay dense."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._linear import Linear, output_axis, with_bias
from qcompile.passes._match import is_op
from qcompile.passes.round_weights import weight_matrix, weight_tensor
from qcompile.rewrite import Report
from qcompile.sparsity import Pattern, Rule

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LEAST_WEIGHTS = 512
_LARGE_END = 0.2  # of all weights: a last layer that holds more is made sparse too, for the model would stay dense without it


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """A Conv, Gemm or MatMul whose weights may go; `linear` holds the bias, None where there is none to correct."""

    node: Node
    weight: Const
    axis: int
    groups: int
    linear: Linear | None

    @property
    def source(self) -> Value:
        """What it multiplies."""
        value = self.node.inputs[0]
        assert isinstance(value, Value)
        return value

    def matrix(self) -> Array:
        """[groups, channels, K] in float64."""
        flat = weight_matrix(self.weight.array().astype(np.float64), self.node.op, self.axis)
        return flat.reshape(self.groups, flat.shape[0] // self.groups, flat.shape[1])

    def tensor(self, matrix: Array) -> Array:
        """The inverse of `matrix`, float32."""
        flat = matrix.reshape(-1, matrix.shape[-1])
        return weight_tensor(flat, self.weight.dims, self.node.op, self.axis).astype(np.float32)


def sparse_layers(graph: Graph, context: Context, rule: Rule, report: Report) -> list[SparseLayer]:
    """The layers of the sorted float `graph` that `rule` can be applied to, in order; `report` counts why others are not."""
    weighted = [n for n in graph.nodes if is_op(n, *_WEIGHTED) and _matrix_of(n) is not None]
    total = sum(_size(n) for n in weighted)
    behind = _behind_weights(graph, weighted)
    before = _before_weights(graph, weighted)
    settings = replace(context.settings, raised=())  # a layer raised to float stays as sparse as it was
    found = []
    for node in weighted:
        reason = settings.why_float(node.name) or _refusal(graph, node, rule)
        if not reason and node not in behind:
            reason = "first layer: it reads the model's input"
        if not reason and node not in before and _size(node) <= _LARGE_END * total:
            reason = "last layer: its outputs are the model's"
        if reason:
            report.refuse(node.label, reason)
            continue
        weight = node.constant(1)
        assert weight is not None
        axis = output_axis(node)
        found.append(SparseLayer(node, weight, axis, node.attr("group", 1) if node.op == "Conv" else 1, with_bias(graph, node)))
    return found


def _matrix_of(node: Node) -> Const | None:
    """Its constant weights; None for products of activations and constants of one row or column."""
    const = node.constant(1)
    return const if const is not None and len(const.dims) >= 2 else None


def _size(node: Node) -> int:
    const = _matrix_of(node)
    return 0 if const is None else int(np.prod(const.dims))


def _refusal(graph: Graph, node: Node, rule: Rule) -> str | None:
    weight = node.constant(1)
    assert weight is not None
    if node.op == "ConvTranspose":
        return "ConvTranspose: its reduction is not along the channels of one weight row"
    if weight.elem_type != 1:
        return "weights are not float32"
    if node.op != "Conv" and len(weight.dims) != 2:
        return "weights of rank other than 2"
    if node.op == "Gemm" and (node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0):
        return "Gemm with transA or alpha"
    if not isinstance(node.inputs[0], Value):
        return "input is a constant"
    if graph.is_pinned(weight) or len(weight.consumers) != 1 or sum(t is weight for t in node.inputs) != 1:
        return "its weights are shared with another node, whose inputs differ"
    if node.op == "Conv" and weight.dims[1] == 1:
        return "depthwise: one input channel a group"
    if _size(node) < _LEAST_WEIGHTS:
        return f"fewer than {_LEAST_WEIGHTS} weights"
    if isinstance(rule, Pattern):
        width = weight.dims[1] if node.op == "Conv" or node.attr("transB", 0) else weight.dims[0]
        if width % rule.block:
            return f"its input channels do not divide into blocks of {rule.block}"
    return None


def _is_table(node: Node) -> bool:
    """A look-up of learned rows: the first layer of a network of tokens."""
    table = node.constant(0)
    return is_op(node, "Gather") and table is not None and table.elem_type == 1 and len(table.dims) == 2


def _behind_weights(graph: Graph, weighted: list[Node]) -> set[Node]:
    """The weighted nodes that read, directly or not, what another one (or a table) computes."""
    makers = set(weighted) | {n for n in graph.nodes if _is_table(n)}
    reached: set[Tensor] = set()
    found = set()
    for node in graph.nodes:
        is_behind = any(t in reached for t in [*node.inputs, *node.captured])
        if is_behind:
            found.add(node)
        if is_behind or node in makers:
            reached.update(node.outputs)
    return found & set(weighted)


def _before_weights(graph: Graph, weighted: list[Node]) -> set[Node]:
    """The weighted nodes whose results another one reads, directly or not."""
    wanted = set(weighted)
    needed: set[Tensor] = set()
    found = set()
    for node in reversed(graph.nodes):
        is_before = any(o in needed for o in node.outputs)
        if is_before:
            found.add(node)
        if is_before or node in wanted:
            needed.update([*node.inputs, *node.captured])
    return found & wanted
