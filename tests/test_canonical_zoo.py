"""The float passes in their order on real models: outputs stay, clutter goes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import version_converter

from qcompile.context import Context
from qcompile.graph import Array, Graph
from qcompile.passes.eliminate import Eliminate
from qcompile.passes.fold_bn import FoldBatchNorm
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.linear_form import LinearForm
from qcompile.passes.simplify_shapes import SimplifyShapes
from qcompile.passes.sink_reshapes import SinkReshapes
from qcompile.rewrite import Pass
from qcompile.runtime import Optimisation, Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
PASSES: list[Pass] = [
    FoldConstants(), SimplifyShapes(), Eliminate(), FuseLinear(), FoldBatchNorm(), LinearForm(), SinkReshapes(), Eliminate()
]  # fmt: skip
EXPECTED = {
    "mobilenet_v1": {"Conv": 27, "Clip": 27, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1},
    "mobilenet_v2": {"Conv": 52, "Clip": 35, "Add": 10, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1},
    "squeezenet": {
        "Conv": 26,
        "Relu": 26,
        "MaxPool": 3,
        "Concat": 8,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Softmax": 1,
        "Reshape": 1,
    },
    "resnet20_cifar10": {"Conv": 19, "Relu": 19, "Add": 9, "Slice": 4, "Pad": 2, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1},
    "resnet8_cifar10": {"Conv": 9, "Relu": 7, "Add": 3, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1, "Softmax": 1},
    "minilm_sst2": {"Gemm": 37, "Reshape": 26, "MatMul": 12},
    "vit_mnist": {"Gemm": 17, "Reshape": 12, "MatMul": 8},
    "mnist_cnn": {"Conv": 2, "Relu": 2, "MaxPool": 2, "Reshape": 1, "Gemm": 1},
    "kws_dscnn": {"Reshape": 2, "Conv": 9, "Relu": 9, "GlobalAveragePool": 1, "Gemm": 1, "Softmax": 1},
    "ad_autoencoder": {"Gemm": 10, "Relu": 9},
    "ultraface": {"Conv": 52, "Relu": 37},
}


def load(name: str) -> onnx.ModelProto:
    if not ZOO.is_dir():
        pytest.skip(f"{ZOO} is absent")
    model = onnx.load(ZOO / name / "model.onnx")
    if next(o.version for o in model.opset_import if o.domain == "") >= 13:
        return model
    constants = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:], model.opset_import[1:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)
    return version_converter.convert_version(model, 13)


def feeds(model: onnx.ModelProto, batch: int, length: int) -> dict[str, Array]:
    rng = np.random.default_rng(batch)
    made: dict[str, Array] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [d.dim_value if d.HasField("dim_value") else (batch if i == 0 else length) for i, d in enumerate(dims)]
        if value.name == "attention_mask":
            made[value.name] = (np.arange(length) < length - np.arange(batch)[:, None]).astype(np.int64)
        elif value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            made[value.name] = rng.integers(0, 2 if "type" in value.name else 20000, sizes)
        else:
            made[value.name] = rng.normal(size=sizes).astype(np.float32)
    return made


@pytest.mark.zoo
@pytest.mark.parametrize("name", EXPECTED)
def test_outputs_stay_and_clutter_goes(name: str) -> None:
    model = load(name)
    graph = Graph.from_proto(model)
    for pass_ in PASSES:
        pass_.run(graph, Context())
        assert pass_.run(graph, Context()).rewrites == 0, pass_.name
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    for level in (Optimisation.OFF, Optimisation.ALL):
        before, after = Session(model, optimisation=level), Session(result, optimisation=level)
        for batch, length in ((1, 7), (3, 19)):
            if batch > 1 and model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
                continue
            feed = feeds(model, batch, length)
            got = after.run(feed)
            for key, value in before.run(feed).items():
                assert got[key].shape == value.shape
                np.testing.assert_allclose(got[key], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=key)
    found = Counter(n.op for n in graph.nodes)
    expected = EXPECTED[name]
    assert {op: found[op] for op in expected} == expected
    if name not in ("minilm_sst2", "vit_mnist", "ultraface"):
        assert dict(found) == expected
    assert len(graph.nodes) <= {"minilm_sst2": 194, "vit_mnist": 114, "ultraface": 126}.get(name, len(graph.nodes))
