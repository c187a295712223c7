"""`qcompile bundle`: every loader is run, in Python, Node, C and Chromium; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from exactness_helpers import MODELS
from onnx import TensorProto, helper

from qcompile import compile_model
from qcompile.bundle import bundle_model
from qcompile.errors import InputError, ModelError
from qcompile.interpret import Interpreter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "edge"))

Command = Callable[..., tuple[int, str, str]]
NODE = ROOT / "build" / "edge" / "node"
HEADERS = ROOT / "build" / "edge" / "include"
SAME = "same: the sample gives the expected outputs"
DATA = str(MODELS / "digits.npz")


def needs(program: str, *places: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    for place in places:
        if not place.exists():
            pytest.skip(f"{place} is absent: `make edge-setup` fetches it")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "cnn.onnx"
    compile_model(MODELS / "digits_cnn.onnx", path, data=str(MODELS / "digits_calib.npz"), effort="fast", latency=False)
    return path


@pytest.fixture(scope="module")
def bundle(compiled: Path) -> Path:
    folder = compiled.parent / "bundle"
    bundle_model(compiled, folder, data=DATA)
    return folder


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240, check=False)


def spoil(bundle: Path, folder: Path) -> Path:
    """A copy whose expected output has one bit changed."""
    shutil.copytree(bundle, folder)
    path = folder / "sample" / "output_0.bin"
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(bytes(data))
    return folder


def test_what_is_in_it(bundle: Path, compiled: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (bundle / "model.onnx").read_bytes() == compiled.read_bytes()
    assert set(manifest["files"]) == {"model.onnx", "model.ort", "required_operators.config"}
    assert manifest["promise"] == "bits" and manifest["findings"] == []
    assert manifest["needs"]["onnxruntime"] == "1.18"
    assert any("QLinearConv" in line for line in manifest["operators"])
    assert set(manifest["quantisation"]) == {"input"}
    (given,), (made,) = manifest["inputs"], manifest["outputs"]
    feed = np.fromfile(bundle / "sample" / given["file"], given["type"]).reshape(given["dims"])
    np.testing.assert_array_equal(feed, np.load(DATA)["input"][:1])
    expected = Interpreter(compiled).run({given["name"]: feed})[made["name"]]
    assert (bundle / "sample" / made["file"]).read_bytes() == expected.tobytes()


def test_the_same_again(compiled: Path, bundle: Path, tmp_path: Path) -> None:
    """All but `model.ort`, in which onnxruntime orders tensors by chance, and its hash."""
    again = tmp_path / "again"
    bundle_model(compiled, again, data=DATA)
    for path in sorted(p for p in bundle.rglob("*") if p.is_file() and p.name not in ("model.ort", "manifest.json")):
        assert (again / path.relative_to(bundle)).read_bytes() == path.read_bytes(), path.name
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (bundle, again))
    del first["files"]["model.ort"], second["files"]["model.ort"]
    assert first == second


@pytest.mark.parametrize("form", [[], ["--ort"]], ids=["onnx", "ort"])
def test_the_python_loader(form: list[str], bundle: Path, tmp_path: Path) -> None:
    done = run(sys.executable, bundle / "load.py", *form)
    assert (done.returncode, done.stdout.strip()) == (0, SAME), done.stderr
    done = run(sys.executable, spoil(bundle, tmp_path / "spoilt") / "load.py", *form)
    assert done.returncode == 1 and "FAILED" in done.stderr and "1 of 10 values" in done.stderr


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_the_javascript_loader(package: str, bundle: Path, tmp_path: Path) -> None:
    needs("node", NODE / "node_modules" / package)
    for folder, good in ((bundle, True), (spoil(bundle, tmp_path / "spoilt"), False)):
        command = ["node", str(folder / "load.mjs"), package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=NODE, check=False)
        assert (done.returncode == 0, SAME in done.stdout) == (good, good), done.stderr
        assert good or "1 of 10 values" in done.stderr


def test_the_c_loader(bundle: Path, tmp_path: Path) -> None:
    library = NODE / "node_modules/onnxruntime-node/bin/napi-v6/linux/x64/libonnxruntime.so.1"
    needs("cmake", library, HEADERS / "onnxruntime_c_api.h")
    options = [f"-DONNXRUNTIME_INCLUDE={HEADERS}", f"-DONNXRUNTIME_LIBRARY={library}", "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror"]
    done = run("cmake", "-S", bundle / "c", "-B", tmp_path / "build", *options)
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    for file in ("model.onnx", "model.ort"):
        done = run(tmp_path / "build" / "load", bundle, file)
        assert (done.returncode, done.stdout.strip()) == (0, SAME), done.stderr
    done = run(tmp_path / "build" / "load", spoil(bundle, tmp_path / "spoilt"))
    assert done.returncode == 1 and "not the expected values" in done.stderr


def test_the_page(compiled: Path, tmp_path: Path) -> None:
    needs("chromium", NODE / "node_modules" / "onnxruntime-web")
    from chromium import Page

    pillow = pytest.importorskip("PIL.Image")
    data = np.load(DATA)
    bundle_model(compiled, tmp_path / "b", data=DATA, preprocess="scale=255", page=True, web=NODE)
    index = 7
    picture = np.rint(data["input"][index, 0] * 255).astype(np.uint8)
    pillow.fromarray(picture).save(tmp_path / "digit.png")
    with Page((tmp_path / "b" / "page" / "index.html").as_uri()) as page:
        page.wait("/^(same|differs|FAILED)/.test(document.getElementById('check').textContent)")
        assert page.value("document.getElementById('check').textContent") == SAME + ", bit for bit"
        first = page.value("document.querySelector('#classes tbody td').textContent")
        assert first == str(data["labels"][0])
        page.choose_file("#file", tmp_path / "digit.png")
        page.wait("document.getElementById('time').textContent.startsWith('digit.png')")
        assert page.value("document.querySelector('#classes tbody td').textContent") == str(data["labels"][index])
        page.screenshot(tmp_path / "page.png")
        outside = [u for u in page.requests if not u.startswith(("file:", "blob:", "data:"))]
        assert outside == []
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_files_that_promise_no_bits_are_close(tmp_path: Path) -> None:
    manifest = bundle_model(MODELS / "digits_vit.onnx", tmp_path / "b", data=DATA)
    assert manifest["promise"] == "close" and manifest["findings"]
    done = run(sys.executable, tmp_path / "b" / "load.py")
    assert (done.returncode, done.stdout.strip()) == (0, SAME), done.stderr


def test_an_output_folder_that_is_not_empty(bundle: Path, compiled: Path, command: Command) -> None:
    status, _, error = command("bundle", compiled, "-o", bundle)
    assert status == 2 and "is not an empty folder" in error


def test_an_opset_that_no_runtime_reads(tmp_path: Path, command: Command) -> None:
    ends = [helper.make_tensor_value_info(n, TensorProto.UINT8, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 99)], ir_version=8), tmp_path / "m.onnx")
    status, _, error = command("bundle", tmp_path / "m.onnx", "-o", tmp_path / "b")
    assert status == 2 and "opset 99" in error and "--opset" in error
    assert not (tmp_path / "b").exists()


def test_no_runtime_for_the_page(compiled: Path, tmp_path: Path, command: Command) -> None:
    status, _, error = command("bundle", compiled, "-o", tmp_path / "b", "--page", "--web", tmp_path)
    assert status == 2 and "onnxruntime-web" in error
    status, _, error = command("bundle", compiled, "-o", tmp_path / "b", "--web", tmp_path)
    assert status == 2 and "--page" in error


def test_labels(compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("zero\none\n")
    assert bundle_model(compiled, tmp_path / "b", labels=tmp_path / "labels.txt")["labels"] == ["zero", "one"]
    with pytest.raises(InputError, match=r"nothing\.txt"):
        bundle_model(compiled, tmp_path / "c", labels=tmp_path / "nothing.txt")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    with pytest.raises(ModelError):
        bundle_model(tmp_path / "m.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()
