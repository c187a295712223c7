"""No --data: the way that is chosen, what is said about it, and how good the result is on real data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from passes_helpers import floats, parse

from qcompile.data import InputInfo
from qcompile.errors import DataError, InputError
from qcompile.passes import passes_for
from qcompile.pipeline import compile_model
from qcompile.runtime import Session
from qcompile.synthetic import InputMoments, synthetic_dataset

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"

TOKENS = """agraph (int64[N, L] ids, int64[N, L] token_type, int64[N, L] mask) => (float[N, L, 6] y)
{ a = Gather(words, ids)  b = Gather(kinds, token_type)  s = Add(a, b)  f = Cast<to: int = 1>(mask)  m = Unsqueeze(f, last)
  p = Mul(s, m)  h = MatMul(p, w)  y = Add(h, c) }"""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    model = parse(TOKENS, words=floats(40, 16), kinds=floats(2, 16), w=floats(16, 6), c=floats(6), last=np.array([2]))
    onnx.save(model, tmp_path / "tokens.onnx")
    return tmp_path / "tokens.onnx"


def compiled(model: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    return compile_model(model, tmp_path / "out.onnx", latency=False, **options).report


def test_tokens_are_dynamic(tokens: Path, tmp_path: Path) -> None:
    report = compiled(tokens, tmp_path)
    assert report["data"]["calibration"] == "dynamic"
    assert any("quantised at run time" in w for w in report["warnings"])
    assert any("accuracy was measured on synthetic inputs" in w for w in report["warnings"])
    assert report["accuracy"]["samples"] == 32
    assert report["accuracy"]["sqnr_db"] > 30
    assert report["nodes"]["quantised"] >= 1


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"format": "qoperator"}, r"'ids': --format qoperator needs static ranges.*give --data, or use --format qdq"),
        ({"target": "tensorrt"}, r"'ids': --target tensorrt needs static ranges.*--target any"),
    ],
    ids=["qoperator", "tensorrt"],
)
def test_tokens_need_data_for_static_ranges(tokens: Path, tmp_path: Path, options: dict[str, str], advice: str) -> None:
    with pytest.raises(InputError, match=advice) as caught:
        compiled(tokens, tmp_path, **options)
    assert caught.value.exit_status == 2
    assert not (tmp_path / "out.onnx").exists()


def test_integers_that_index_nothing_need_data(tmp_path: Path) -> None:
    text = "agraph (int64[N, 4] n) => (float[N, 3] y) { f = Cast<to: int = 1>(n)  y = MatMul(f, w) }"
    onnx.save(parse(text, w=floats(4, 3)), tmp_path / "m.onnx")
    with pytest.raises(DataError, match=r"'n'.*need --data"):
        compiled(tmp_path / "m.onnx", tmp_path)


def test_percentiles_need_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--ranges percentile.*give --data"):
        compiled(ROOT / "models" / "digits_cnn.onnx", tmp_path, ranges="percentile")


def test_matrix_models_are_dynamic_and_their_convolution_stays_float(tmp_path: Path) -> None:
    report = compiled(ROOT / "models" / "digits_vit.onnx", tmp_path)
    assert report["data"]["calibration"] == "dynamic"
    row = next(p for p in report["passes"] if p["name"] == "quantise_dynamic")
    assert row["skipped"]["no data: a convolution needs static ranges; give --data"] == 1
    agreement, sqnr = digits(ROOT / "models" / "digits_vit.onnx", tmp_path / "out.onnx")
    assert agreement >= 0.99
    assert sqnr > 30


@pytest.mark.parametrize("settings", [{}, {"effort": "fast"}, {"target": "vnni"}], ids=["default", "fast", "vnni"])
def test_convolutional_nets_use_their_statistics(tmp_path: Path, settings: dict[str, str]) -> None:
    report = compiled(ROOT / "models" / "digits_cnn.onnx", tmp_path, **settings)
    assert report["data"]["calibration"] == "synthetic"
    assert any("BatchNormalization statistics" in w for w in report["warnings"])
    assert not any("deviation 1 are assumed" in w for w in report["warnings"])
    agreement, sqnr = digits(ROOT / "models" / "digits_cnn.onnx", tmp_path / "out.onnx")
    assert agreement >= 0.99
    assert sqnr > 32  # synthetic inputs of deviation 1 and their ranges alone reach 30


def test_bias_correction_can_be_left_out(tmp_path: Path) -> None:
    report = compiled(ROOT / "models" / "digits_cnn.onnx", tmp_path, bias_correction=False)
    assert next(p for p in report["passes"] if p["name"] == "correct_means")["rewrites"] == 0


def test_four_bits_without_data_are_four_bits(tmp_path: Path) -> None:
    model = ROOT / "models" / "digits_vit.onnx"
    report = compiled(model, tmp_path, bits=4)
    wide = compile_model(model, tmp_path / "wide.onnx", latency=False).report
    assert next(p for p in report["passes"] if p["name"] == "pack_int4")["rewrites"] == 13
    assert report["size_bytes"]["quantised"] < 0.7 * wide["size_bytes"]["quantised"]
    assert report["nodes"]["quantised"] == wide["nodes"]["quantised"]  # the same kernels run
    assert report["accuracy"]["sqnr_db"] > 15


def test_models_without_statistics_say_what_is_assumed(tmp_path: Path) -> None:
    text = "agraph (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) { c = Conv(x, w) y = Relu(c) }"
    onnx.save(parse(text, w=floats(4, 3, 1, 1)), tmp_path / "m.onnx")
    report = compiled(tmp_path / "m.onnx", tmp_path)
    assert any("synthetic inputs alone" in w for w in report["warnings"])
    assert any("mean 0 and deviation 1 are assumed for input 'x'" in w for w in report["warnings"])


def test_the_same_bytes_twice_and_with_eval(tokens: Path, tmp_path: Path) -> None:
    for model, data in ((tokens, None), (ROOT / "models" / "digits_cnn.onnx", str(ROOT / "models" / "digits.npz"))):
        files = [tmp_path / f"{k}.onnx" for k in range(2)]
        compile_model(model, files[0], latency=False)
        compile_model(model, files[1], latency=False, eval_data=data)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_which_passes_run() -> None:
    names = {kind: [p.name for p in passes_for(kind)] for kind in ("real", "synthetic", "dynamic")}
    assert not {"record_bn", "expect_ranges", "correct_means", "quantise_dynamic"} & set(names["real"])
    assert not {"search_ranges", "refine_layers", "quantise_dynamic"} & set(names["synthetic"])
    assert names["synthetic"].index("record_bn") < names["synthetic"].index("fold_bn")
    assert not {"calibrate", "quantise", "linear_form"} & set(names["dynamic"])


def test_made_up_tokens_lie_in_the_vocabulary() -> None:
    inputs = [InputInfo(n, ("N", "L"), np.dtype(np.int64)) for n in ("ids", "token_type_ids", "mask")]
    rows = [s.feeds for s in synthetic_dataset(inputs, 20, 0, vocabularies={"ids": 7, "token_type_ids": 2})]
    ids = np.concatenate([r["ids"].ravel() for r in rows])
    assert set(ids) == set(range(7))
    assert all(r["ids"].shape == (1, 32) for r in rows)
    assert not any(r["token_type_ids"].any() for r in rows)
    assert all(r["mask"].all() for r in rows)


def test_made_up_images_take_the_moments_told() -> None:
    mean = np.array([100.0, 110.0, 90.0])
    inputs = [InputInfo("x", ("N", 3, 32, 32), np.dtype(np.float32))]
    rows = [s.feeds["x"] for s in synthetic_dataset(inputs, 8, 0, moments={"x": InputMoments(mean, 50.0)})]
    images = np.concatenate(rows) - mean[:, None, None]
    assert np.abs(images).max() <= 150 * 1.0001
    assert images.std() == pytest.approx(50, rel=0.03)
    assert abs(images.mean()) < 1


def digits(model: Path, output: Path) -> tuple[float, float]:
    feed = {"input": np.load(ROOT / "models" / "digits.npz")["input"]}
    f, q = (Session(m).run(feed)["logits"].astype(np.float64) for m in (model, output))
    return float((f.argmax(1) == q.argmax(1)).mean()), float(10 * np.log10(np.square(f).sum() / np.square(f - q).sum()))


def zoo_rows(task: str) -> Callable[[], Iterator[tuple[dict[str, Any], Any]]]:
    spec = importlib.util.spec_from_file_location("zoo_tasks", ZOO / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"{task}_eval")  # type: ignore[no-any-return]


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")
@pytest.mark.parametrize(("task", "least"), [("mobilenet_v1", 0.92), ("resnet20_cifar10", 0.97), ("minilm_sst2", 0.97)])
def test_agreement_on_real_data(task: str, least: float, tmp_path: Path) -> None:
    model = ZOO / task / "model.onnx"
    compiled(model, tmp_path)
    before, after = Session(model), Session(tmp_path / "out.onnx")
    name, same, count = before.output_names[0], 0, 0
    for feed, _ in islice(zoo_rows(task)(), 200):
        same += int(before.run(feed)[name].argmax() == after.run(feed)[name].argmax())
        count += 1
    assert same / count >= least


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")
@pytest.mark.parametrize("task", ["kws_dscnn", "ad_autoencoder", "ultraface"])
def test_compiles_without_data(task: str, tmp_path: Path) -> None:
    report = compiled(ZOO / task / "model.onnx", tmp_path)
    assert report["accuracy"]["sqnr_db"] > 20
    Session(tmp_path / "out.onnx")
