"""The JSON report as a file: which files it speaks of, what the process used, and how it is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import InputError, ModelError

_CHUNK = 1 << 20


def file_record(path: str | Path) -> dict[str, str]:
    """The report's `source` or `output`: {"path", "sha256"}. Raises ModelError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of an ONNX file") from error
    return {"path": str(path), "sha256": digest.hexdigest()}


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, in 10^6 bytes; None on systems that do not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024) / 1e6


def report_json(report: Mapping[str, Any]) -> str:
    """The report as JSON text: keys sorted, +inf as null. Raises ValueError for NaN and -inf, which no report holds."""
    return json.dumps(_plain(report), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def check_report_path(path: str | Path, *, model_files: tuple[str | Path | None, ...] = (), option: str = "--report") -> None:
    """Raise InputError where no report can be written to `path`; asked before hours of work, not after."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder; give {option} a file name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it or choose another {option}")
    writable = os.access(path, os.W_OK) if path.exists() and not path.is_file() else os.access(path.parent, os.W_OK)
    if not writable:
        raise InputError(f"{path}: cannot be written; choose another {option}")
    if path.suffix.lower() == ".onnx" or any(path.resolve() == Path(m).resolve() for m in model_files if m is not None):
        raise InputError(f"{path}: is the name of a model; give {option} a name such as report.json")


def write_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write `report_json` whole or not at all. Raises InputError where that fails."""
    write_text(report_json(report), path, "--report")


def write_text(text: str, path: str | Path, option: str) -> None:
    """Write `text` beside `path` under a temporary name and rename; a device or pipe is written to directly.

    Raises InputError, naming `option`, where that fails; then nothing is left behind.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()  # a link stays a link
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)  # mkstemp makes files private; a report is what open() would have made
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another {option}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and value == math.inf else value
