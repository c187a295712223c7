"""Patch embedding becomes a matrix product, so that the token stream starts in float behind an integer kernel.

    Conv(x [N, C, H, W], kernel = stride = (kh, kw)) -> Reshape [N, O, h*w] -> Transpose [N, h*w, O]
    = Reshape [N, C, h, kh, w, kw] -> Transpose [N, h, w, C, kh, kw] -> Reshape [N*h*w, C*kh*kw] -> Gemm -> Reshape [N, h*w, O]

An integer Conv must write 8 bits, an integer Gemm need not: vit_mnist lost 2.7 dB by those 8 bits alone. Refused: padding,
dilation or groups, a kernel other than the stride or that does not divide the picture, unknown C, H or W, another reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph, Node, Value
from qcompile.passes._match import is_op, single_consumer, visit
from qcompile.rewrite import Close, Promise, Report


@dataclass(frozen=True)
class PatchToGemm:
    """Rewrite patch convolutions whose output is read as tokens."""

    name: str = "patch_to_gemm"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a convolution."""
        graph.infer_shapes()
        report = visit(graph, ("Conv",), _offer)
        if report.rewrites:
            graph.sort()
        return report


def _offer(graph: Graph, node: Node) -> str | None:
    """None where Conv `node` was rewritten, an empty text where no tokens are made of it, else the reason for leaving it."""
    tokens = _tokens(graph, node)
    if tokens is None:
        return ""
    reason = _refusal(node)
    if reason is None:
        _rewrite(graph, node, tokens)
    return reason


def _tokens(graph: Graph, node: Node) -> Node | None:
    """The Transpose that turns the output of Conv `node`, its spatial axes flattened by one Reshape, into tokens."""
    flatten = single_consumer(graph, node.outputs[0])
    if not is_op(flatten, "Reshape") or flatten is None:
        return None
    before, after = node.outputs[0].dims, flatten.outputs[0].dims
    if before is None or after is None or len(before) != 4 or len(after) != 3 or before[1] != after[1]:
        return None
    transpose = single_consumer(graph, flatten.outputs[0])
    if transpose is None or not is_op(transpose, "Transpose") or list(transpose.attr("perm", [])) != [0, 2, 1]:
        return None
    return transpose


def _refusal(node: Node) -> str | None:
    dims, weight = node.inputs[0].dims, node.constant(1)
    if weight is None or len(weight.dims) != 4 or (node.input(2) is not None and node.constant(2) is None):
        return "weights or bias are computed at run time"
    if dims is None or len(dims) != 4 or not all(isinstance(d, int) for d in dims[1:]):
        return "the picture's size is not known"
    kernel = list(weight.dims[2:])
    if list(node.attr("strides", [1, 1])) != kernel:
        return "kernel and stride differ"
    if any(node.attr("pads", [0])) or node.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "padding"
    if node.attr("group", 1) != 1 or any(d != 1 for d in node.attr("dilations", [1])):
        return "groups or dilation"
    if any(size % k for size, k in zip(_sizes(node)[1:], kernel, strict=True)):
        return "the kernel does not divide the picture"
    return None


def _sizes(node: Node) -> tuple[int, int, int]:
    """(C, H, W) of the Conv's input."""
    dims = node.inputs[0].dims
    assert dims is not None
    channels, height, width = (d for d in dims[1:] if isinstance(d, int))
    return channels, height, width


def _rewrite(graph: Graph, node: Node, tokens: Node) -> None:
    weight, output = node.constant(1), tokens.outputs[0]
    assert weight is not None
    channels, height, width = _sizes(node)
    outputs, _, kh, kw = weight.dims
    h, w, span = height // kh, width // kw, channels * kh * kw

    def reshaped(source: Value, target: list[int], name: str) -> Value:
        constant = graph.constant(f"{node.label}_{name}_shape", np.asarray(target, np.int64))
        return graph.node("Reshape", [source, constant], [f"{node.label}_{name}"]).outputs[0]

    picture = node.inputs[0]
    assert isinstance(picture, Value)
    split = reshaped(picture, [-1, channels, h, kh, w, kw], "split")
    patches = graph.node("Transpose", [split], [f"{node.label}_patches"], perm=[0, 2, 4, 1, 3, 5]).outputs[0]
    rows = reshaped(patches, [-1, span], "rows")
    matrix = graph.constant(f"{weight.name}_matrix", weight.array().reshape(outputs, span))
    bias = node.constant(2)
    flat = np.zeros(outputs, np.float32) if bias is None else bias.array().reshape(-1)
    offset = graph.constant(f"{node.label}_bias", flat.astype(weight.array().dtype))
    name = node.name
    node.name = graph.fresh_name(name + "_conv")
    product = graph.node("Gemm", [rows, matrix, offset], [f"{node.label}_tokens"], transB=1)
    product.name = name  # the name under which --exclude and reports know it
    back = graph.constant(f"{name}_tokens_shape", np.asarray([-1, h * w, outputs], np.int64))
    graph.remove(tokens)
    graph.nodes.append(Node("Reshape", graph.fresh_name(f"{name}_tokens_reshape"), [product.outputs[0], back], [output]))
