"""Figures of the HTML report as inline SVG, with text as text. Needs matplotlib (the extra `report`)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from qcompile.html_data import Details, Histogram, Layer, WorstSample

BLUE, ORANGE, RED, GREY = "#2266aa", "#c4641a", "#b3261e", "#8a8f98"
_MOST_POINTS = 800
_SERIAL = re.compile(r'(xlink:href="#|id="|url\(#)')


def layer_chart(layers: Sequence[Layer], worst: Sequence[str], described: str) -> Markup:
    """SQNR by layer in graph order, one dot a layer; the worst are marked and named."""
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    x = np.arange(len(layers)) + 1
    reached = np.array([np.nan if layer.sqnr_db is None else layer.sqnr_db for layer in layers])
    own = np.array([np.nan if layer.own_db is None else layer.own_db for layer in layers])
    axes.plot(x, reached, "-o", color=BLUE, markersize=3, linewidth=1, label="output, with all before it")
    axes.plot(x, own, "s", color=GREY, markersize=3.5, label="what the layer adds by itself")
    marked = [i for i, layer in enumerate(layers) if layer.name in worst and layer.own_db is not None]
    axes.plot(x[marked], own[marked], "v", color=RED, markersize=8, label="worst layers")
    for i in marked:
        axes.annotate(str(x[i]), (x[i], own[i]), xytext=(0, -14), textcoords="offset points", ha="center", color=RED)
    axes.set_xlabel("layer, in graph order")
    axes.set_ylabel("SQNR (dB)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False)
    return svg(figure, "layers", described)


def histogram(found: Histogram, key: str, described: str) -> Markup:
    """Counts on a logarithmic axis, with the ends of the range."""
    figure = new_figure(4, 2.4)
    axes = figure.subplots()
    axes.stairs(np.maximum(found.counts, 0.5), found.edges, fill=True, color=BLUE, alpha=0.7)
    for end in (found.low, found.high):
        axes.axvline(end, color=RED, linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_xlabel("stored integer" if found.title == "weights" else "value")
    axes.set_ylabel("count")
    return svg(figure, key, described)


def timeline(passes: Sequence[Mapping[str, Any]], described: str) -> Markup:
    """When each pass ran, one bar a pass; passes that took less than a two-hundredth of the time are left to the table."""
    seconds = np.array([float(entry.get("seconds") or 0.0) for entry in passes])
    starts = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
    shown = np.flatnonzero(seconds >= seconds.sum() / 200)
    figure = new_figure(8, max(1.6, 0.26 * len(shown) + 0.6))
    axes = figure.subplots()
    y = np.arange(len(shown))
    axes.barh(y, seconds[shown], left=starts[shown], color=BLUE)
    axes.set_yticks(y, [str(passes[i]["name"]) for i in shown.tolist()], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("seconds")
    return svg(figure, "timeline", described)


def paired_bars(before: Mapping[str, float], after: Mapping[str, float], unit: str, key: str, described: str) -> Markup:
    """Float and quantised side by side, one pair an operator; the largest twelve."""
    names = sorted({*before, *after}, key=lambda n: -max(before.get(n, 0.0), after.get(n, 0.0)))[:12]
    figure = new_figure(4, max(1.8, 0.36 * len(names) + 0.8))
    axes = figure.subplots()
    y = np.arange(len(names))
    axes.barh(y - 0.2, [before.get(n, 0.0) for n in names], height=0.38, color=GREY, label="float")
    axes.barh(y + 0.2, [after.get(n, 0.0) for n in names], height=0.38, color=BLUE, label="quantised")
    axes.set_yticks(y, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.legend(fontsize=8, loc="lower right")
    return svg(figure, key, described)


def outputs_chart(sample: WorstSample, key: str, described: str) -> Markup:
    """Quantised against float outputs of one sample; on the line they are equal."""
    figure = new_figure(3.2, 3.2)
    axes = figure.subplots()
    a, b = sample.outputs
    step = -(-len(a) // _MOST_POINTS)
    axes.plot([a.min(), a.max()], [a.min(), a.max()], "-", color=GREY, linewidth=1)
    axes.plot(a[::step], b[::step], "o", color=ORANGE, markersize=2.5)
    axes.set_xlabel("float")
    axes.set_ylabel("quantised")
    return svg(figure, key, described)


def figures(report: Mapping[str, Any], details: Details) -> dict[str, Any]:
    """All figures of a report, by the name that the page uses."""
    worst = [entry.layer.name for entry in details.worst]
    found: dict[str, Any] = {"layers": None, "timeline": None, "times": None, "sizes": None}
    with mpl.rc_context(style()):
        if details.layers:
            found["layers"] = layer_chart(details.layers, worst, f"SQNR of {len(details.layers)} layers in graph order")
        if report.get("passes"):
            found["timeline"] = timeline(report["passes"], f"Seconds of {len(report['passes'])} passes")
        if any(details.operators):
            before, after = ({o.op: o.ms for o in side} for side in details.operators)
            found["times"] = paired_bars(
                before, after, "ms a run", "times", "Milliseconds a run by operator, float and quantised"
            )
        stored, kept = ({op: size / 1000 for op, size in side.items()} for side in details.bytes_by_operator)
        if stored or kept:
            said = "Kilobytes of constants by operator, float and quantised"
            found["sizes"] = paired_bars(stored, kept, "kB", "sizes", said)
        found["histograms"] = [
            [(h, histogram(h, f"h{i}{j}", f"Histogram: {h.title} of {entry.layer.name}")) for j, h in enumerate(entry.histograms)]
            for i, entry in enumerate(details.worst)
        ]
        found["samples"] = [
            outputs_chart(s, f"s{i}", f"Quantised against float outputs of sample {s.index}")
            for i, s in enumerate(details.samples)
        ]
    return found


def style() -> Any:
    """matplotlib's settings of all figures."""
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, key: str, described: str) -> Markup:
    """Inline SVG without a size of its own; `key` makes its ids unique on the page, and the same at every run."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": key}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = _SERIAL.sub(lambda match: match.group(1) + key + "-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    label = Markup.escape(described)
    return Markup(body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
