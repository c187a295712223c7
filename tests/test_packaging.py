"""What is installed: the whole package from one place, its metadata, and imports that point one way."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import qcompile
import qcompile.kernels
import qcompile.passes

ROOT = Path(__file__).resolve().parents[1]


def _editable() -> bool:
    record = distribution("qcompile").read_text("direct_url.json")
    return record is not None and bool(json.loads(record).get("dir_info", {}).get("editable"))


def test_the_installed_package_is_tested() -> None:
    places = [Path(str(module.__file__)).resolve() for module in (qcompile, qcompile.passes, qcompile.kernels)]
    if _editable():
        assert places == [ROOT / folder / "__init__.py" for folder in ("qcompile", "passes", "kernels")]
    else:
        package = Path(str(distribution("qcompile").locate_file("qcompile"))).resolve()
        assert places == [package / folder / "__init__.py" for folder in (".", "passes", "kernels")]


def test_the_install_is_complete() -> None:
    package = Path(str(qcompile.__file__)).parent
    assert (package / "py.typed").is_file()
    for folder, module in (("qcompile", qcompile), ("passes", qcompile.passes), ("kernels", qcompile.kernels)):
        installed = {path.name for path in Path(str(module.__file__)).parent.glob("*.py")}
        assert installed == {path.name for path in (ROOT / folder).glob("*.py")}


def test_the_metadata_say_what_the_package_is() -> None:
    found = distribution("qcompile")
    assert found.version == qcompile.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert [point.value for point in found.entry_points if point.group == "console_scripts"] == ["qcompile.cli:main"]


@pytest.mark.parametrize("folder", ["/", str(ROOT)], ids=["elsewhere", "in the checkout"])
def test_the_script_runs_anywhere(folder: str) -> None:
    script = Path(sys.executable).parent / "qcompile"
    if not script.exists():
        pytest.skip(f"{script} is absent: not installed for this Python")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, timeout=60, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"qcompile {qcompile.__version__}\n", "")


def test_check_is_part_of_the_python_interface() -> None:
    import qcompile
    from qcompile.checking import check_models

    assert qcompile.check_models is check_models
