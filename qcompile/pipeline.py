"""The whole way of the data: load, passes with their promises checked, save, measure, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import qcompile
from qcompile.accuracy import Accuracy
from qcompile.audit import Audit, audit
from qcompile.certificate import certify
from qcompile.check import Measured, Progress, fusion_json, measure, nodes_json
from qcompile.compact import compact
from qcompile.compare_targets import FREE, both_targets
from qcompile.context import Context, Settings
from qcompile.convert import lower_opset
from qcompile.data import Dataset, load_dataset
from qcompile.errors import DataError, InputError, LimitError, QcompileError
from qcompile.fallback import LEAST_SAMPLES, Found, Raised, Trial, search
from qcompile.graph import Graph
from qcompile.graph_io import forget_inner_types, load_proto, write_functions_out, write_model
from qcompile.integer_inputs import take_integers
from qcompile.integer_outputs import give_integers
from qcompile.limits import Limits
from qcompile.load import Loaded, load_model
from qcompile.made_up import make_up, make_up_for_import
from qcompile.names import names_of, shorten_names
from qcompile.options import check_import, check_settings, output_path, weight_only_of
from qcompile.passes import passes_for
from qcompile.report_file import file_record, peak_rss_mb
from qcompile.run_passes import run_passes
from qcompile.samples import model_inputs
from qcompile.tensors import is_external, location

_CHECK_FEEDS = 2
_Ranges: TypeAlias = dict[object, list[tuple[float, float]]]
_OWN_SAMPLES = 32  # calibration samples that stand in where no --eval is given


@dataclass(frozen=True)
class Compiled:
    """A finished compilation: the written file and its JSON report (DESIGN section 8)."""

    path: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class _Data:
    calibration: Dataset
    kind: str  # real | synthetic | dynamic | imported
    evaluation: Dataset | None
    warnings: tuple[str, ...]
    real: bool = True  # `calibration` is what the user gave
    learn: bool = True  # and may change the output


def compile_model(
    model: str | Path,
    output: str | Path | None = None,
    *,
    bits: int = 8,
    format: str = "qdq",
    target: str = "any",
    data: str | Path | Dataset | None = None,
    samples: int | None = None,
    eval_data: str | Path | Dataset | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_requant_loss: float | None = None,
    ranges: str = "mse",
    effort: str = "default",
    exclude: Sequence[str] = (),
    opset: int | None = None,
    inputs_as: str = "float32",
    inline: bool = False,
    io: str = "float",
    kernels: str = "table",
    activations: str = "int8",
    block: int | None = None,
    symmetric: bool | None = None,
    spelling: str | None = None,
    accuracy_level: int | None = None,
    preprocess: str | None = None,
    bias_correction: bool = True,
    seed: int = 0,
    dump_passes: str | Path | None = None,
    latency: bool = True,
    compare_targets: bool = False,
    diagnose: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a float ONNX model to an integer one, write it and measure it against the original.

    data, eval_data: a SPEC (see `qcompile.data`) or a Dataset; without a limit `eval_data` never changes the written bytes.
    inline, io: in format integer, functions are written out; io "integer": inputs and outputs are integers too.
    kernels: in the formats qoperator and integer, GELU and the exponentials of Softmax by table, or ibert: by its polynomials.
    activations: int8, or float for weight-only INT4, whose options are block, symmetric, spelling and accuracy_level.
    max_drop: the largest drop of top-1 accuracy, in percentage points, that `eval_data` (with labels) must not contradict;
    min_agreement: the least share of samples that keep their class. Where a limit does not hold on one half of `eval_data`,
    layers are raised to 8 bits, then to float, until it does; the verdict is on the other half (`qcompile.fallback`).
    max_requant_loss: of a model that already holds Q/DQ, the least SQNR in dB of the result against it. Such a model is imported:
    it keeps its scales and integers where they can be exact, and needs no `data`.
    compare_targets: where target is `any`, effort is not `fast` and there is `eval_data`, also say what `vnni` would have given.
    diagnose: measure each layer's part in the error as well (the report's `layers`); the written bytes stay the same.
    Returns the written path and the report. Raises InputError, ModelError or DataError (exit status 2), PassError (1), and
    LimitError (3) where the samples show that a limit is broken: the file is then kept with `.failed` before its suffix.

    >>> compiled = compile_model("models/digits_cnn.onnx", data="models/digits_calib.npz")  # doctest: +SKIP
    >>> compiled.report["accuracy"]["sqnr_db"]  # doctest: +SKIP
    """
    start = time.perf_counter()
    settings = Settings(
        bits=bits,
        format=format,
        target=target,
        ranges="minmax" if ranges == "mse" and (effort == "fast" or data is None) else ranges,
        effort=effort,
        exclude=tuple(exclude),
        bias_correction=bias_correction,
        inputs_as=inputs_as,
        opset=opset,
        seed=seed,
        inline=inline,
        io=io,
        kernels=kernels,
        weight_only=weight_only_of(activations, block, symmetric, spelling, accuracy_level),
    )
    check_settings(settings, max_drop, eval_data is not None, min_agreement)
    limits = Limits(max_drop, min_agreement, max_requant_loss)
    source = Path(model)
    path = output_path(source, output, bits)
    loaded = load_model(source)
    check_import(settings, loaded.quantised, max_requant_loss)
    given = _open_data(loaded, data, eval_data, samples, preprocess, settings)
    if max_drop is not None and given.evaluation is not None and not given.evaluation.has_labels:
        raise DataError("--max-drop compares with the true answers; give --eval data with labels")
    _check_excluded(loaded.graph, settings)
    compiler = _Compiler(source, path, given, diagnose or limits.given, progress)
    built = compiler.build(loaded, settings, Path(dump_passes) if dump_passes is not None else None)
    try:
        found = None
        if limits.given and given.evaluation is not None:
            chosen_by, judged_on = given.evaluation.halves()
            may_raise = sum(1 for _ in islice(given.evaluation, 2)) == 2  # else there is nothing left to judge on
            to_float = format != "integer"
            found = search(compiler.trials(built, chosen_by), limits, bits, may_raise=may_raise, to_float=to_float)
            built = found.best.built
            built.loaded.graph.save(path)
            given = replace(given, evaluation=judged_on if found.moves else given.evaluation)
        audited = audit(path)
        measured, measured_on = _measure(source, path, given, latency, effort, progress)
        report = _report(source, path, built, audited, measured, given, limits)
        report["data"]["evaluation"] = measured_on
        report["seconds"] = round(time.perf_counter() - start, 3)
        report["peak_rss_mb"] = peak_rss_mb()
        if compare_targets and target == "any" and effort != "fast" and eval_data is not None:
            again = partial(compile_model, source, format=format, target=FREE, data=data, samples=samples, eval_data=eval_data)
            again = partial(again, bits=bits, ranges=ranges, effort=effort, exclude=exclude, opset=opset, inputs_as=inputs_as)
            again = partial(again, preprocess=preprocess, bias_correction=bias_correction, seed=seed, latency=False)
            _compare_targets(path, report, again, progress)
    except BaseException:  # Ctrl-C too: a file that was never measured must not look like a result
        _discard(path)
        raise
    compiled = Compiled(path, report)
    if found is not None and measured.accuracy is not None:
        compiled = _enforce(compiled, measured.accuracy, limits, found)
    lost = limits.requant_loss(measured.accuracy)
    if lost is not None:
        raise _failed(compiled, lost)
    return compiled


