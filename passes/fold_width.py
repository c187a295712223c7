"""Pixels of a row become channels, f = 4 at a time, where a convolution has fewer than four channels (f = 2 for two).

    Conv(x [N, C, H, W], w [O, C, kh, kw], stride s)
    x' [N, f*C, H, W/f]             f pixels of a row are one: x in channels-last order, only read otherwise
    y' = Conv(x', w' [(f/s)*O, f*C, kh, k'], stride 1 along the row): each output holds f/s neighbours
    w'[r*O + o, p*C + c, i, j] = w[o, c, i, t]    where  f*j + p = r*s + t - left + f*ceil(left/f), and 0 elsewhere
    y [N, O, H', W'] = y', read as channels last again

The added products are with zeros; every output is the same sum.

Why: onnxruntime's integer kernels want input channels in fours and at least sixteen outputs; others go through im2col, a few
bytes at a time. Its layout is channels last, in which both Reshapes are free, and the Transposes cancel against its own.
Measured with onnxruntime 1.32 on one thread (AVX512-VNNI), layer and a small reader, in us:

    input, outputs, kernel             float   int8   int8, zero channels   folded
    28x28x1 -> 8, 5x5                     20     54          65               18
    224x224x1 -> 32, 3x3, stride 2       119    564         425              202
    96x96x3 -> 8, 3x3, stride 2           54    103         121               58
    224x224x3 -> 64, 7x7, stride 2      1986   1635        1570             1129
    224x224x3 -> 32, 3x3, stride 2       181    375         252              186   (whole mobilenet_v1: .98)
    32x32x3 -> 16, 3x3                    20     55          34               30   (whole resnet20: .97)

mnist_cnn as a whole: 1.39 of float's time without this pass, .74 with it. The last two lines are not folded: see `_pays`.

It must not fire where f does not divide the row or the stride does not divide f, where the row of the result is not made of whole
blocks, where weights are computed or the node is excluded, for grouped kernels, for `--target tensorrt`, without calibration data
(what BatchNormalization says about channels would have to be folded too), where products with zeros cost what the better kernel
gains, nor where the file grows by more than `growth` of its weights and by more than 4 kB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._match import FLOATS, is_op, single_consumer
from qcompile.rewrite import Close, Promise, Report

_ROW = "its rows do not divide into blocks of pixels"
_PADS = "its padding depends on a size that is not static"
_DEAR = "with its pixels as channels it would multiply with zeros too often"
_LARGER = "with its pixels as channels the file would grow too much"
_OUTPUTS = 16  # what the integer kernels want at least
_FEW_BYTES = 4096  # of integer weights: growth that nobody misses


@dataclass(frozen=True)
class _Plan:
    """The folded convolution.

    weight: w'. pads: `[top, left, bottom, right]`, in blocks along the row. fold: pixels a block. results: f/s. blocks: W/f.
    row: W'. added: how many weights more than before.
    """

    weight: Array
    pads: tuple[int, int, int, int]
    fold: int
    results: int
    blocks: int
    row: int
    added: int  # weights


def _pays(node: Node, plan: _Plan) -> bool:
    """Whether a result takes few enough products, counted against zero channels up to four, the other way to a fast kernel.

    At twice the products mobilenet_v1 gained 2 %, at three times resnet20 3 %: not worth four to sixteen times the weights.
    Below sixteen outputs there is no other way.
    """
    outputs, _, *kernel = _weight(node).dims
    products = plan.weight.size / (plan.results * outputs) / (4 * math.prod(kernel))
    return bool(products <= 1.5 or (outputs < _OUTPUTS and products <= 3))


@dataclass(frozen=True)
class FoldWidth:
    """Fold the pixels of a row into channels where a convolution has fewer than four."""

    growth: float = 0.02  # of all weights
    name: str = "fold_width"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a convolution."""
        report = Report()
        if context.settings.target == "tensorrt" or context.synthetic:
            return report
        graph.infer_shapes()
        total = sum(math.prod(c.dims) for c in graph.constants.values())
        for node in list(graph.nodes):
            if not _is_candidate(node) or context.settings.excluded(node.name):
                continue
            plan = _plan(node)
            if isinstance(plan, str):
                report.refuse(node.label, plan)
            elif not _pays(node, plan):
                report.refuse(node.label, _DEAR)
            elif plan.added > max(self.growth * total, _FEW_BYTES):
                report.refuse(node.label, _LARGER)
            else:
                _rewrite(graph, node, plan)
                report.rewrites += 1
        graph.cleanup()
        return report


def _is_candidate(node: Node) -> bool:
    """A plain two-dimensional Conv with constant float weights of one to three channels, over more than one pixel of a row."""
    weight = node.constant(1) if is_op(node, "Conv") else None
    if weight is None or weight.elem_type not in FLOATS or len(weight.dims) != 4:
        return False
    if node.input(2) is not None and node.constant(2) is None:
        return False
    dilations = node.attr("dilations") or [1, 1]
    return weight.dims[1] < 4 and weight.dims[3] > 1 and node.attr("group", 1) == 1 and int(dilations[1]) == 1


def _weight(node: Node) -> Const:
    weight = node.constant(1)
    assert weight is not None  # it is a candidate
    return weight


