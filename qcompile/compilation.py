"""What one compilation works on: its data, and the model that it built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.context import Context, Settings
from qcompile.data import Dataset, load_dataset
from qcompile.graph_io import write_model
from qcompile.load import Loaded
from qcompile.made_up import make_up, make_up_for_import
from qcompile.samples import model_inputs


@dataclass(frozen=True)
class Data:
    """What a compilation learns from and what it is judged on."""

    calibration: Dataset
    kind: str  # real | synthetic | dynamic | imported
    evaluation: Dataset | None
    warnings: tuple[str, ...]
    real: bool = True  # `calibration` is what the user gave
    learn: bool = True  # and may change the output


@dataclass(frozen=True)
class Built:
    """A compiled model in memory, with what is to be told of its compilation."""

    loaded: Loaded
    rows: list[dict[str, Any]]
    context: Context


def open_data(
    loaded: Loaded,
    data: str | Path | Dataset | None,
    eval_data: str | Path | Dataset | None,
    samples: int | None,
    preprocess: str | None,
    settings: Settings,
) -> Data:
    """Datasets and warnings. Without `data` the calibration is made up; it never comes from `eval_data`."""
    graph = loaded.graph
    inputs = model_inputs(write_model(graph, constants=False))

    def opened(spec: str | Path | Dataset | None, count: int | None) -> Dataset | None:
        if isinstance(spec, str | Path):
            return load_dataset(str(spec), inputs, preprocess=preprocess, samples=count, seed=settings.seed)
        return spec

    calibration, evaluation = opened(data, samples), opened(eval_data, None)
    if calibration is not None:
        return Data(calibration, "imported" if loaded.quantised else "real", evaluation, ())
    if loaded.quantised and evaluation is not None:  # for checks alone
        return Data(evaluation, "imported", evaluation, (), learn=False)
    made_up = make_up_for_import(graph, inputs, settings) if loaded.quantised else make_up(graph, inputs, settings)
    return Data(made_up.dataset, made_up.kind, evaluation, made_up.warnings, real=False, learn=False)
