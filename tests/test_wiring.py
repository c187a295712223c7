"""The index of a graph against onnx's own shape inference, and on what inference cannot tell."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, parser, shape_inference

from qcompile.wiring import Wiring, bits

MODELS = Path(__file__).resolve().parents[1] / "models"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


def _compare_types(path: Path) -> int:
    model = onnx.load(path)
    bare = onnx.load(path)
    del bare.graph.value_info[:]
    wiring = Wiring.of(bare)
    inferred = shape_inference.infer_shapes(model).graph.value_info
    wrong = {v.name for v in inferred if wiring.elem_type(v.name) != v.type.tensor_type.elem_type}
    assert wrong == set()
    return len(inferred)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_element_types_are_those_of_shape_inference(name: str) -> None:
    assert _compare_types(MODELS / f"{name}.onnx") > 5


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["minilm_sst2", "vit_mnist", "resnet20_cifar10", "ultraface", "squeezenet"])
def test_element_types_of_real_models(task: str) -> None:
    path = ZOO / task / "model.onnx"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    assert _compare_types(path) > 20


def _wiring(body: str) -> Wiring:
    return Wiring.of(
        parser.parse_model(f"""
            <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
            g (float[2, 8] x, uint8[2, 8] u, float s, uint8 z) => (y)
            {{ {body} }}
        """)
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = QuantizeLinear (x, s, z)", TensorProto.UINT8),
        ("y = QuantizeLinear (x, s)", TensorProto.UINT8),
        ("y = QuantizeLinear <output_dtype = 3> (x, s)", TensorProto.INT8),
        ("y = DequantizeLinear (u, s, z)", TensorProto.FLOAT),
        ("y = Cast <to = 10> (x)", TensorProto.FLOAT16),
        ("y = Shape (x)", TensorProto.INT64),
        ("y = Less (x, x)", TensorProto.BOOL),
        ("y = MatMulInteger (u, u)", TensorProto.INT32),
        ("a, b, y = DynamicQuantizeLinear (x)", TensorProto.UINT8),
        ("a, y = TopK (x, k)", TensorProto.INT64),
        ("y = com.microsoft.QLinearAdd (u, s, z, u, s, z, s, z)", TensorProto.UINT8),
        ("y = com.microsoft.QGemm (u, s, z, u, s, z)", TensorProto.FLOAT),
        ("y = com.microsoft.QGemm (u, s, z, u, s, z, u, s, z)", TensorProto.UINT8),
        ("y = com.microsoft.Gelu (x)", TensorProto.FLOAT),
    ],
)
def test_element_type_of(body: str, expected: int) -> None:
    assert _wiring(body).elem_type("y") == expected


def test_constants_are_followed_to_what_is_stored() -> None:
    wiring = _wiring("""
        w = Constant <value = int8[2, 3] {1, 2, 3, 4, 5, 6}> ()
        scale = Constant <value = float {0.5}> ()
        wide = Cast <to = 1> (w)
        scaled = Mul (wide, scale)
        turned = Transpose (scaled)
        y = Mul (turned, x)
    """)
    root = wiring.root("turned")
    assert root is not None
    assert (root.name, root.elem_type, root.elements, root.is_integer) == ("w", TensorProto.INT8, 6, True)
    assert wiring.root("y") is None
    assert wiring.is_float("y")
    assert not wiring.is_float("turned")
    scale = wiring.value("scale")
    assert scale is not None
    assert scale == 0.5
    assert wiring.value("y") is None


def test_moved_data_is_followed_both_ways_but_not_into_its_shape() -> None:
    wiring = _wiring("""
        r = Relu (x)
        shape = Shape (r)
        t = Transpose (r)
        f = Reshape (t, shape)
        y = Tanh (f)
        other = Expand (x, shape)
        also = Sqrt (other)
    """)
    relu = wiring.producer("r")
    assert wiring.behind_moves("f") is relu
    assert [node.op for node in wiring.ahead_of_moves("r")] == ["Tanh"]
    assert wiring.behind_moves("x") is None


@pytest.mark.parametrize(
    ("elem_type", "width"),
    [
        (TensorProto.INT4, 4),
        (TensorProto.INT8, 8),
        (TensorProto.FLOAT16, 16),
        (TensorProto.FLOAT, 32),
        (TensorProto.INT64, 64),
    ],
    ids=["int4", "int8", "float16", "float", "int64"],
)
def test_bits(elem_type: int, width: int) -> None:
    assert bits(elem_type) == width
