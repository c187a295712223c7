"""The static page of a bundle: runs the model in the browser, offline, also when it is opened from the disk.

A page from the disk may load scripts and nothing else. So onnxruntime-web, the model and the sample stand in scripts, as base64.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.errors import InputError
from qcompile.images import Preprocess, parse_preprocess

_FILES = Path(__file__).parent / "bundle_files"
_MODULE, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"


def find_web(web: str | Path | None) -> Path:
    """The folder of onnxruntime-web that holds its built files: `web`, or that of an npm install here or of all users.

    Raises InputError where there is none.
    """
    if web is not None:
        for folder in (Path(web), Path(web) / "dist", Path(web) / "node_modules" / "onnxruntime-web" / "dist"):
            if (folder / _MODULE).is_file() and (folder / _WASM).is_file():
                return folder
        raise InputError(f"--web {web}: holds no {_MODULE} and {_WASM}; give the folder of npm's onnxruntime-web")
    places = [Path.cwd(), *Path.cwd().parents]
    npm = shutil.which("npm")
    if npm is not None:
        done = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False)
        places.append(Path(done.stdout.strip()).parent)
    for place in places:
        folder = place / "node_modules" / "onnxruntime-web" / "dist"
        if (folder / _MODULE).is_file() and (folder / _WASM).is_file():
            return folder
    raise InputError("--page needs onnxruntime-web: npm install onnxruntime-web, or give its folder with --web")


def write_page(target: Path, manifest: Mapping[str, Any], web: Path, preprocess: str | None) -> None:
    """Write `page/` into the bundle `target`: index.html, runtime.js (onnxruntime-web) and model.js (model, sample, manifest).

    Raises InputError for a model in several files, which a page cannot hold.
    """
    others = [n for n in manifest["files"] if n not in ("model.onnx", "model.ort", "required_operators.config")]
    if others:
        raise InputError(f"--page: the model has external data ({others[0]}), which a page cannot load; leave --page out")
    page = target / "page"
    page.mkdir()
    shutil.copyfile(_FILES / "index.html", page / "index.html")
    runtime = {"module": _base64(web / _MODULE), "wasm": _base64(web / _WASM)}
    (page / "runtime.js").write_text(f"window.RUNTIME = {json.dumps(runtime)};\n", encoding="utf-8")
    records = [*manifest["inputs"], *manifest["outputs"]]
    bundle = {
        "manifest": manifest,
        "model": _base64(target / "model.onnx"),
        "sample": {record["file"]: _base64(target / "sample" / record["file"]) for record in records},
        "preprocess": asdict(Preprocess() if preprocess is None else parse_preprocess(preprocess)),
    }
    (page / "model.js").write_text(f"window.BUNDLE = {json.dumps(bundle)};\n", encoding="utf-8")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
