"""Softmax and attention's two products in integers.

scores = q k        u8 x u8 -> int32, the factor 1/sqrt(d) and the mask go into the exponential
e = exp(scores)     u8, 255 at the maximum of a row, exactly 0 where masked
context = e v       int32, divided by the sum of e: the probabilities themselves are never rounded
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.kernels._protocol import Kernel
from qcompile.kernels.idivide import IDivide
from qcompile.kernels.iexp_levels import IExpLevels
from qcompile.kernels.inormalise import INormalise
from qcompile.kernels.isoftmax import IExp, ISoftmax
from qcompile.kernels.table_exp import TableExp
from qcompile.passes._integer_sums import plumb
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._masks import Conditions, read_softmax
from qcompile.passes._wide import INT32_MAX, Exponentials, Narrow, Refusal, Wide, Wides, in_domain

_LARGEST = 255
_USUAL = 512  # keys; longer rows are divided first
_MOST_KEYS = 2**15  # of attention, wherever their number is not known
_LONGEST = 4096  # keys of a Softmax that is a result ...
_LEVELS = 2**14  # ... and the steps of its probabilities


def softmax(wides: Wides, node: Node) -> None:
    """Exponentials where only products with V read it, else probabilities in 8 bits."""
    output, graph, settings = node.outputs[0], wides.graph, wides.context.settings
    if graph.is_output(output) and settings.format == "qoperator":
        raise Refusal("a head kept float")
    found = read_softmax(graph, node)
    if isinstance(found, str):
        if not _of_columns(graph, node):
            raise Refusal(found)
        _probabilities_of_columns(wides, node)
        return
    scores = wides.read(found.scores)
    keys = output.dims[-1] if output.dims else None
    longest = keys if isinstance(keys, int) else None
    inputs: list[Tensor] = [scores.integers]
    if found.keep is not None:
        inputs.append(Conditions(graph).tensor(found.keep))
    name, scale, masked = output.name, scores.scale * found.factor, found.keep is not None
    result = Value(graph.fresh_name(name + "_u8"), helper.make_tensor_type_proto(TensorProto.UINT8, output.dims))
    if not graph.is_pinned(output) and all(n.op == "MatMul" and n.inputs[0] is output for n in output.consumers):
        made = in_domain(lambda: _exponential(wides, scale, masked, scores.bound))
        kernel_call(graph, made, inputs, result, name)
        wides.exponentials[output] = Exponentials(result, longest)
        return
    quantised = _quantised(graph, output)
    wides.probabilities.update(quantised)
    wide = wides.value(name + "_probabilities", output)
    if longest is not None and longest <= _LONGEST:
        kernel = in_domain(lambda: ISoftmax(scale, masked, longest, _LEVELS, wide=True))
        kernel_call(graph, kernel, inputs, wide, name)
        wides.set(node, Wide(wide, kernel.output_scale, _LEVELS))
    elif not quantised:
        raise Refusal("a Softmax that is no part of attention, over a row of unknown or too great a length")
    else:
        exponential = in_domain(lambda: _exponential(wides, scale, masked, scores.bound))
        kernel_call(graph, exponential, inputs, result, name)
        _divided(wides, result, wide, name)
        wides.set(node, Wide(wide, 1 / _LEVELS, _LEVELS))


def _quantised(graph: Graph, output: Value) -> list[Value]:
    """What QuantizeLinears make of `output`, where nothing else reads it; a Sum of one, a shield, may stand between."""
    if graph.is_pinned(output):
        return []
    readers = output.consumers
    if len(readers) == 1 and readers[0].op == "Sum" and len(readers[0].inputs) == 1:
        return _quantised(graph, readers[0].outputs[0])
    return [n.outputs[0] for n in readers] if all(n.op == "QuantizeLinear" for n in readers) else []


def _divided(wides: Wides, exponentials: Value, result: Value, name: str) -> None:
    """int32 2^14 e / sum of the row: probabilities of rows of any length, as precise as exponentials of 8 bits are.

    2^14 e < 2^22, and the sum is below 2^30 for rows of 4 million.
    """
    graph = wides.graph
    wide = wides.value(name + "_wide", exponentials)
    total = Value(graph.fresh_name(name + "_total"), helper.make_tensor_type_proto(TensorProto.INT32, None))
    plumb(graph, "MatMulInteger", [exponentials, _column(wides, exponentials, -1, name)], total)
    plumb(graph, "Cast", [exponentials], wide, to=TensorProto.INT32)
    raised = wides.times(wide, np.asarray(_LEVELS), name)
    kernel_call(graph, IDivide(1 / _LEVELS), [raised, total], result, name)


def _exponential(wides: Wides, scale: float, masked: bool, bound: int) -> Kernel:
    """By table; `ibert`: its arithmetic, in `qoperator`, which is for speed, once for each distance there is."""
    settings = wides.context.settings
    if settings.kernels == "table":
        return TableExp(scale, masked, bound)
    return IExpLevels(scale, masked, bound) if settings.format == "qoperator" else IExp(scale, masked)


def _of_columns(graph: Graph, node: Node) -> bool:
    """Whether the axis has only dimensions of 1 behind it, as in [N, classes, 1, 1]."""
    dims = node.inputs[0].dims
    axis = node.attr("axis", -1 if (graph.opset() or 13) >= 13 else 1)
    return dims is not None and axis % len(dims) > 0 and all(d == 1 for d in dims[axis % len(dims) + 1 :])


def _probabilities_of_columns(wides: Wides, node: Node) -> None:
    """Softmax of [..., classes, 1, 1]: of rows, and back to the shape."""
    source, output, graph = node.inputs[0], node.outputs[0], wides.graph
    assert source.dims is not None
    axis = node.attr("axis", -1 if (graph.opset() or 13) >= 13 else 1) % len(source.dims)
    longest, scores, name = source.dims[axis], wides.read(source), output.name
    if not isinstance(longest, int) or longest > _LONGEST:
        raise Refusal("a Softmax over a row of unknown or too great a length")
    kernel = in_domain(lambda: ISoftmax(scores.scale, False, longest, _LEVELS, wide=True))
    rows = Value(graph.fresh_name(name + "_rows"), helper.make_tensor_type_proto(TensorProto.INT32, None))
    plumb(graph, "Flatten", [scores.integers], rows, axis=axis)
    made = Value(graph.fresh_name(name + "_of_rows"), rows.type)
    kernel_call(graph, kernel, [rows], made, name)
    shape = Value(graph.fresh_name(name + "_shape"), helper.make_tensor_type_proto(TensorProto.INT64, None))
    plumb(graph, "Shape", [scores.integers], shape)
    result = wides.value(name + "_probabilities", output)
    plumb(graph, "Reshape", [made, shape], result)
    wides.set(node, Wide(result, kernel.output_scale, _LEVELS))


def product(wides: Wides, node: Node) -> None:
    """MatMul of two 8-bit tensors, or of exponentials and V."""
    left, right = node.inputs
    v = wides.narrow(right)
    if v is None:
        raise Refusal("an operand is float")
    exponentials = wides.exponentials.get(left)
    if exponentials is not None:
        _context(wides, node, exponentials, v)
        return
    q = wides.narrow(left)
    if q is None:
        raise Refusal("an operand is float")
    inner = left.dims[-1] if left.dims else None
    if isinstance(inner, int) and inner * _LARGEST**2 <= INT32_MAX:
        bound = inner * _LARGEST**2
    elif q.integers in wides.probabilities and q.zero_point == 0:
        # The sum of a row: 1, half a step of the probabilities a key (2^-15), half a step of the 8 bits a key.
        bound = _LARGEST * (ceil((1 + _MOST_KEYS / (2 * _LEVELS)) / float(q.scale)) + _MOST_KEYS // 2 + 1)
        if bound > INT32_MAX:
            raise Refusal("its probabilities have too fine a step for a sum of unknown length")
    else:
        raise Refusal("its inner dimension is unknown, so that its sum could leave int32")
    acc = _multiplied(wides, q.integers, q, v, node.outputs[0])
    wides.set(node, Wide(acc, float(q.scale) * float(v.scale), bound))


def _multiplied(wides: Wides, left: Tensor, q: Narrow | None, v: Narrow, output: Value) -> Value:
    """MatMulInteger; `q` None for exponentials, whose zero point is 0."""
    result = wides.value(output.name + "_acc", output)
    zeros = [_zero(wides, output.name, o) for o in (q, v)]
    plumb(wides.graph, "MatMulInteger", [left, v.integers, *zeros], result)
    return result


def _zero(wides: Wides, name: str, operand: Narrow | None) -> Tensor:
    if operand is None or operand.zero_point == 0:
        return Value("")
    dtype = np.int8 if operand.signed else np.uint8
    return wides.graph.constant(name + "_zero", np.asarray(operand.zero_point, dtype))


def _context(wides: Wides, node: Node, e: Exponentials, v: Narrow) -> None:
    output, graph = node.outputs[0], wides.graph
    short = e.longest is not None and e.longest <= _USUAL
    longest = e.longest if short and e.longest is not None else _USUAL
    kernel = in_domain(lambda: INormalise(float(v.scale), longest, any_length=not short))
    acc = _multiplied(wides, e.integers, None, v, output)
    total = Value(graph.fresh_name(output.name + "_total"), helper.make_tensor_type_proto(TensorProto.INT32, None))
    plumb(graph, "MatMulInteger", [e.integers, _ones(wides, node.inputs[1], output.name)], total)
    result = wides.value(output.name + "_context", output)
    kernel_call(graph, kernel, [acc, total], result, output.name)
    wides.set(node, Wide(result, kernel.output_scale, _LARGEST * kernel.multiplier + 1))


def _ones(wides: Wides, values: Tensor, name: str) -> Tensor:
    """A column of s8 ones, as long as V [.., keys, d] is high. With u8 ones MatMulInteger takes twice as long."""
    narrow = wides.narrow(values)
    assert narrow is not None
    return _column(wides, narrow.integers, -2, name)


def _column(wides: Wides, integers: Tensor, axis: int, name: str) -> Tensor:
    """[keys, 1] of s8 ones, as many as `integers` have along `axis`, counted from the end."""
    graph, keys = wides.graph, integers.dims[axis] if integers.dims else None
    if isinstance(keys, int):
        return graph.constant(name + "_ones", np.ones((keys, 1), np.int8))
    end: dict[str, Any] = {} if axis == -1 else {"end": axis + 1}
    length = graph.node("Shape", [integers], [name + "_keys"], start=axis, **end).outputs[0]
    one = graph.constant(name + "_single", np.asarray([1], np.int64))
    shape = graph.node("Concat", [length, one], [name + "_column"], axis=0).outputs[0]
    fill = helper.make_tensor("value", TensorProto.INT8, [1], [1])
    return graph.node("ConstantOfShape", [shape], [name + "_ones"], value=fill).outputs[0]
