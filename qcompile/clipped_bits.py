"""How many bits of an 8-bit activation are in use, read from the file: a Clip on the integers says so."""

from __future__ import annotations

from onnx import TensorProto

from qcompile.context import WIDTHS
from qcompile.graph import Tensor
from qcompile.placement import data_inputs, shares_scale

_EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)


def clipped_bits(integers: Tensor) -> int:
    """The least of the widths 2, 3, 4, 5, 6, 8 that holds all values that Clips with stored bounds let through.

    Data movement in between is followed; of several tensors that are joined the widest counts. 8 where there is no Clip.
    """
    widest, seen, stack = 0, set[Tensor](), [integers]
    while stack:
        tensor = stack.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        node = tensor.producer
        if node is not None and node.op == "Clip" and node.domain in ("", "ai.onnx"):
            low, high = node.constant(1), node.constant(2)
            if low is None or high is None or low.elem_type not in _EIGHT_BIT:
                return 8
            span = int(high.array().reshape(())) - int(low.array().reshape(()))
            widest = max(widest, next((b for b in WIDTHS if span < 2**b), 8))
        elif node is not None and shares_scale(node):
            stack += data_inputs(node)
        else:
            return 8
    return widest
