"""Tables: every number of the report is there, nothing is taken for markup, and bars are for terminals only."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from qcompile.inspection import Summary
from qcompile.inspection_written import Rescale
from qcompile.passes import PASSES
from qcompile.printing import (
    TerminalProgress,
    console,
    print_bench,
    print_passes,
    print_report,
    print_rescales,
    print_rows,
    print_summary,
)

FULL: dict[str, Any] = {
    "passes": [
        {"name": "fold_bn", "rewrites": 5, "skipped": {}, "seconds": 0.1234, "sqnr_db": None},
        {"name": "quantise", "rewrites": 12, "skipped": {"Softmax stays float": 3}, "seconds": 2.0, "sqnr_db": 31.456},
        {"name": "calibrate", "rewrites": 0, "skipped": {}, "seconds": 0.5},
    ],
    "accuracy": {
        "samples": 1000,
        "sqnr_db": 28.125,
        "cosine": 0.99981234,
        "top1_agreement": 0.975,
        "metric": "top1",
        "float": 0.71,
        "quantised": 0.705,
        "drop_points": 0.5,
        "lost": 8,
        "won": 3,
    },
    "latency_ms": {"float": 21.34, "quantised": 9.876, "speedup": 2.16, "speedup_low": 2.1, "speedup_high": 2.2, "threads": 1},
    "size_bytes": {"float": 17_000_000, "quantised": 4_420_000, "ratio": 0.26},
    "nodes": {"quantised": 30, "float": 3, "float_ops": {"Softmax": 1, "Gemm": 2}},
    "fusion": {
        "not_fused": [{"node": "head[0]", "op": "Gemm", "reason": "the bias is float"}],
        "leftover": [{"node": "q1", "op": "QuantizeLinear", "reason": "a rescale with no operator to carry it"}],
    },
    "verdict": {"outcome": "inconclusive", "reason": "about 3000 samples would decide it"},
    "warnings": ["[bold] is no markup"],
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(report: dict[str, Any]) -> list[str]:
    stream = io.StringIO()
    print_report(report, console(stream))
    return stream.getvalue().splitlines()


def row(lines: list[str], start: str) -> str:
    found = [" ".join(line.split()) for line in lines if line.startswith(start)]
    assert len(found) == 1, (start, lines)
    return found[0]


def test_full_report() -> None:
    lines = printed(FULL)
    assert row(lines, "fold_bn") == "fold_bn 5 0.12 inf"
    assert row(lines, "quantise ") == "quantise 12 3 x Softmax stays float 2.00 31.46"
    assert row(lines, "calibrate") == "calibrate 0 0.50"
    assert row(lines, "top1 ") == "top1 71.00 % 70.50 % drop 0.50 points (8 lost, 3 won)"
    assert row(lines, "top-1 agreement") == "top-1 agreement 97.50 % over 1000 samples"
    assert row(lines, "SQNR") == "SQNR 28.12 dB"
    assert row(lines, "cosine") == "cosine 0.999812"
    assert row(lines, "latency") == "latency 21.3 ms 9.88 ms 2.16 x as fast (2.10 to 2.20), 1 thread"
    assert row(lines, "size") == "size 17.0 MB 4.42 MB 0.26 x the size"
    assert row(lines, "nodes") == "nodes at run time 30 integer 3 float"
    assert "runs in float: 1 Softmax, 2 Gemm" in lines
    assert "Gemm head[0] was to be integer but runs in float: the bias is float" in lines
    assert "QuantizeLinear q1 stays at run time: a rescale with no operator to carry it" in lines
    assert "limit: inconclusive: about 3000 samples would decide it" in lines
    assert "warning: [bold] is no markup" in lines


@pytest.mark.parametrize(
    "report", [{}, dict.fromkeys(FULL), {**FULL, "accuracy": None, "latency_ms": None}], ids=["empty", "nulls", "no measures"]
)
def test_what_was_not_measured_is_left_out(report: dict[str, Any]) -> None:
    lines = printed(report)
    assert not any(line.startswith(("SQNR", "latency", "top")) for line in lines)


def test_without_classes_the_sample_count_is_said_beside_sqnr() -> None:
    accuracy = {"samples": 1, "sqnr_db": None, "cosine": None, "top1_agreement": None, "metric": None}
    assert row(printed({"accuracy": accuracy}), "SQNR") == "SQNR inf dB over 1 sample"
    lines = printed({"accuracy": accuracy, "data": {"evaluation": {"kind": "synthetic"}}})
    assert row(lines, "SQNR") == "SQNR inf dB over 1 synthetic sample"


def test_leftovers_with_one_reason_are_counted_together() -> None:
    left = [{"node": f"q{i}", "op": "QuantizeLinear", "reason": "r"} for i in range(3)]
    left.append({"node": "d", "op": "DequantizeLinear", "reason": "r"})
    lines = printed({"fusion": {"not_fused": [], "leftover": left}})
    assert "3 QuantizeLinear stay at run time (first q0): r" in lines
    assert "DequantizeLinear d stays at run time: r" in lines


def test_long_lists_are_cut_and_say_so() -> None:
    left = [{"node": f"n{i}", "op": "Conv", "reason": "r"} for i in range(20)]
    lines = printed({"fusion": {"not_fused": left, "leftover": []}})
    assert len([line for line in lines if line.startswith("Conv n")]) == 12
    assert "... and 8 more like it; the JSON report (--report) lists all" in lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (95_032, "95.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2**31, "2.15 GB"),
    ],
    ids=str,
)
def test_sizes_in_decimal_units(count: int, text: str) -> None:
    lines = printed({"size_bytes": {"float": count, "quantised": count, "ratio": 1.0}})
    assert row(lines, "size") == f"size {text} {text} 1.00 x the size"


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.01769, "0.0177"), (4.514, "4.51"), (99.96, "100"), (1234.5, "1234")], ids=str
)
def test_latency_has_three_digits(milliseconds: float, text: str) -> None:
    latency = {"float": milliseconds, "quantised": 1.0, "speedup": 1.0, "threads": 2}
    assert row(printed({"latency_ms": latency}), "latency") == f"latency {text} ms 1.00 ms 1.00 x as fast, 2 threads"


def test_bench_without_what_was_not_measured() -> None:
    stream = io.StringIO()
    entry = {
        "path": "m.onnx", "size_bytes": 1000, "latency_ms": {"median": 2.0, "low": 1.5, "high": 2.5, "confidence": 0.95},
        "speedup": {"median": 1.0, "low": 1.0, "high": 1.0}, "macs": None, "gops": None, "peak_share": None,
        "cold_start": None, "operators": None,
    }  # fmt: skip
    more: dict[str, Any] = {**entry, "macs": 325_000_000, "peak_share": 0.123}
    more |= {"cold_start": {"load_ms": 10.0, "peak_rss_mb": 77.0}}
    more["operators"] = [{"op": "Conv", "ms": 1.0, "share": 0.5, "calls": 3}]
    print_bench({"models": [entry, more], "threads": 1, "peak_gops": 400.0}, console(stream))
    lines = stream.getvalue().splitlines()
    assert any("unknown" in line for line in lines)
    assert any("325 M" in line and "12.3 %" in line and "77 MB" in line for line in lines)
    assert row(lines, "Conv") == "Conv 3 1.0000 50.0 %"
    assert lines[-1].startswith("1 thread; int8 peak 400 GOP/s")


def test_rescales() -> None:
    per_channel = Rescale("conv[1]", "Conv", "linear", True, b=np.array([3, 40, 7], np.int64), c=np.array([4, 16, 5], np.int64))
    added = Rescale("add", "Add", "add", True, p=(3, 5), q=7)
    other = Rescale("s", "Softmax", "other", False, "computed in float")
    stream = io.StringIO()
    print_rescales([per_channel, added, other], console(stream))
    lines = stream.getvalue().splitlines()
    assert row(lines, "conv[1]") == "conv[1] Conv linear 3 3 to 40 4 to 16 yes"
    assert row(lines, "add") == "add Add add 3, 5 7 yes"
    assert row(lines, "s ") == "s Softmax other no: computed in float"
    assert lines[-1] == "3 rescales, 2 exact, 1 not"


@pytest.mark.parametrize(
    ("count", "line"), [(0, "no rescales"), (1, "1 rescale, all exact"), (2, "2 rescales, all exact")], ids=str
)
def test_last_line_of_rescales(count: int, line: str) -> None:
    stream = io.StringIO()
    print_rescales([Rescale("a", "Add", "add", True, p=(1, 1), q=1)] * count, console(stream))
    assert stream.getvalue().splitlines()[-1] == line


def test_summary() -> None:
    stream = io.StringIO()
    print_summary(Summary(("qdq", "float"), {"Conv": 4}, {"Conv": 1, "Softmax": 1}, {"int8": 22_000}, 6), console(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "formats: qdq, float"
    assert row(lines, "Conv") == "Conv 4 1"
    assert row(lines, "Softmax") == "Softmax 1"
    assert row(lines, "int8") == "int8 22.0 kB"
    assert lines[-1] == "QuantizeLinear nodes on activations: 6"


def test_passes_say_what_they_promise() -> None:
    stream = io.StringIO()
    print_passes(PASSES, console(stream))
    text = stream.getvalue()
    assert all(entry.name in text for entry in PASSES)
    assert "the same, bit for bit" in text
    assert "within 0.0001 of the largest" in text
    assert "above 0 dB" in text


def test_rows_are_not_cut_in_a_log() -> None:
    name = "/a/very/long/name" * 60
    stream = io.StringIO()
    print_rows(("node", "count"), [(name, 1), (None, 22)], console(stream))
    lines = stream.getvalue().splitlines()
    assert lines[2].split() == [name, "1"]
    assert lines[3].split() == ["22"]


def test_progress_is_silent_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with TerminalProgress(stream) as progress:
        progress("calibrate", 0, 10)
        progress("quantise", 0, None)
    assert stream.getvalue() == ""


def test_progress_is_silent_when_told_so() -> None:
    stream = Terminal()
    with TerminalProgress(stream, quiet=True) as progress:
        progress("calibrate", 0, 10)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("qcompile.printing._REDRAW_SECONDS", -1.0)
    stream = Terminal()
    with TerminalProgress(stream) as progress:
        progress("calibrate", 3, 10)
        progress("calibrate", 4, 10)
        progress("latency", 0, None)
        progress("latency", 5, None)
    text = stream.getvalue()
    assert "calibrate" in text
    assert "3/10" in text
    assert "4/10" in text
    assert "latency" in text.rpartition("4/10")[2]
    assert "None" not in text


def test_raised_layers_and_both_limits() -> None:
    moves = [
        {"node": f"n{i}", "op": "Conv", "from_bits": 4, "to_bits": 32 if i == 0 else 8, "own_db": 20.5, "bytes_added": 1500}
        for i in range(14)
    ]
    lines = printed(
        {
            "fallback": {"held": True, "raised": moves, "samples": {"search": 250, "verdict": 250}},
            "verdict": {"outcome": "pass", "reason": "drop 0.1"},
            "agreement_verdict": {"outcome": "fail", "reason": "agreement .9"},
        }
    )
    assert "14 layers raised; the limit holds on the 250 samples to choose by" in lines
    assert "raised: Conv n0 from 4 bits to float: 20.50 dB alone, for 1.50 kB" in lines
    assert "raised: Conv n1 from 4 bits to 8 bits: 20.50 dB alone, for 1.50 kB" in lines
    assert "... and 2 more like it; the JSON report (--report) lists all" in lines
    assert lines[-2:] == ["limit: pass: drop 0.1", "limit: fail: agreement .9"]
    failed = {"held": False, "raised": moves[:1], "samples": {"search": 50, "verdict": 50}}
    assert "1 layer raised; the limit does not hold even so on the 50 samples to choose by" in printed({"fallback": failed})
    assert not any("raised" in line for line in printed({"fallback": {"raised": []}}))