def _compare_targets(path: Path, report: dict[str, Any], again: Callable[..., Compiled], progress: Progress | None) -> None:
    """Add the report's `targets`; where the model does not compile for the other target, a warning says so."""

    def shown(stage: str, done: int, total: int | None) -> None:
        if progress is not None:
            progress(f"target {FREE}: {stage}", done, total)

    try:
        report["targets"] = both_targets(path, report, lambda other: again(output=other, progress=shown).report)
    except QcompileError as error:
        report["warnings"].append(f"target {FREE} was not measured: {error}")


@dataclass(frozen=True)
class _Built:
    """A compiled model in memory, with what is to be told of its compilation."""

    loaded: Loaded
    rows: list[dict[str, Any]]
    context: Context


@dataclass(frozen=True)
class _Compiler:
    """Compiles one source, once as asked and again with layers raised; every build is written to `path`."""

    source: Path
    path: Path
    given: _Data
    diagnose: bool
    progress: Progress | None

    def build(self, loaded: Loaded, settings: Settings, dump: Path | None = None, ranges: _Ranges | None = None) -> _Built:
        """Run all passes on `loaded` and write the result. ranges: those of an earlier build, taken over where they fit."""
        given, graph = self.given, loaded.graph
        known = names_of(graph)
        context = Context(settings, calibration=lambda: (s.feeds for s in given.calibration))
        context.ranges = {} if ranges is None else ranges
        context.diagnose = self.diagnose
        context.synthetic = given.kind == "synthetic" or (given.kind == "imported" and not given.learn)
        context.progress = _stages(self.progress, given)
        feeds = [s.feeds for s in islice(given.calibration, 1 if settings.effort == "fast" else _CHECK_FEEDS)]
        steps = passes_for(given.kind if settings.weight_only is None else "weight_only")
        rows = run_passes(graph, context, steps, feeds, dump)
        if settings.inputs_as != "float32" or settings.io == "integer":
            take_integers(graph, "--io integer" if settings.io == "integer" else "--inputs-as uint8")
        if settings.io == "integer":
            give_integers(graph)
        if settings.opset is not None:
            lower_opset(graph, settings.opset)
        if settings.inline:
            write_functions_out(graph)
        forget_inner_types(graph)
        compact(graph)
        shorten_names(graph, known)
        _stamp(loaded, settings)
        graph.save(self.path)
        return _Built(loaded, rows, context)

    def trials(self, first: _Built, part: Dataset) -> Callable[[Raised], Trial[_Built]]:
        """What `search` tries with: `first` as it stands, and builds with layers raised; measured on `part`."""

        def compile_with(raised: Raised) -> Trial[_Built]:
            built = first
            if raised:
                settings = replace(first.context.settings, raised=raised)
                built = self.build(load_model(self.source), settings, ranges=first.context.ranges)
            accuracy = measure(self.source, self.path, part, latency=False, progress=self.progress).accuracy
            assert accuracy is not None  # there was a dataset
            return Trial(raised, accuracy, None if built.context.plan is None else built.context.plan.layers, built)

        return compile_with


