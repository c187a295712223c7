"""Wide integers through arithmetic and movement: sums, products, means, look-ups; Refusal where there is no rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import frexp

import numpy as np
from onnx import TensorProto

from qcompile.graph import Const, Node, Tensor, Value
from qcompile.kernels.idivide import IDivide
from qcompile.passes._integer_sums import plumb
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._match import ints_of, scalar_of
from qcompile.passes._wide import INT32_MAX, Refusal, Wide, Wides, in_domain
from qcompile.passes._wide_sums import MOVES
from qcompile.placement import pool_area

_SUM_MOST = 2**30
_LONGEST = 1 << 14  # elements of a sum over a dimension that is not static: 2^17 each
_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL)
_TABLE_BITS = 15


def add(wides: Wides, node: Node) -> None:
    """Add, Sum, Sub: every operand in the step that the plan gives the sum."""
    name = node.outputs[0].name
    unit = _common_step(wides, node)
    operands = [wides.read(t, unit) for t in node.inputs]
    total = operands[0]
    for index, operand in enumerate(operands[1:]):
        left, right = (wides.bounded(o, _SUM_MOST - 1, f"{name}_{index}{side}") for o, side in ((total, "a"), (operand, "b")))
        result = wides.value(f"{name}_sum", node.outputs[0])
        plumb(wides.graph, "Sub" if node.op == "Sub" else "Add", [left.integers, right.integers], result)
        total = Wide(result, unit, left.bound + right.bound)
    wides.set(node, total)


def _common_step(wides: Wides, node: Node) -> float:
    """The step of operands that are added or joined: the plan's, else the finest of them in which all of them keep 2^30."""
    unit = wides.unit(node.outputs[0])
    if unit is not None:
        return unit
    known = [wides.of[t] for t in node.inputs if t in wides.of]
    if not known:
        raise Refusal("it reads a float tensor")
    narrow = [float(n.scale) * 255 for t in node.inputs if t not in wides.of and (n := wides.narrow(t)) is not None]
    constants = [float(np.abs(t.array().astype(np.float64)).max(initial=0.0)) for t in node.inputs if isinstance(t, Const)]
    peak, finest = max([*(w.bound * w.scale for w in known), *narrow, *constants]), min(w.scale for w in known)
    return finest if not peak > finest * _SUM_MOST else 2.0 ** frexp(peak / _SUM_MOST)[1]


def extreme(wides: Wides, node: Node) -> None:
    """Max, Min: the larger or smaller integers of a common step."""
    unit = _common_step(wides, node)
    operands = [wides.read(t, unit) for t in node.inputs]
    result = wides.value(node.outputs[0].name + "_extreme", node.outputs[0])
    plumb(wides.graph, node.op, [o.integers for o in operands], result)
    wides.set(node, Wide(result, unit, max(o.bound for o in operands)))


def clip(wides: Wides, node: Node) -> None:
    """Clip by stored numbers, rounded to steps."""
    wide, name = wides.read(node.inputs[0]), node.outputs[0].name
    ends = []
    for index, (role, missing) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        number = missing if node.input(index) is None else scalar_of(node.input(index))
        if number is None or np.isnan(number):
            raise Refusal("it clips to a number that is not stored")
        steps = int(np.rint(np.clip(number / wide.scale, -INT32_MAX, INT32_MAX)))
        ends.append((wides.graph.constant(f"{name}_{role}", np.asarray(steps, np.int32)), steps))
    result = wides.value(name + "_clipped", node.outputs[0])
    plumb(wides.graph, "Clip", [wide.integers, *(end for end, _ in ends)], result)
    (_, low), (_, high) = ends
    # Clip is min(max(x, low), high)
    bound = max(abs(min(max(v, low), high)) for v in (-wide.bound, wide.bound))
    wides.set(node, Wide(result, wide.scale, max(1, bound)))


