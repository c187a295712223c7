"""AveragePool between convolutions becomes a depthwise Conv, whose integer kernel is exact.

    AveragePool(x, k)  ->  Conv(x, W, group=C),  W = 1 / (k_h * k_w) everywhere

onnxruntime's QLinearAveragePool rounds ties in its own way; QLinearConv with equal weights does not. Refused, and left in float:
padding that is not counted (the divisor changes at the edges), ceil_mode, auto_pad other than VALID, an unknown number of
channels, an input that no convolution computes. A pool over the whole extent is a GlobalAveragePool (see `linear_form`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph, Node, Tensor
from qcompile.passes._match import is_op, visit
from qcompile.rewrite import Close, Promise, Report

_CARRIERS = ("Relu", "Clip", "MaxPool", "Concat", "Add", "Pad", "AveragePool", "Identity")


@dataclass(frozen=True)
class PoolToConv:
    """Rewrite AveragePool nodes that convolutions feed."""

    name: str = "pool_to_conv"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a pool."""

        def offer(graph: Graph, node: Node) -> str | None:
            if context.settings.excluded(node.name):
                return ""
            reason = _refusal(node)
            if reason is None:
                _rewrite(graph, node)
            return reason

        graph.infer_shapes()
        return visit(graph, ("AveragePool",), offer)


def _refusal(node: Node) -> str | None:
    dims = node.inputs[0].dims
    if dims is None or len(dims) != 4 or not isinstance(dims[1], int):
        return "the number of channels is not known"
    if node.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto_pad"
    if node.attr("ceil_mode", 0):
        return "ceil_mode"
    if any(node.attr("pads", [0])) and not node.attr("count_include_pad", 0):
        return "padding is not counted: the divisor changes at the edges"
    if not _from_convolutions(node.inputs[0]):
        return "no convolution computes its input"
    return None


def _from_convolutions(tensor: Tensor) -> bool:
    """Whether every path back from `tensor` meets a Conv, through nodes that integers can take."""
    node = tensor.producer
    if node is None:
        return False
    if is_op(node, "Conv"):
        return True
    data = node.inputs if node.op in ("Concat", "Add") else node.inputs[:1]
    return is_op(node, *_CARRIERS) and all(_from_convolutions(t) for t in data)


def _rewrite(graph: Graph, node: Node) -> None:
    dims = node.inputs[0].dims
    assert dims is not None and isinstance(dims[1], int)
    kernel = node.attr("kernel_shape")
    weight = np.full((dims[1], 1, *kernel), 1 / np.prod(kernel), np.float32)
    node.inputs.append(graph.constant(node.label + "_weight", weight))
    for name in ("count_include_pad", "ceil_mode"):
        node.attrs.pop(name, None)
    node.op = "Conv"
    node.set_attr("group", dims[1])