def _discard(path: Path) -> None:
    """Remove a written model, and the file of its own that holds its weights where they lie outside."""
    outside = {location(t) for t in load_proto(path).graph.initializer if is_external(t)}
    for file in (path, *(path.parent / name for name in sorted(outside))):
        file.unlink(missing_ok=True)


def _open_data(
    loaded: Loaded,
    data: str | Path | Dataset | None,
    eval_data: str | Path | Dataset | None,
    samples: int | None,
    preprocess: str | None,
    settings: Settings,
) -> _Data:
    """Datasets and warnings. Without `data` the calibration is made up; it never comes from `eval_data`."""
    graph = loaded.graph
    inputs = model_inputs(write_model(graph, constants=False))

    def opened(spec: str | Path | Dataset | None, count: int | None) -> Dataset | None:
        if isinstance(spec, str | Path):
            return load_dataset(str(spec), inputs, preprocess=preprocess, samples=count, seed=settings.seed)
        return spec

    calibration, evaluation = opened(data, samples), opened(eval_data, None)
    if calibration is not None:
        return _Data(calibration, "imported" if loaded.quantised else "real", evaluation, ())
    if loaded.quantised and evaluation is not None:  # for checks alone
        return _Data(evaluation, "imported", evaluation, (), learn=False)
    made_up = make_up_for_import(graph, inputs, settings) if loaded.quantised else make_up(graph, inputs, settings)
    return _Data(made_up.dataset, made_up.kind, evaluation, made_up.warnings, real=False, learn=False)


def _check_excluded(graph: Graph, settings: Settings) -> None:
    for pattern in settings.exclude:
        alone = Settings(exclude=(pattern,))
        if not any(alone.excluded(n.name) for n in graph.nodes):
            raise InputError(f"--exclude {pattern}: no node of the model matches; `qcompile inspect MODEL` lists their names")


def _stages(progress: Progress | None, given: _Data) -> Any:
    if progress is None:
        return None
    counts: dict[str, int] = {}

    def tick(stage: str) -> None:
        counts[stage] = counts.get(stage, 0) + 1
        progress(stage, counts[stage], given.calibration.count if stage == "calibrating" else None)

    return tick


def _stamp(loaded: Loaded, settings: Settings) -> None:
    """Metadata: what was done, with which settings (where not the default), from which source; the version is the producer's."""
    whole = asdict(settings)
    chosen = {f.name: whole[f.name] for f in fields(settings) if getattr(settings, f.name) != f.default}
    stamps = {
        "qcompile.source_sha256": loaded.source_sha256,
        "qcompile.settings": json.dumps(chosen, sort_keys=True, separators=(",", ":")),
    }
    shell = loaded.graph.shell
    kept = [p for p in shell.metadata_props if p.key not in stamps]
    del shell.metadata_props[:]
    shell.metadata_props.extend(kept)
    for key, value in stamps.items():
        shell.metadata_props.add(key=key, value=value)
    shell.producer_name, shell.producer_version = "qcompile", qcompile.__version__


