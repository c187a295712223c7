"""The HTML report: what it holds, self-contained, the same twice; in headless Chromium without errors, requests or overflow."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qcompile.checking import check_models
from qcompile.cli import cli
from qcompile.command_group import run
from qcompile.data import load_dataset
from qcompile.errors import InputError
from qcompile.html_data import gather
from qcompile.html_report import html_page, require_extra
from qcompile.model_file import read_model
from qcompile.pipeline import compile_model
from qcompile.samples import model_inputs

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN, DIGITS, CALIBRATION = MODELS / "digits_cnn.onnx", str(MODELS / "digits.npz"), str(MODELS / "digits_calib.npz")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "br", "path", "use", "rect"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(quantised model, report of its compilation, page)."""
    folder = tmp_path_factory.mktemp("html")
    options: dict[str, Any] = {"data": CALIBRATION, "eval_data": DIGITS, "max_drop": 1.0, "effort": "fast", "diagnose": True}
    compiled = compile_model(CNN, folder / "<b>&.onnx", **options)
    dataset = load_dataset(DIGITS, model_inputs(read_model(CNN)))
    details = gather(CNN, compiled.path, dataset, compiled.report["layers"])
    return compiled.path, compiled.report, html_page(compiled.report, details)


class Tags(HTMLParser):
    """Whether tags are closed as they were opened, which ids there are and which are linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        for name in ("href", "xlink:href", "src"):
            if given.get(name):
                self.links.append(str(given[name]))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_self_contained(made: tuple[Path, dict[str, Any], str]) -> None:
    page = made[2]
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert all(link.startswith("#") or link == "data:," for link in tags.links)
    assert {link[1:] for link in tags.links if link.startswith("#")} <= set(tags.ids)
    assert set(re.findall(r"https?://[^\"' <]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in page
    assert len(page.encode()) < 3_000_000


def test_names_are_escaped(made: tuple[Path, dict[str, Any], str]) -> None:
    assert "<h1>&lt;b&gt;&amp;.onnx</h1>" in made[2]
    assert "<b>&" not in made[2]


def test_what_the_page_holds(made: tuple[Path, dict[str, Any], str]) -> None:
    _, report, page = made
    for section in (
        "Numbers",
        "Limits",
        "Layers",
        "Worst layers",
        "Where float remains",
        "by operator",
        "Passes",
        "Samples",
        "Recipe",
    ):
        assert section in page
    assert f"{report['accuracy']['sqnr_db']:.2f} dB" in page
    assert page.count('role="img"') >= 4 + 2 * 3
    assert all(html.escape(layer["node"]) in page for layer in report["layers"])
    assert "outcome</th>" in page and ">pass</span>" in page


def test_the_same_twice(made: tuple[Path, dict[str, Any], str]) -> None:
    path, report, page = made
    dataset = load_dataset(DIGITS, model_inputs(read_model(CNN)))
    details = gather(CNN, path, dataset, report["layers"])
    again = gather(CNN, path, dataset, report["layers"])
    timeless = [re.sub(r"operators=.*?bytes_by", "", repr(d), flags=re.DOTALL) for d in (details, again)]
    assert timeless[0] == timeless[1]
    assert html_page(report, details) == html_page(report, details)
    assert page


def test_a_check_of_any_two_models(made: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    report = check_models(CNN, made[0], DIGITS, latency=False, min_sqnr=10.0)
    dataset = load_dataset(DIGITS, model_inputs(read_model(CNN)))
    details = gather(CNN, made[0], dataset)
    assert len(details.layers) >= 6 and len(details.worst) == 3 and len(details.samples) == 3
    assert all(entry.histograms for entry in details.worst[:1])
    noise = [sample.sqnr_db or 0.0 for sample in details.samples]
    assert noise == sorted(noise)
    assert {"Conv", "Gemm"} <= set(details.bytes_by_operator[0])
    page = html_page(report, details)
    assert "--min-sqnr 10" in page and 'id="passes"' not in page


def test_without_samples_and_without_limits(made: tuple[Path, dict[str, Any], str]) -> None:
    details = gather(CNN, made[0], None)
    assert details.layers == () and details.samples == ()
    assert "there are no samples" in details.notes[0]
    report = {key: value for key, value in made[1].items() if key not in ("verdict", "layers", "passes", "latency_ms")}
    page = html_page(report, details)
    assert "No limit was asked for." in page


def test_the_commands_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, output = tmp_path / "p.html", tmp_path / "q.onnx"
    common = ["--quiet", "--no-latency", "--html", str(page)]
    assert run(cli, [str(CNN), "-o", str(output), "--data", CALIBRATION, "--effort", "fast", *common]) == 0
    assert "Worst layers" in page.read_text()
    page.unlink()
    assert run(cli, ["check", str(CNN), str(output), "--eval", DIGITS, "--min-sqnr", "99", *common]) == 3
    assert "--min-sqnr 99" in page.read_text() and 'class="banner fail"' in page.read_text()
    capsys.readouterr()
    for bad, said in (
        (str(tmp_path / "no" / "p.html"), "--html"),
        (str(output), "the name of a model"),
        (str(tmp_path), "a folder"),
    ):
        assert run(cli, ["check", str(CNN), str(output), "--eval", DIGITS, "--html", bad]) == 2
        assert said in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"--html needs matplotlib: .*qcompile\[report\]"):
        require_extra()


# ---- in a browser ----
def chromium(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    usual = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    usual += [
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
    ]
    return subprocess.run([CHROMIUM, *usual, *args], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(width: int, made: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(made[2])
    net = tmp_path / "net.json"
    shown = chromium(
        tmp_path, f"--log-net-log={net}", f"--screenshot={tmp_path / 's.png'}", f"--window-size={width},2000", page.as_uri()
    )
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert "CONSOLE" not in shown.stderr
    asked = set(re.findall(r'"url":"(https?://[^/"]+)', net.read_text()))
    own = re.compile(r"https?://[\w.-]*\.(google|googleapis|gvt1)\.com")  # the browser's own: time, dictionaries
    assert not {url for url in asked if not own.fullmatch(url)}
    # A frame of that width, its policy and its own scripts aside, tells how wide its content is.
    inner = re.sub(r"<meta http-equiv[^>]*>", "", made[2])
    probe = "<script>parent.document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"
    framed = html.escape(inner.replace("</body>", probe + "</body>"), quote=True)
    outer = tmp_path / "outer.html"
    outer.write_text(f'<!doctype html><iframe style="width:{width}px;height:900px;border:0" srcdoc="{framed}"></iframe>')
    dom = chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()).stdout
    found = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert found is not None
    assert int(found[2]) == width
    assert int(found[1]) <= width


def test_details_of_models_that_cannot_be_fed(tmp_path: Path) -> None:
    import onnx
    from onnx import parser

    path = tmp_path / "t.onnx"
    text = "g (int64[1, 3] x) => (float[1, 3] y) { y = Cast <to = 1> (x) }"
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]>{text}'), path)
    details = gather(path, path, None)
    assert details.notes[0].startswith("nothing could be run: input 'x'")
    assert json.dumps(details.bytes_by_operator)
