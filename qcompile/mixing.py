"""`--bits mixed` from end to end: survey, sensitivities, the program, compilations; the pipeline gives what compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcompile.check import Progress, measure
from qcompile.compilation import Built, Data
from qcompile.context import FLOAT_BITS, Settings
from qcompile.cut_layer import LayerSpec
from qcompile.data import Dataset
from qcompile.errors import InputError
from qcompile.layer_counts import count_layers, count_tables
from qcompile.layer_latency import measure_layers
from qcompile.load import Loaded
from qcompile.mixed import Mixed, Tried, mix, settings_of
from qcompile.planner import Assigned, Mixing, Planner
from qcompile.sensitivity import find_sensitivities
from qcompile.size import size_bytes
from qcompile.survey import survey


@dataclass(frozen=True)
class Rehearsal:
    """Compilations from one part of the calibration samples (`build`: with these settings, written to the output's path), judged
    on the other."""

    build: Callable[[Settings], Built]
    held_out: Dataset


_MOST = 256  # calibration samples on which compilations are compared


def choose_widths(
    source: Path,
    path: Path,
    loaded: Loaded,
    settings: Settings,
    mixing: Mixing,
    given: Data,
    rehearsal: Rehearsal,
    progress: Progress | None,
) -> Mixed:
    """The best assignment within the limits. loaded: is used up; compilations on the way are written to `path`."""
    offered: tuple[int, ...] = ()
    if mixing.chooses_activations:
        offered = tuple(sorted({*mixing.activations, *(bits for _, bits in settings.node_activations)}))
    effort = mixing.effort
    found = survey(loaded, settings, given, samples=effort.samples, loss=effort.loss, activations=offered)
    pinned = {bits for _, bits in settings.node_bits}
    sensitivity = find_sensitivities(
        found,
        effort,
        widths=sorted({*mixing.widths, *pinned, 8}),
        groups=offered,
        with_trace="hessian" in mixing.by,
        progress=progress,
    )
    times = measure_layers(found.study) if "latency" in dict(mixing.limits) else None
    planner = Planner(sensitivity, mixing, settings, size_bytes(source), times)
    samples = rehearsal.held_out.sample(_MOST)

    def attempt(assigned: Assigned) -> Tried:
        if progress is not None:
            progress("compiling assignments", 0, None)
        rehearsal.build(settings_of(settings, assigned))
        accuracy = measure(source, path, samples, latency=False).accuracy
        assert accuracy is not None  # there are samples
        return Tried(accuracy.sqnr_db, size_bytes(path), average_bits(path, found.study.layers, assigned))

    return mix(sensitivity, planner, attempt)


def finish(mixed: Mixed, mixing: Mixing, source: Path, path: Path) -> None:
    """Write into the report what the final file at `path` has. Raises InputError where it misses a limit after all."""
    layers = [LayerSpec(x["node"], x["op"], "", "", None, 0, x["weights"], 1) for x in mixed.report["layers"]]
    mixed.report["average_bits"] = average_bits(path, layers, mixed.assigned)
    limit = dict(mixing.limits).get("size")
    ratio = size_bytes(path) / size_bytes(source)
    if limit is not None and ratio > limit:
        raise InputError(f"--limit size={limit:g}: the file has {ratio:.5f} of the float file's bytes; give a little more")


def average_bits(path: str | Path, layers: list[LayerSpec], assigned: Assigned) -> float:
    """Stored bits of the weights that are integers in the file at `path`, and 32 for those that stay float on purpose, over their
    number."""
    counted = [(x.weights, x.weight_bits) for x in count_layers(path)] + count_tables(path)
    chosen = dict(assigned.weights)
    counted = [(n, bits) for n, bits in counted if bits < FLOAT_BITS]
    counted += [(x.weights, FLOAT_BITS) for x in layers if chosen.get(x.node) == FLOAT_BITS]
    total = sum(n for n, _ in counted)
    return sum(n * bits for n, bits in counted) / total if total else 0.0
