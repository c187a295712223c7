"""Loading for compilation: the zoo, the checks and what each refusal says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from qcompile import equivalence, load
from qcompile.errors import ModelError
from qcompile.graph import Graph
from qcompile.load import load_model, newest_opset
from qcompile.runtime import Optimisation, Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
TASKS = [
    "mobilenet_v1", "mobilenet_v2", "squeezenet", "resnet20_cifar10", "resnet8_cifar10", "minilm_sst2", "vit_mnist",
    "mnist_cnn", "kws_dscnn", "ad_autoencoder", "ultraface",
]  # fmt: skip
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason=f"{ZOO} is absent: no real models")


def text_model(
    body: str, opset: int = 17, constants: str = "", domain: str = "", ends: str = "float[2, 2] x) => (float[2, 2] y"
) -> ModelProto:
    extra = f', "{domain}" : 1' if domain else ""
    middle = f"<{constants}>" if constants else ""
    return parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{extra}]> g ({ends}) {middle} {{ {body} }}')


def saved(tmp_path: Path, model: ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.zoo
@needs_zoo
@pytest.mark.parametrize("task", TASKS)
def test_real_models_load(task: str) -> None:
    path = ZOO / task / "model.onnx"
    loaded = load_model(path)
    model = loaded.graph.to_proto()
    onnx.checker.check_model(model)
    assert (model.ir_version, loaded.graph.opset()) == (10, 21)
    assert len(loaded.graph.shell.opset_import) == 1
    assert loaded.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    names = [n.name for n in loaded.graph.nodes]
    assert len(set(names)) == len(names)
    assert "" not in names
    assert loaded.notes[0].startswith("opset ")
    assert len(loaded.notes) == 1  # the conversion was checked by running
    source = Graph.load(path)
    assert [i.name for i in loaded.graph.inputs] == [i.name for i in source.inputs]
    assert len(names) == len(source.nodes)  # no clutter from the conversion
    assert {k: c.proto for k, c in source.constants.items()}.items() <= {
        k: c.proto for k, c in loaded.graph.constants.items()
    }.items()


def test_a_current_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compare_models", lambda *a, **k: pytest.fail("compared"))
    loaded = load_model(saved(tmp_path, text_model("y = Relu(x)", 21)))
    assert loaded.notes == []


def test_a_newer_opset_is_kept_where_the_runtime_takes_it(tmp_path: Path) -> None:
    assert newest_opset() >= 21
    loaded = load_model(saved(tmp_path, text_model("y = Relu(x)", newest_opset())))
    assert loaded.graph.opset() == newest_opset()


def test_nodes_get_stable_names_of_their_own(tmp_path: Path) -> None:
    model = text_model("a = Relu(x) b = Neg(a) c = Neg(b) d = Neg(c) y = Add(d, d)", 21)
    for node, name in zip(model.graph.node, ["", "same", "same", "", "Neg_3"], strict=True):
        node.name = name
    loaded = load_model(saved(tmp_path, model))
    assert [n.name for n in loaded.graph.nodes] == ["Relu_0", "same", "same_1", "Neg_3_1", "Neg_3"]


def test_unused_imports_are_dropped_and_used_ones_kept(tmp_path: Path) -> None:
    model = text_model("a = com.microsoft.Gelu(x) y = Relu(a)", domain="com.microsoft")
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    loaded = load_model(saved(tmp_path, model))
    assert {o.domain for o in loaded.graph.shell.opset_import} == {"", "com.microsoft"}


def test_functions_are_inlined_before_conversion(tmp_path: Path) -> None:
    model = parse_model("""
    <ir_version: 8, opset_import: ["" : 11, "local" : 1]> g (float[2, 2] x) => (float[2, 2] y) { y = local.soft(x) }
    <domain: "local", opset_import: ["" : 11]> soft (a) => (b) { b = Softmax <axis = 0> (a) }
    """)
    loaded = load_model(saved(tmp_path, model))
    assert loaded.notes[0] == "1 local functions inlined"
    x = np.ones((2, 2), np.float32)
    assert Session(loaded.graph.to_proto()).run({"x": x})["y"].tolist() == [[0.25, 0.25], [0.25, 0.25]]


def test_half_precision_models_are_widened_and_checked(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(2, dtype=np.float16), "w")
    model = text_model("y = MatMul(x, w)", ends="float16[N, 2] x) => (float16[N, 2] y")
    model.graph.initializer.append(weight)
    loaded = load_model(saved(tmp_path, model))
    assert "half-precision" in loaded.notes[1]
    assert loaded.graph.constants["w"].elem_type == TensorProto.FLOAT
    assert loaded.graph.inputs[0].elem_type == TensorProto.FLOAT16


def test_digest_covers_external_data(tmp_path: Path) -> None:
    model = text_model("y = MatMul(x, w)", 21)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(2, dtype=np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    data = path.with_name("w.bin")
    expected = hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest()
    assert load_model(path).source_sha256 == expected
    data.unlink()
    with pytest.raises(ModelError, match=r"w\.bin is missing"):
        load_model(path)


def test_external_models_are_converted_without_their_data_inside(tmp_path: Path) -> None:
    model = text_model("a = MatMul(x, w) y = Softmax(a)", 11)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(2, dtype=np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = load_model(path)
    assert loaded.graph.constants["w"].proto.data_location == TensorProto.EXTERNAL
    assert loaded.notes == ["opset 11 raised to 21 (1 nodes rewritten)"]


# ---- files that are no models ----
@pytest.mark.parametrize("content", [b"", b"\x89PNG not a model at all", b"{}"], ids=["empty", "png", "json"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx: not an ONNX model"):
        load_model(path)


def test_missing_truncated_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "no.onnx")
    with pytest.raises(ModelError, match="a folder"):
        load_model(tmp_path)
    model = text_model("y = MatMul(x, w)")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "w"))
    path = saved(tmp_path, model)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"m\.onnx: not an ONNX model, or truncated"):
        load_model(path)


# ---- models that cannot be compiled ----
W = "float[2, 2] w = {1, 2, 3, 4}"
Q = "float s = {0.1}, uint8 z = {3}, uint8[2, 2] u = {1, 2, 3, 4}, int8[2, 2] v = {1, 2, 3, 4}, int8 o = {0}"
REFUSED: dict[str, tuple[ModelProto, str]] = {
    "future": (text_model("y = Relu(x)", 99), r"opset 99 is newer than onnxruntime takes"),
    "old": (text_model("y = Relu(x)", 6), r"opset 6 is too old"),
    "qdq_in_a_body": (
        text_model(
            "y = If (t) <then_branch = a () => (float[2, 2] p) { q = QuantizeLinear(x, s, z) p = DequantizeLinear(q, s, z) }, "
            "else_branch = b () => (float[2, 2] r) { r = Relu(x) }>",
            constants=Q + ", bool t = {1}",
        ),
        r"QuantizeLinear in a body of If, Loop or Scan is not imported",
    ),
    "qdq_and_dynamic": (
        text_model(
            "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) q, c, d = DynamicQuantizeLinear(b) "
            "y = DequantizeLinear(q, c, d)", constants=Q
        ),
        r"already quantised: 1 DynamicQuantizeLinear; only",
    ),
    "weight_only": (
        text_model("w = DequantizeLinear(v, s, o) y = MatMul(x, w)", constants=Q), r"already quantised: 1 DequantizeLinear"
    ),
    "weight_only_cast": (
        text_model("c = Cast <to = 3> (v) w = DequantizeLinear(c, s, o) y = MatMul(x, w)", constants=Q), r"1 DequantizeLinear"
    ),
    "dynamic": (
        text_model("q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, v, b) y = Cast <to = 1> (i)", constants=Q),
        r"already quantised: 1 DynamicQuantizeLinear, 1 MatMulInteger; only activations and weights in Q/DQ pairs are imported",
    ),
    "microsoft": (
        text_model("y = com.microsoft.QGemm(u, s, z, v, s, o)", constants=Q, domain="com.microsoft"), r"quantised: 1 QGemm"
    ),
    "foreign": (
        text_model("y = acme.Magic(x)", domain="acme"), r"node 'Magic\(y\)' has an operator that onnxruntime cannot run"
    ),
    "training_bn": (
        text_model("y = BatchNormalization <training_mode = 1> (x, b, b, b, b)", constants="float[2] b = {1, 1}"),
        r"BatchNormalization in training form",
    ),
    "training_dropout": (
        text_model("y = Dropout(x, r, t)", constants="float r = {0.5}, bool t = {1}"), r"Dropout in training form"
    ),
    "training_domain": (
        text_model("y = ai.onnx.preview.training.Gradient <y = \"x\", xs = [\"x\"]> (x)", domain="ai.onnx.preview.training"),
        r"Gradient in training form",
    ),
    "unknown_op": (text_model("y = Crop(x)", 9), r"Crop does not exist"),
    "broken": (text_model("y = MatMul(x, w)", constants="float[3] w = {1, 2, 3}"), r"the original"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_models_that_cannot_be_compiled_say_why(tmp_path: Path, case: tuple[ModelProto, str]) -> None:
    path = saved(tmp_path, case[0])
    with pytest.raises(ModelError, match=case[1]) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_qdq_model_is_loaded_to_be_imported(tmp_path: Path) -> None:
    loaded = load_model(saved(tmp_path, text_model("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", constants=Q)))
    assert loaded.quantised
    assert not load_model(saved(tmp_path, text_model("y = Relu(x)"))).quantised


def test_dequantizing_an_input_is_no_quantised_model(tmp_path: Path) -> None:
    model = text_model(
        "y = DequantizeLinear(x, s, z)", constants="float s = {0.1}, uint8 z = {3}", ends="uint8[2, 2] x) => (float[2, 2] y"
    )
    assert len(load_model(saved(tmp_path, model)).graph.nodes) == 1


@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")], ids=["nan", "inf", "minus_inf"]
)
@pytest.mark.parametrize("form", ["direct", "moved", "constant_node"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, kind: str, form: str) -> None:
    tensor = numpy_helper.from_array(np.array([[1, value], [1, 1]], np.float32), "w")
    body = {"direct": "y = MatMul(x, w)", "moved": "t = Transpose(w) y = MatMul(x, t)", "constant_node": "y = MatMul(x, w)"}[form]
    model = text_model(body, 21)
    if form == "constant_node":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    else:
        model.graph.initializer.append(tensor)
    with pytest.raises(ModelError, match=rf"'w' \(weight of node '.*'\) holds {kind}"):
        load_model(saved(tmp_path, model))


def test_infinite_masks_are_legitimate(tmp_path: Path) -> None:
    model = text_model("a = Add(x, m) y = Softmax(a)")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, -np.inf], np.float32), "m"))
    assert len(load_model(saved(tmp_path, model)).graph.nodes) == 2


# ---- the comparison with the original ----
def test_a_conversion_that_changes_the_result_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(model: ModelProto, target: int) -> int:
        model.graph.node[0].op_type = "Neg"
        model.opset_import[0].version = target
        return 1

    monkeypatch.setattr(load, "raise_opset", sabotage)
    with pytest.raises(ModelError, match="output 'y' differs after opset conversion"):
        load_model(saved(tmp_path, text_model("y = Relu(x)")))


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (text_model("r = RandomNormalLike(x) y = Add(x, r)"), "draws random numbers"),
        (text_model("y = StringNormalizer(x)", ends="string[2] x) => (string[2] y"), "no random input"),
    ],
    ids=["random", "strings"],
)
def test_conversions_that_cannot_be_run_are_noted(tmp_path: Path, model: ModelProto, note: str) -> None:
    assert note in load_model(saved(tmp_path, model)).notes[-1]


def test_models_over_two_gib_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "_IN_MEMORY", 8)
    loaded = load_model(saved(tmp_path, text_model("y = MatMul(x, w)", constants=W)))
    assert "over 2 GiB" in loaded.notes[-1]


def test_open_dimensions_are_tried_until_the_original_runs(tmp_path: Path) -> None:
    head = '<ir_version: 8, opset_import: ["" : 11]> g (float[1, 3, H, W] x) => (float[1, K] y)'
    text = head + " { f = Flatten(x) a = MatMul(f, w) y = Softmax(a) }"
    model = parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((3 * 224 * 224, 2), np.float32), "w"))
    loaded = load_model(saved(tmp_path, model))
    assert len(loaded.notes) == 1  # 32x32 does not fit, 224x224 does
    session = Session(loaded.graph.to_proto(), optimisation=Optimisation.OFF)
    assert session.run({"x": np.zeros((1, 3, 224, 224), np.float32)})["y"].shape == (1, 2)
