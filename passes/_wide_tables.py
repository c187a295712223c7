"""Functions of one 8-bit tensor: DQ -> f -> Q by a table of 256 entries, or GELU by I-BERT's polynomial."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from qcompile.graph import Node
from qcompile.kernels._functions import FUNCTIONS, Function, named
from qcompile.kernels.igelu import IGelu
from qcompile.kernels.table import Table
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._wide import Narrow, Refusal, Wide, Wides

_TYPES: dict[int, type[np.uint8] | type[np.int8]] = {TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8}
#: Attributes of ONNX operators that their functions take, with ONNX's defaults where those are not the functions' own.
_ATTRIBUTES = {"Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}
_NAMES = {"Swish": "Silu"}


def function_of(node: Node) -> Function:
    """The float64 function that `node` computes. Raises Refusal where there is none."""
    name = _NAMES.get(node.op, node.op)
    if node.op == "Gelu" and node.attr("approximate", "none") == "tanh":
        name = "GeluTanh"
    if name not in FUNCTIONS or (node.op == "Swish" and node.attr("alpha", 1.0) != 1.0):
        raise Refusal("no table is made of this function")
    given = {key: float(node.attr(key)) for key in _ATTRIBUTES.get(node.op, ()) if node.attr(key) is not None}
    return named(name, **given)


def tabulated(wides: Wides, node: Node) -> str | None:
    """Replace `node` and the QuantizeLinear behind it. Returns what is worth a note in the report, None as a rule."""
    x, output = wides.narrow(node.inputs[0]), node.outputs[0]
    if x is None:
        raise Refusal("its input is not quantised")
    quantisers = [n for n in output.consumers if n.op == "QuantizeLinear"]
    if len(quantisers) != 1 or len(output.consumers) != 1 or wides.graph.is_pinned(output):
        raise Refusal("its result is read in float")
    y = wides.written(quantisers[0])
    wides.graph.remove(quantisers[0])
    note = None
    if node.op == "Gelu" and wides.context.settings.kernels == "ibert":
        note = _polynomial(wides, node, x, y)
        if note is None:
            return None
    made = Table(
        function_of(node),
        float(x.scale),
        x.zero_point,
        float(y.scale),
        y.zero_point,
        input_type=_TYPES[x.elem_type],
        output_type=_TYPES[y.elem_type],
    )
    kernel_call(wides.graph, made, [x.integers], y.integers, output.name)  # type: ignore[arg-type]
    return note


def _polynomial(wides: Wides, node: Node, x: Narrow, y: Narrow) -> str | None:
    """i-GELU and a rescale; the reason why not, where the scale is outside its domain."""
    try:
        kernel = IGelu(float(x.scale), tanh=node.attr("approximate", "none") == "tanh")
    except ValueError:
        return "a scale outside i-GELU's domain: computed by table"
    output = node.outputs[0]
    wide = wides.read(node.inputs[0])
    result = wides.value(output.name + "_gelu", output)
    kernel_call(wides.graph, kernel, [wide.integers], result, output.name)
    bound = int(np.abs(kernel.reference(np.arange(-255, 256, dtype=np.int32))).max())
    wides.quantise(Wide(result, kernel.output_scale, bound), y, output.name)
    return None
