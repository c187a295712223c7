"""The integer format of whole models: the same bits as the other formats, integer ends, refusals."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from exactness_helpers import MODELS, ZOO, zoo_tasks
from onnx import TensorProto
from passes_helpers import parse
from runtime_marks import needs_conv_integer

from qcompile.certificate import certify
from qcompile.errors import InputError
from qcompile.graph import Graph
from qcompile.integer_outputs import DequantisedOutputs, give_integers
from qcompile.interpret import Interpreter
from qcompile.pipeline import Compiled, compile_model
from qcompile.runtime import Optimisation, Session

pytestmark = needs_conv_integer
DATA = str(MODELS / "digits_calib.npz")


# --- whole models ---------------------------------------------------------------------------------------------


def compiled(path: Path, **options: Any) -> Compiled:
    model = options.pop("model", MODELS / "digits_cnn.onnx")
    return compile_model(model, path, **{"data": DATA, "effort": "fast", "latency": False, **options})


def digits(count: int) -> list[dict[str, Any]]:
    return [{"input": x[None]} for x in np.load(MODELS / "digits.npz")["input"][:count]]


def same(first: Path, others: list[Path], feeds: list[dict[str, Any]]) -> None:
    expected = [Session(first, threads=1).run(f) for f in feeds]
    for path in others:
        for level in (Optimisation.OFF, Optimisation.ALL):
            for threads in (1, 2):
                session = Session(path, optimisation=level, threads=threads)
                for feed, want in zip(feeds, expected, strict=True):
                    for name, value in session.run(feed).items():
                        np.testing.assert_array_equal(value, want[name])
        interpreter = Interpreter(path)
        for feed, want in zip(feeds, expected, strict=True):
            for name, value in interpreter.run(feed).items():
                np.testing.assert_array_equal(value, want[name])


@pytest.mark.parametrize("bits", [8, 4])
def test_files_of_digits_cnn(bits: int, tmp_path: Path) -> None:
    """With functions, written out, and at the least opset: the bits of the Q/DQ file."""
    qdq = compiled(tmp_path / "qdq.onnx", bits=bits).path
    result = compiled(tmp_path / "i.onnx", format="integer", bits=bits)
    paths = [result.path, compiled(tmp_path / "inline.onnx", format="integer", inline=True, bits=bits).path]
    if bits == 8:
        paths.append(compiled(tmp_path / "old.onnx", format="integer", opset=13).path)
        paths.append(compiled(tmp_path / "older.onnx", format="integer", opset=13, inline=True).path)
    same(qdq, paths, digits(8))
    models = [onnx.load(p) for p in paths]
    for model in models:
        onnx.checker.check_model(model, full_check=True)
        assert certify(model).integer_only
    assert [bool(m.functions) for m in models] == [True, False, True, False][: len(paths)]
    assert {o.domain for o in models[1].opset_import} == {""}
    assert sum(n.op_type.startswith("DyadicRescale") for n in models[0].graph.node) == 7
    assert result.report["integer_only"]["holds"]
    assert [e["kind"] for e in result.report["integer_only"]["ends"]] == ["quantise input", "dequantise output"]
    assert result.report["nodes"]["float"] == 0
    again = compiled(tmp_path / "again.onnx", format="integer", bits=bits).path
    assert again.read_bytes() == result.path.read_bytes()


def test_the_reference_evaluator_gives_the_same_bits(tmp_path: Path) -> None:
    qdq = compiled(tmp_path / "qdq.onnx").path
    model = onnx.load(compiled(tmp_path / "i.onnx", format="integer").path)
    evaluator = onnx.reference.ReferenceEvaluator(model)
    for feed in digits(2):
        np.testing.assert_array_equal(evaluator.run(None, feed)[0], Session(qdq).run(feed)["logits"])


def test_integer_inputs(tmp_path: Path) -> None:
    result = compiled(tmp_path / "i.onnx", format="integer", inputs_as="uint8")
    assert result.report["accuracy"]["sqnr_db"] > 25
    assert [e["kind"] for e in result.report["integer_only"]["ends"]] == ["dequantise output"]


@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inline"])
def test_integer_ends(inline: bool, tmp_path: Path) -> None:
    """uint8 in, int32 out; what they mean stands in the metadata, and gives the logits of the file with float ends."""
    plain = Session(compiled(tmp_path / "f.onnx", format="integer").path)
    result = compiled(tmp_path / "i.onnx", format="integer", io="integer", inline=inline)
    model = onnx.load(result.path)
    assert result.report["integer_only"]["ends"] == [] and "float" not in result.report["integer_only"]["element_types"]
    assert result.report["accuracy"]["sqnr_db"] > 25
    assert [o.type.tensor_type.elem_type for o in model.graph.output] == [TensorProto.INT32]
    assert [i.type.tensor_type.elem_type for i in model.graph.input] == [TensorProto.UINT8]
    stated = {p.key: json.loads(p.value) for p in model.metadata_props if p.key.startswith(("qcompile.in", "qcompile.out"))}
    x, y = stated["qcompile.input.input"], stated["qcompile.output.logits"]
    session = Session(result.path)
    for feed in digits(4):
        q = np.clip(np.rint(feed["input"] / np.float32(x["scale"])) + x["zero_point"], 0, 255).astype(np.uint8)
        logits = session.run({"input": q})["logits"].astype(np.float32) * np.asarray(y["scale"], np.float32)
        np.testing.assert_array_equal(logits, plain.run(feed)["logits"])


def ends(text: str) -> Graph:
    constants = {"s": np.float32(0.5), "z": np.uint8(3), "w": np.eye(4, dtype=np.int8)}
    return Graph.from_proto(parse(f"g (uint8[2, 4] q) => (float[2, 4] y) {{ {text} }}", 21, **constants))


def test_outputs_whose_integers_are_read_elsewhere_or_fed() -> None:
    for text in ("y = DequantizeLinear(q, s, z)", "m = Max(q, z) y = DequantizeLinear(m, s, z) n = Neg(m)"):
        graph = ends(text)
        assert give_integers(graph) == ["y"]
        feed = np.arange(8, dtype=np.uint8).reshape(2, 4)
        got = DequantisedOutputs(Session(graph.to_proto()), graph.to_proto()).run({"q": feed})["y"]
        integers = feed if "Max" not in text else np.maximum(feed, 3)
        np.testing.assert_array_equal(got, (integers.astype(np.float32) - 3) * np.float32(0.5))


def test_a_float_head_has_no_integers_to_give() -> None:
    with pytest.raises(InputError, match=r"--io integer: output 'y' is made in float by node '.*' \(Softmax\)"):
        give_integers(ends("f = DequantizeLinear(q, s, z) y = Softmax(f)"))


def test_without_integer_kernels_a_transformer_keeps_its_floats(tmp_path: Path) -> None:
    """What `lower_wide` makes of a transformer is in test_lower_wide; `qdq` says what it leaves."""
    found = certify(compiled(tmp_path / "q.onnx", model=MODELS / "digits_vit.onnx").path)
    assert not found.integer_only and {f.op for f in found.floats} >= {"Softmax", "LayerNormalization", "Gelu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "integer", "exclude": ["/pool*"]}, "--exclude /pool.: no node may stay float"),
        ({"format": "integer", "target": "arm"}, "--format integer --target arm"),
        ({"format": "qdq", "io": "integer"}, "--io integer --format qdq: only integer files have integer ends"),
        ({"format": "integer", "io": "int8"}, "--io int8: choose one of float, integer"),
        ({"format": "qdq", "inline": True}, "--inline --format qdq: only integer files call functions"),
        ({"format": "integer", "bits": 4, "activations": "float"}, "--activations float --format integer"),
    ],
    ids=["exclude", "arm", "io_qdq", "io_int8", "inline", "weight_only"],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        compiled(tmp_path / "i.onnx", **options)


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["resnet20_cifar10", "mobilenet_v1", "squeezenet", "resnet8_cifar10", "mobilenet_v2"])
def test_real_models(task: str, tmp_path: Path) -> None:
    """The bits of the Q/DQ file; where that ends in a float Softmax, its probabilities to i-exp's error and a unit of e a key."""
    tasks = zoo_tasks()
    spec = f"{ZOO / 'tasks.py'}:{task}_calib"
    model = ZOO / task / "model.onnx"
    paths = {f: compiled(tmp_path / f"{f}.onnx", model=model, format=f, data=spec, samples=8).path for f in ("qdq", "integer")}
    feeds = [f for f, _ in islice(getattr(tasks, f"{task}_eval")(), 2)]
    head = task in ("squeezenet", "resnet8_cifar10")
    same(paths["integer"] if head else paths["qdq"], [paths["integer"]], feeds)
    found = certify(paths["integer"])
    assert found.integer_only
    assert [e.kind for e in found.ends] == ["quantise input", "dequantise output"]
    if head:
        for feed in feeds:
            (probabilities,), (wanted,) = (tuple(Session(paths[f]).run(feed).values()) for f in ("integer", "qdq"))
            np.testing.assert_allclose(probabilities, wanted, rtol=0, atol=2.0e-3 + 2.0**-14 + probabilities.size * 2.0**-16)
            assert abs(float(probabilities.sum()) - 1) < 2.0**-15 * probabilities.size
    if task == "resnet20_cifar10":
        evaluator = onnx.reference.ReferenceEvaluator(onnx.load(paths["integer"]))
        for feed in feeds[:2]:
            np.testing.assert_array_equal(evaluator.run(None, feed)[0], Session(paths["qdq"]).run(feed)["logits"])


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["kws_dscnn", "ad_autoencoder"])
def test_models_without_data(task: str, tmp_path: Path) -> None:
    result = compiled(tmp_path / "i.onnx", model=ZOO / task / "model.onnx", format="integer", data=None)
    assert certify(result.path).integer_only
    assert any("no --data" in w for w in result.report["warnings"])
