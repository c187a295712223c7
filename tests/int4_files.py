"""INT4 files read by onnx alone."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def unpacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same file with every INT4 initializer and its Cast replaced by int8 ones: read by onnx, not by the code under test."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    integers = {
        i.name: numpy_helper.to_array(i).astype(np.int8) for i in model.graph.initializer if i.data_type == TensorProto.INT4
    }
    casts = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in integers}
    assert set(casts) == set(integers)
    kept = [n for n in model.graph.node if not (n.op_type == "Cast" and n.input[0] in integers)]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    initializers = [i for i in model.graph.initializer if i.name not in integers]
    del result.graph.initializer[:]
    result.graph.initializer.extend(initializers)
    result.graph.initializer.extend(numpy_helper.from_array(v, casts[k]) for k, v in integers.items())
    return result