def _measure(
    source: Path, path: Path, given: _Data, latency: bool, effort: str, progress: Progress | None
) -> tuple[Measured, dict[str, Any]]:
    if given.evaluation is not None:
        return measure(source, path, given.evaluation, latency=latency, progress=progress), {"kind": "evaluation"}
    own = given.calibration.sample(_OWN_SAMPLES if effort != "fast" else 8)
    kind = "calibration" if given.real else "synthetic"
    if effort == "fast":
        return measure(source, path, own, latency=latency, rounds=5, slot_seconds=0.01, progress=progress), {"kind": kind}
    return measure(source, path, own, latency=latency, progress=progress), {"kind": kind}


def _report(
    source: Path, path: Path, built: _Built, audited: Audit, measured: Measured, given: _Data, limits: Limits
) -> dict[str, Any]:
    settings, loaded, plan = built.context.settings, built.loaded, built.context.plan
    warnings = [*given.warnings, *measured.warnings]
    if given.evaluation is None:
        where = "calibration samples" if given.real else "synthetic inputs"
        warnings.append(f"no --eval: accuracy was measured on {where}")
    return {
        "qcompile": qcompile.__version__,
        "source": {"path": str(source), "sha256": loaded.source_sha256},
        "output": file_record(path),
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "passes": built.rows,
        **_weights(settings, built.context),
        **_imported(built, measured, limits),
        **({} if plan is None or plan.layers is None else {"layers": [layer.as_json() for layer in plan.layers]}),
        "accuracy": measured.accuracy_json(),
        "latency_ms": measured.latency_json(),
        "size_bytes": measured.size_json(),
        "nodes": nodes_json(audited),
        "fusion": fusion_json(audited),
        **({"integer_only": certify(path).as_json()} if settings.format == "integer" else {}),
        "data": {"calibration": given.kind, "samples": built.context.calibrated},
        "notes": loaded.notes,
        "warnings": warnings,
    }


def _weights(settings: Settings, context: Context) -> dict[str, Any]:
    """The report's `weights`: how the weights of a weight-only file are stored and were rounded; nothing for other files."""
    if settings.weight_only is None:
        return {}
    learned = settings.effort != "fast" and not context.synthetic
    rounding = "second order" if learned else "nearest"
    return {"weights": {"bits": settings.bits, **asdict(settings.weight_only), "rounding": rounding}}


def _imported(built: _Built, measured: Measured, limits: Limits) -> dict[str, Any]:
    """The report's `imported`: what became of a source's own integers; nothing where the source was a float model."""
    imported = built.context.imported
    if imported is None:
        return {}
    left = next(row["skipped"] for row in built.rows if row["name"] == "quantise_imported")
    sqnr = None if measured.accuracy is None else measured.accuracy.sqnr_db
    return {"imported": imported.as_json(left, sqnr, limits.max_requant_loss)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _enforce(compiled: Compiled, accuracy: Accuracy, limits: Limits, found: Found[_Built]) -> Compiled:
    """The verdict on the limits; where one is broken the file is renamed and LimitError raised. Too few samples break nothing."""
    verdicts, broken = limits.verdicts(accuracy)
    compiled.report.update(verdicts)
    compiled.report["fallback"] = found.as_json(accuracy.samples)
    if not found.enough:
        compiled.report["warnings"].append(
            f"--eval has fewer than {2 * LEAST_SAMPLES} samples, too few to choose layers by and to judge: no layer was raised"
        )
    elif not found.held and not found.moves:
        compiled.report["warnings"].append(
            f"{limits}: not held on {found.best.accuracy.samples} samples, and no layer can be raised"
        )
    elif broken is None and not found.held:
        broken = f"{limits}: not held on the {found.best.accuracy.samples} samples to choose by, whatever was raised"
    if broken is None:
        return compiled
    raise _failed(compiled, broken)


def _failed(compiled: Compiled, broken: str) -> LimitError:
    """Rename the file and say which limit it broke."""
    kept = compiled.path.with_suffix(".failed" + compiled.path.suffix)
    compiled.path.replace(kept)
    compiled.report["output"]["path"] = str(kept)
    return LimitError(f"{broken}; the file is kept as {kept}", Compiled(kept, compiled.report))
