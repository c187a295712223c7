"""`qcompile sensitivity`: what each layer of a float model costs at each width, without compiling it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qcompile
from qcompile.check import Progress
from qcompile.compilation import open_data
from qcompile.context import FLOAT_BITS, Settings
from qcompile.data import Dataset
from qcompile.errors import DataError, InputError
from qcompile.load import load_model
from qcompile.options import check_node_names, check_settings
from qcompile.options_mixed import parse_widths
from qcompile.report_file import peak_rss_mb
from qcompile.sensitivity import ACTIVATION_WIDTHS, SAMPLES, Effort, Sensitivity, find_sensitivities
from qcompile.survey import survey
from qcompile.torch_gradient import require_torch


def model_sensitivity(
    model: str | Path,
    data: str | Path | Dataset,
    *,
    widths: str | Sequence[int | str] | None = None,
    loss: str = "kl",
    samples: int = SAMPLES,
    tolerance: float = 0.1,
    probes: int = 128,
    max_seconds: float | None = None,
    with_trace: bool = True,
    activations: bool = True,
    eigenvalue: bool = False,
    exclude: Sequence[str] = (),
    target: str = "any",
    preprocess: str | None = None,
    seed: int = 0,
    workers: int = 1,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> tuple[Sensitivity, dict[str, Any]]:
    """Measure every layer that a compilation would quantise; returns the table and its JSON report.

    widths: of weights, as `--widths`; activations: measure each layer's input at 4, 6 and 8 bits too, and each group of
    activations that a compilation would give one width. loss: kl | noise | labels, whose Hessian; tolerance: half the trace's
    95 % interval over it, at which a layer is done; probes: the most for a layer. eigenvalue: find the Hessian's top eigenvalue
    of each layer as well, with torch.
    workers, scheduler: local processes, or a Dask cluster; they change no number. Raises InputError, ModelError, DataError.
    """
    start = time.perf_counter()
    effort = Effort(samples, loss, tolerance, probes, max_seconds, workers, scheduler)
    effort.check()
    if eigenvalue:
        require_torch()
    settings = Settings(target=target, exclude=tuple(exclude), seed=seed)
    check_settings(settings, None, False)
    offered = [b for b in parse_widths(widths, floats=False) if b != FLOAT_BITS]
    source = Path(model)
    loaded = load_model(source)
    if loaded.quantised:
        raise InputError(f"{source}: already holds Q/DQ, whose widths are fixed; give the float model")
    given = open_data(loaded, data, None, None, preprocess, settings)
    if loss == "labels" and not given.calibration.has_labels:
        raise DataError("--loss labels needs labelled samples; give --data with labels, or use --loss kl")
    check_node_names([n.name for n in loaded.graph.nodes], [v.name for v in loaded.graph.inputs], settings)
    read = ACTIVATION_WIDTHS if activations else ()
    found = survey(loaded, settings, given, samples=samples, loss=loss, activations=read)
    measured = find_sensitivities(
        found,
        effort,
        widths=offered,
        activations=read,
        groups=read,
        with_trace=with_trace,
        with_eigenvalue=eigenvalue,
        progress=progress,
    )
    report = {
        "qcompile": qcompile.__version__,
        "source": {"path": str(source), "sha256": loaded.source_sha256},
        "sensitivity": measured.as_json(),
        "seconds": round(time.perf_counter() - start, 3),
        "peak_rss_mb": peak_rss_mb(),
    }
    return measured, report
