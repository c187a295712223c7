"""The line that the report prints of an import, and what the command line does with it."""

from __future__ import annotations

import io
from pathlib import Path

import onnx
import pytest
from import_models import net

from qcompile.cli import main
from qcompile.printing import console, print_report

IMPORTED = {
    "sqnr_db": 31.0,
    "max_requant_loss_db": None,
    "scales": {"kept": 2, "moved": 1, "largest_move": 0.004},
    "channels": {"kept": 5, "kept_beyond_2^-9": 1, "rounded": 3, "reasons": {"pairs": 2, "grid": 1}},
    "left_float": {"its weights are float in the source": 1},
    "changed": {},
}


def test_the_import_is_one_line() -> None:
    stream = io.StringIO()
    print_report({"imported": IMPORTED}, console(stream))
    (line,) = [found for found in stream.getvalue().splitlines() if found.startswith("imported:")]
    assert line.rstrip() == (
        "imported: integers of 5 channels kept, 3 rounded again (2 x pairs, 1 x grid); 2 scales kept, 1 moved by up to 0.4 %; "
        "left float (1 x its weights are float in the source)"
    )


@pytest.mark.parametrize(("least", "status"), [("10", 0), ("300", 3)], ids=["holds", "broken"])
def test_the_limit_on_the_command_line(least: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(net()[0], source)
    arguments = [str(source), "-o", str(tmp_path / "out.onnx"), "--no-latency", "--max-requant-loss", least]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert "imported: integers of" in printed.out
    assert ("--max-requant-loss 300" in printed.err) is (status == 3)
    assert (tmp_path / "out.failed.onnx").exists() is (status == 3)
    assert (tmp_path / "out.onnx").exists() is (status == 0)