def multiply(wides: Wides, node: Node) -> None:
    """Mul by a number moves the step alone; two tensors are multiplied, halved first where the product could leave int32."""
    name, output = node.outputs[0].name, node.outputs[0]
    for index in (0, 1):
        number = scalar_of(node.input(index))
        if number is not None and number != 0 and np.isfinite(number):
            _scaled(wides, node, wides.read(node.inputs[1 - index]), number)
            return
    if _smoothed(wides, node):
        return
    table = next((i for i in (1, 0) if _is_table(wides, node.inputs[i])), None)
    unit = wides.unit(output)
    if table is not None and unit is not None:
        left = wides.read(node.inputs[1 - table])
        right = look_up(wides, node.inputs[table], unit / left.scale)
    else:
        left, right = (wides.read(t) for t in node.inputs)
    if left.bound * right.bound > INT32_MAX:
        larger = max(left, right, key=lambda w: w.bound)
        smaller = right if larger is left else left
        most = max(INT32_MAX // smaller.bound, 2**15)
        larger = wides.halved(larger, most, f"{name}_a")
        smaller = wides.halved(smaller, INT32_MAX // larger.bound, f"{name}_b")
        left, right = larger, smaller
    product = wides.binary("Mul", left.integers, right.integers, name, output)
    wides.set(node, Wide(product, left.scale * right.scale, left.bound * right.bound))


def _smoothed(wides: Wides, node: Node) -> bool:
    """Positive numbers a channel of the last axis, on the way to 8 bits: the multiplier of the rescale takes them in."""
    index = next((i for i in (0, 1) if isinstance(node.inputs[i], Const)), None)
    if index is None or wides.graph.is_pinned(node.outputs[0]):
        return False
    if {n.op for n in node.outputs[0].consumers} != {"QuantizeLinear"}:
        return False
    factors, source = node.inputs[index], node.inputs[1 - index]
    assert isinstance(factors, Const)
    channels = source.dims[-1] if source.dims else None
    if factors.elem_type != TensorProto.FLOAT or factors.dims[-1:] != (channels,) or np.prod(factors.dims) != channels:
        return False
    values = factors.array().astype(np.float64).reshape(-1)
    if not (np.isfinite(values).all() and (values > 0).all()):
        return False
    wides.scaled[node.outputs[0]] = (wides.read(source), values)
    return True


def divide(wides: Wides, node: Node) -> None:
    """Div by a number moves the step alone; by a tensor of counts (whole numbers) it is an integer division."""
    number = scalar_of(node.input(1))
    left = wides.read(node.inputs[0])
    if number is not None:
        if number == 0 or not np.isfinite(number):
            raise Refusal("it divides by 0 or by a number that is not finite")
        _scaled(wides, node, left, 1.0 / number)
        return
    right = wides.read(node.inputs[1])
    # The step of a stored tensor may be 1 by chance: its numbers were rounded to it, and may be negative.
    if right.scale != 1.0 or isinstance(node.inputs[1], Const):
        raise Refusal("it divides by a tensor that holds no whole numbers")
    output = node.outputs[0]
    left = wides.halved(left, IDivide.most, output.name)
    result = wides.value(output.name + "_quotient", output)
    kernel = in_domain(lambda: IDivide(left.scale))
    kernel_call(wides.graph, kernel, [left.integers, right.integers], result, output.name)
    wides.set(node, Wide(result, left.scale, left.bound))


def _scaled(wides: Wides, node: Node, wide: Wide, number: float) -> None:
    if number > 0:
        wides.set(node, replace(wide, scale=wide.scale * number))
        return
    result = wides.value(node.outputs[0].name + "_negated", node.outputs[0])
    plumb(wides.graph, "Neg", [wide.integers], result)
    wides.set(node, replace(wide, integers=result, scale=wide.scale * -number))


def negate(wides: Wides, node: Node) -> None:
    """Neg."""
    _scaled(wides, node, wides.read(node.inputs[0]), -1.0)


def relu(wides: Wides, node: Node) -> None:
    """Relu."""
    wide = wides.read(node.inputs[0])
    zero = wides.graph.constant(node.outputs[0].name + "_none", np.asarray(0, np.int32))
    wides.set(node, replace(wide, integers=wides.binary("Max", wide.integers, zero, node.outputs[0].name, node.outputs[0])))


def reduce_sum(wides: Wides, node: Node) -> None:
    """ReduceSum; int32 sums saturate in onnxruntime, and over a dynamic dimension of 2^14 or fewer they do not even that."""
    _reduce(wides, node, mean=False)


def reduce_mean(wides: Wides, node: Node) -> None:
    """ReduceMean over static dimensions: the sum, its step divided by their size."""
    _reduce(wides, node, mean=True)


def _reduce(wides: Wides, node: Node, mean: bool) -> None:
    axes = ints_of(node, "axes", 1)
    dims = node.inputs[0].dims
    if axes is None or dims is None:
        raise Refusal("it reduces over axes or dimensions that are not known")
    sizes = [dims[a] for a in axes]
    static = [s for s in sizes if isinstance(s, int)]
    if mean and len(static) < len(sizes):
        raise Refusal("its mean is over a dimension that is not static")
    output = node.outputs[0]
    if mean and 0 in static:
        raise Refusal("its mean is over no values")
    count = int(np.prod(static, dtype=np.int64)) * (_LONGEST if len(static) < len(sizes) else 1)
    wide = wides.halved(wides.read(node.inputs[0]), max(INT32_MAX // max(count, 1), 1), output.name)
    result = wides.value(output.name + "_total", output)
    given = wides.graph.constant(output.name + "_axes", np.asarray(axes, np.int64))
    plumb(wides.graph, "ReduceSum", [wide.integers, given], result, keepdims=int(node.attr("keepdims", 1)))
    scale = wide.scale / count if mean else wide.scale
    wides.set(node, Wide(result, scale, min(INT32_MAX, wide.bound * count)))


def average(wides: Wides, node: Node) -> None:
    """GlobalAveragePool: the sum over static positions, its step divided by their number."""
    dims, output = node.inputs[0].dims, node.outputs[0]
    area = pool_area(node)
    if area is None or dims is None:
        raise Refusal("the size of its input is not static")
    wide = wides.halved(wides.read(node.inputs[0]), max(INT32_MAX // area, 1), output.name)
    result = wides.value(output.name + "_total", output)
    axes = wides.graph.constant(output.name + "_axes", np.arange(2, len(dims), dtype=np.int64))
    plumb(wides.graph, "ReduceSum", [wide.integers, axes], result)
    wides.set(node, Wide(result, wide.scale / area, wide.bound * area))


def from_integers(wides: Wides, node: Node) -> None:
    """Cast of integers (masks, counts) to float: whole numbers with step 1, held within what the samples had."""
    source, output = node.inputs[0], node.outputs[0]
    if source in wides.of and node.attr("to") in (TensorProto.FLOAT, TensorProto.DOUBLE):
        wides.set(node, wides.of[source])
        return
    if source.elem_type not in _INTEGERS or node.attr("to") != TensorProto.FLOAT:
        raise Refusal("it converts between floats")
    result = wides.value(output.name + "_whole", output)
    plumb(wides.graph, "Cast", [source], result, to=TensorProto.INT32)
    ranges: dict[int, int] = {TensorProto.BOOL: 1, TensorProto.INT8: 128, TensorProto.UINT8: 255}
    if source.elem_type in ranges:
        wides.set(node, Wide(result, 1.0, ranges[source.elem_type]))
        return
    seen = _seen(wides, source)
    wides.set(node, wides.bounded(Wide(result, 1.0, INT32_MAX), seen, output.name))


def _seen(wides: Wides, tensor: Tensor) -> int:
    """The largest magnitude in the samples of the graph input that integer `tensor` is moved from."""
    while tensor.producer is not None and tensor.producer.op in MOVES:
        tensor = tensor.producer.inputs[0]
    samples = [s[tensor.name] for s in wides.context.samples if tensor.name in s]
    if tensor.producer is not None or not samples:
        raise Refusal("it reads integers whose range is not known")
    return max(1, *(int(np.abs(s.astype(np.int64)).max(initial=0)) for s in samples))


def move(wides: Wides, node: Node) -> None:
    """Movement of data: the same nodes on the integers. A stored table takes the step of the sum that it ends in."""
    source, output = node.inputs[0], node.outputs[0]
    if isinstance(source, Const):
        unit = wides.unit(output)
        if node.op == "Gather":
            if unit is not None:
                wides.set(node, _gathered(wides, node, unit))
            return  # else `look_up` is asked, with the step that fits
        wide = wides.read(source, unit)
    else:
        wide = wides.read(source)
    moved = wides.graph.node(
        node.op, [wide.integers, *node.inputs[1:]], [wides.value(o.name + "_moved", o) for o in node.outputs]
    )
    moved.attrs.update(node.attrs)
    moved.name = ""
    for index, result in enumerate(moved.outputs):
        wides.set(node, replace(wide, integers=result), index)


def _is_table(wides: Wides, tensor: Tensor) -> bool:
    node = tensor.producer
    return node is not None and node.op == "Gather" and isinstance(node.inputs[0], Const) and tensor not in wides.of


def look_up(wides: Wides, tensor: Tensor, scale: float) -> Wide:
    """The rows that a Gather takes from a stored float table, in steps of `scale`."""
    node = tensor.producer
    assert node is not None
    return _gathered(wides, node, scale)


def _gathered(wides: Wides, node: Node, scale: float) -> Wide:
    """int16 entries times a power of two where the table needs no more, so that it takes half the room."""
    table, name = node.inputs[0], node.outputs[0].name
    assert isinstance(table, Const)
    if table.elem_type == TensorProto.INT8:
        raise Refusal("it looks integers up")
    values = table.array().astype(np.float64)
    peak = float(np.abs(values).max(initial=0.0)) / scale
    if not np.isfinite(peak) or peak > 2.0**30:
        raise Refusal("it reads a constant that is too large for the other operands' step")
    power = max(0, frexp(peak)[1] - _TABLE_BITS)
    entries = np.clip(np.rint(values / (scale * 2.0**power)), -(2**15 - 1), 2**15 - 1).astype(np.int16)
    found = Value(wides.graph.fresh_name(name + "_rows"))
    stored = wides.graph.constant(table.name + "_wide", entries)
    plumb(wides.graph, "Gather", [stored, node.inputs[1]], found, axis=int(node.attr("axis", 0)))
    result = wides.value(name + "_entries", node.outputs[0])
    plumb(wides.graph, "Cast", [found], result, to=TensorProto.INT32)
    bound = int(np.abs(entries.astype(np.int64)).max(initial=1)) << power
    if power == 0:
        return Wide(result, scale, bound)
    return Wide(wides.times(result, np.asarray(1 << power), name), scale, bound)


def concat(wides: Wides, node: Node) -> None:
    """Concat in the step of the sum that it belongs to."""
    step = _common_step(wides, node)
    operands = [wides.read(t, step) for t in node.inputs]
    result = wides.value(node.outputs[0].name + "_joined", node.outputs[0])
    plumb(wides.graph, "Concat", [o.integers for o in operands], result, axis=int(node.attr("axis", 0)))
    wides.set(node, Wide(result, step, max(o.bound for o in operands)))


def square(wides: Wides, node: Node) -> None:
    """Pow with exponent 2."""
    if scalar_of(node.input(1)) != 2.0:
        raise Refusal("Pow with another exponent than 2")
    name = node.outputs[0].name
    wide = wides.halved(wides.read(node.inputs[0]), 2**15, name)
    wides.set(node, Wide(wides.binary("Mul", wide.integers, wide.integers, name, node.outputs[0]), wide.scale**2, wide.bound**2))


ARITHMETIC: dict[str, Callable[[Wides, Node], None]] = {
    "Add": add,
    "Sum": add,
    "Sub": add,
    "Mul": multiply,
    "Div": divide,
    "Neg": negate,
    "Relu": relu,
    "Clip": clip,
    "Max": extreme,
    "Min": extreme,
    "Pow": square,
    "ReduceSum": reduce_sum,
    "ReduceMean": reduce_mean,
    "Cast": from_integers,
    "Concat": concat,
    "GlobalAveragePool": average,
    **dict.fromkeys(MOVES, move),
}