def _plan(node: Node) -> _Plan | str:
    """How `node` is folded, or why it cannot be."""
    weight = _weight(node).array()
    channels, kernel = weight.shape[1], weight.shape[3]
    strides = [int(v) for v in node.attr("strides") or [1, 1]]
    fold = 2 if channels == 2 else 4
    dims = node.inputs[0].dims
    width = dims[3] if dims is not None and len(dims) == 4 else None
    if not isinstance(width, int) or width % fold or fold % strides[1]:
        return _ROW
    found = _pads(node, dims, strides)
    if found is None:
        return _PADS
    top, left, bottom, right = found
    results = fold // strides[1]
    row = (width + left + right - kernel) // strides[1] + 1
    before = -(-left // fold)
    blocks = before + ((results - 1) * strides[1] + kernel - 1 - left) // fold + 1
    after = row // results - 1 + blocks - before - width // fold
    if row % results or after < 0 or blocks < 1:
        return _ROW
    wide = np.zeros((results, weight.shape[0], fold, channels, weight.shape[2], blocks), weight.dtype)
    for result in range(results):
        for tap in range(kernel):
            block, pixel = divmod(result * strides[1] + tap - left + before * fold, fold)
            wide[result, :, pixel, :, :, block] = weight[:, :, :, tap]
    shape = (results * weight.shape[0], fold * channels, weight.shape[2], blocks)
    added = wide.size - weight.size
    return _Plan(wide.reshape(shape), (top, before, bottom, after), fold, results, width // fold, row, added)


def _pads(node: Node, dims: tuple[int | str | None, ...] | None, strides: list[int]) -> tuple[int, int, int, int] | None:
    """`[top, left, bottom, right]` in pixels; None where `auto_pad` makes them depend on a size that is not static."""
    mode = node.attr("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in ("NOTSET", ""):
        top, left, bottom, right = (int(v) for v in node.attr("pads") or [0, 0, 0, 0])
        return top, left, bottom, right
    if mode == "VALID":
        return 0, 0, 0, 0
    dilations = [int(v) for v in node.attr("dilations") or [1, 1]]
    sides: list[tuple[int, int]] = []
    weight = _weight(node).dims
    for axis in (2, 3):
        size = dims[axis] if dims is not None else None
        extent = dilations[axis - 2] * (weight[axis] - 1) + 1  # of the kernel
        stride = strides[axis - 2]
        if not isinstance(size, int):
            if stride > 1:
                return None
            whole = extent - 1
        else:
            whole = max(0, (-(-size // stride) - 1) * stride + extent - size)
        small = whole // 2
        sides.append((small, whole - small) if mode == "SAME_UPPER" else (whole - small, small))
    (top, bottom), (left, right) = sides
    return top, left, bottom, right


def _rewrite(graph: Graph, node: Node, plan: _Plan) -> None:
    source = node.inputs[0]
    weight = _weight(node)
    outputs, channels = weight.dims[:2]
    last = _end(graph, node)
    base = node.outputs[0].name
    rows = _channels_last(graph, source, base) if channels > 1 else source
    blocks = _reshape(graph, rows, [0, -1, plan.blocks, plan.fold * channels], base + "_blocks")
    node.inputs[0] = graph.node("Transpose", [blocks], [base + "_pixels"], perm=[0, 3, 1, 2]).outputs[0]
    node.inputs[1] = graph.constant(weight.name, plan.weight)
    bias = node.constant(2)
    if bias is not None:
        node.inputs[2] = graph.constant(bias.name, np.tile(bias.array(), plan.results))
    for name in ("auto_pad", "kernel_shape"):
        node.attrs.pop(name, None)
    strides = node.attr("strides") or [1, 1]
    node.set_attr("strides", [int(strides[0]), 1])
    node.set_attr("pads", list(plan.pads))
    # what was `last.outputs[0]` is now the folded result; its name and its readers go to the unfolded one
    result = last.outputs[0]
    folded = Value(graph.fresh_name(result.name + "_folded"))
    last.outputs[0] = folded
    inner = node
    while inner is not last:  # types of the tensors in between are of another shape now
        inner.outputs[0].type = None
        inner = inner.outputs[0].consumers[0]
    unfolded = _reshape(graph, _channels_last(graph, folded, base), [0, -1, plan.row, outputs], base + "_unfolded")
    graph.node("Transpose", [unfolded], [result], perm=[0, 3, 1, 2])
    graph.sort()


def _end(graph: Graph, node: Node) -> Node:
    """The last of the Relu and Clip behind `node` that alone read what is before them: they are done on folded values."""
    last = node
    while True:
        reader = single_consumer(graph, last.outputs[0])
        if reader is None or not is_op(reader, "Relu", "Clip") or reader.inputs[0] is not last.outputs[0]:
            return last
        last = reader


def _channels_last(graph: Graph, source: Tensor, base: str) -> Value:
    output: Value = graph.node("Transpose", [source], [base + "_channels_last"], perm=[0, 2, 3, 1]).outputs[0]
    return output


def _reshape(graph: Graph, source: Tensor, dims: list[int], name: str) -> Value:
    target = graph.constant(name + "_shape", np.array(dims, np.int64))
    output: Value = graph.node("Reshape", [source, target], [name]).outputs[0]
    return output
