"""Figures of mixed precision on the HTML page: trace and chosen bits of each layer, and the front of size against SQNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup

from qcompile.html_figures import BLUE, GREY, ORANGE, RED, new_figure, style, svg

_FLOAT = 32


def widths_chart(layers: Sequence[Mapping[str, Any]], described: str) -> Markup:
    """Average Hessian trace (logarithmic, with its 95 % interval) and the widths that were chosen, one place a layer."""
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    x = np.arange(len(layers)) + 1
    bits = np.array([np.nan if layer["bits"] == _FLOAT else layer["bits"] for layer in layers], np.float64)
    axes.bar(x, bits, color=BLUE, alpha=0.35, label="bits of the weights (float: no bar)")
    read = np.array([layer["activation_bits"] for layer in layers], np.float64)
    if ((read != 8) & (read != _FLOAT)).any():
        read[read == _FLOAT] = np.nan
        axes.plot(x, read, "_", color=RED, markersize=9, markeredgewidth=2, label="bits of the activations that it reads")
    axes.set_xlabel("layer, in graph order")
    axes.set_ylabel("bits")
    axes.set_ylim(0, 9)
    known = [(i, layer) for i, layer in zip(x.tolist(), layers, strict=True) if layer["trace"] and layer["trace"]["average"] > 0]
    handles, names = axes.get_legend_handles_labels()
    if known:
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        middle = np.array([layer["trace"]["average"] for _, layer in known])
        ends = [[layer["trace"][end] for _, layer in known] for end in ("low", "high")]
        sizes = np.array([layer["weights"] for _, layer in known], np.float64)
        low, high = (np.array([np.nan if v is None else v for v in side], np.float64) / sizes for side in ends)
        errors = np.nan_to_num(np.array([middle - np.maximum(low, middle / 100), high - middle]))
        right.errorbar([i for i, _ in known], middle, yerr=np.maximum(errors, 0), fmt="o", color=ORANGE, markersize=4)
        right.set_yscale("log")
        right.set_ylabel("average trace of the Hessian", color=ORANGE)
    figure.legend(handles, names, fontsize=8, loc="outside upper left", frameon=False)
    return svg(figure, "widths", described)


def front_chart(mixed: Mapping[str, Any], described: str) -> Markup:
    """Predicted and measured SQNR (calibration samples) against the size of the file."""
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    front = [p for p in mixed["front"] if p["predicted_sqnr_db"] is not None]
    sizes = [p["size_bytes"] / 1000 for p in front]
    axes.plot(sizes, [p["predicted_sqnr_db"] for p in front], "-o", color=GREY, markersize=3, label="predicted")
    measured = [p for p in mixed["front"] if p["sqnr_db"] is not None]
    kilobytes = [p["size_bytes"] / 1000 for p in measured]
    axes.plot(kilobytes, [p["sqnr_db"] for p in measured], "s", color=BLUE, markersize=5, label="measured")
    chosen = [c for c in mixed["candidates"] if c["by"] == mixed["by"] and c["sqnr_db"] is not None]
    kilobytes = [c["size_bytes"] / 1000 for c in chosen]
    axes.plot(kilobytes, [c["sqnr_db"] for c in chosen], "*", color=RED, markersize=11, label="chosen")
    axes.set_xlabel("file, kB")
    axes.set_ylabel("SQNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return svg(figure, "front", described)


def mixed_figures(mixed: Mapping[str, Any]) -> dict[str, Markup]:
    """Both, by the name that the page uses."""
    with mpl.rc_context(style()):
        return {
            "widths": widths_chart(mixed["layers"], f"Hessian trace and chosen bits of {len(mixed['layers'])} layers"),
            "front": front_chart(mixed, f"Size against predicted and measured SQNR at {len(mixed['front'])} average widths"),
        }
