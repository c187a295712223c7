"""Mixed precision on the HTML page: figures of traces, widths and the front; layers left float and layers without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_helpers import CNN, MODELS, Command

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from qcompile.html_mixed import mixed_figures


def layer(name: str, bits: int, average: float | None) -> dict[str, Any]:
    trace = None if average is None else {"average": average, "low": average * 50, "high": None}
    read = 32 if bits == 32 else 8
    return {"node": name, "op": "Conv", "weights": 100, "bits": bits, "activation_bits": read, "trace": trace}


def mixed() -> dict[str, Any]:
    point = {"average_bits": 4.0, "size_bytes": 2000, "predicted_sqnr_db": 20.0, "sqnr_db": None}
    return {
        "layers": [layer("a", 8, 0.5), layer("b", 32, None), layer("c", 2, -1.0)],
        "by": "noise",
        "candidates": [{**point, "by": "noise", "sqnr_db": 21.0}],
        "front": [point, {**point, "size_bytes": 3000, "sqnr_db": 25.0}, {**point, "predicted_sqnr_db": None}],
    }


def test_figures_are_drawn_and_the_same_twice() -> None:
    first, second = mixed_figures(mixed()), mixed_figures(mixed())
    assert first == second
    assert set(first) == {"widths", "front"}
    assert "Hessian trace and chosen bits of 3 layers" in first["widths"]
    assert all(word in first["front"] for word in ("predicted", "measured", "chosen"))


def test_no_layer_with_a_trace() -> None:
    report = {**mixed(), "layers": [layer("a", 4, None)]}
    assert "average trace" not in mixed_figures(report)["widths"]


def test_the_page_of_a_compilation(command: Command, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    args = ["--data", MODELS / "digits_calib.npz", "--samples", 16, "--no-latency", "--bits", "mixed", "--limit", "avg-bits=5"]
    status, _, err = command(CNN, "-o", tmp_path / "m.onnx", *args, "--mixed-by", "hessian", "--html", page)
    assert (status, err) == (0, "")
    text = page.read_text(encoding="utf-8")
    assert '<h2 id="mixed">Mixed precision</h2>' in text
    assert "avg-bits at most 5" in text and "chosen by hessian" in text


def test_narrow_activations_are_drawn_where_there_are_any() -> None:
    plain, narrow = mixed(), mixed()
    narrow["layers"][0]["activation_bits"] = 4
    said = "bits of the activations that it reads"
    assert said not in mixed_figures(plain)["widths"]
    assert said in mixed_figures(narrow)["widths"]
