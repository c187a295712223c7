"""The whole way of the data: load, passes with their promises checked, save, measure, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from qcompile.accuracy import Accuracy
from qcompile.audit import audit
from qcompile.check import Measured, Progress, measure
from qcompile.compact import compact
from qcompile.compare_targets import FREE, add_targets
from qcompile.compilation import Built, Data, open_data
from qcompile.compilation_report import report_of
from qcompile.context import FLOAT_BITS, Context, Settings
from qcompile.convert import lower_opset
from qcompile.data import Dataset
from qcompile.errors import DataError, InputError, LimitError
from qcompile.fallback import LEAST_SAMPLES, Found, Raised, Trial, search
from qcompile.graph_io import forget_inner_types, load_proto, write_functions_out
from qcompile.integer_inputs import take_integers
from qcompile.integer_outputs import give_integers
from qcompile.limits import Limits
from qcompile.load import Loaded, load_model
from qcompile.mixed import settings_of
from qcompile.mixing import Rehearsal, choose_widths, finish
from qcompile.names import names_of, shorten_names
from qcompile.options import check_import, check_node_names, check_settings, output_path, weight_only_of
from qcompile.options_activations import activation_bits_of, check_activations, check_calibrated
from qcompile.options_mixed import check_mixing, mixing_of, whole_bits
from qcompile.options_sparsity import check_sparsity, pruning_of
from qcompile.passes import passes_for
from qcompile.recipe import embedded, node_settings
from qcompile.report_file import peak_rss_mb
from qcompile.run_passes import run_passes
from qcompile.sensitivity import Effort
from qcompile.sparsity_report import sparsity_json
from qcompile.stamp import stamp
from qcompile.tensors import is_external, location

_CHECK_FEEDS = 2
_Ranges: TypeAlias = dict[object, list[tuple[float, float]]]
_OWN_SAMPLES = 32  # calibration samples that stand in where no --eval is given


@dataclass(frozen=True)
class Compiled:
    """A finished compilation: the written file and its JSON report (DESIGN section 8)."""

    path: Path
    report: dict[str, Any]


def compile_model(
    model: str | Path,
    output: str | Path | None = None,
    *,
    bits: int | str = 8,
    limit: str | Sequence[str] | Mapping[str, float] = (),
    widths: str | Sequence[int | str] | None = None,
    activation_widths: str | Sequence[int | str] | None = None,
    mixed_by: str = "best",
    pareto: int = 0,
    loss: str = "kl",
    max_seconds: float | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    format: str = "qdq",
    target: str = "any",
    data: str | Path | Dataset | None = None,
    samples: int | None = None,
    eval_data: str | Path | Dataset | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    on_inconclusive: str = "fail",
    max_requant_loss: float | None = None,
    ranges: str = "mse",
    effort: str = "default",
    exclude: Sequence[str] = (),
    opset: int | None = None,
    inputs_as: str = "float32",
    inline: bool = False,
    io: str = "float",
    kernels: str = "table",
    activations: str | int = "int8",
    block: int | None = None,
    symmetric: bool | None = None,
    spelling: str | None = None,
    accuracy_level: int | None = None,
    sparsity: str | float | None = None,
    criterion: str = "obs",
    sparsity_scope: str = "layer",
    sparse_storage: str = "compressed",
    prune_channels: float | None = None,
    prune_criterion: str | None = None,
    prune_budget: str | None = None,
    channel_multiple: int | None = None,
    keep: Sequence[str] = (),
    refit: bool | None = None,
    prune_implant: float | None = None,
    preprocess: str | None = None,
    bias_correction: bool = True,
    seed: int = 0,
    dump_passes: str | Path | None = None,
    latency: bool = True,
    compare_targets: bool = False,
    diagnose: bool = False,
    nodes: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a float ONNX model to an integer one, write it and measure it against the original.

    data, eval_data: a SPEC (see `qcompile.data`) or a Dataset; without a limit `eval_data` never changes the written bytes.
    inline, io: in format integer, functions are written out; io "integer": inputs and outputs are integers too.
    kernels: in the formats qoperator and integer, GELU and the exponentials of Softmax by table, or ibert: by its polynomials.
    activations: int8, or 6, 5, 4, 3, 2 bits; float for weight-only INT4, whose options are block, symmetric, spelling and
    accuracy_level.
    bits: 8, 6, 5, 4, 3, 2; 32 to quantise nothing; "mixed": each layer's own, of `widths` (its activations' of
    `activation_widths`), under every `limit` ("avg-bits=5", or
    a mapping): the best by the measures that `mixed_by` names (best | noise | kl | hessian), see `qcompile.mixed`; pareto: points
    of the front to compile as well; loss, max_seconds: of the Hessian's traces; workers, scheduler: where they are estimated.
    sparsity: "2:4" (N:M along the input channels) or a share of zeros such as 0.5, chosen
    by `criterion` (magnitude | wanda | obd | obs); sparsity_scope "global": the share is one budget for all layers;
    sparse_storage "dense": 2:4 weights are stored with their zeros.
    prune_channels: the share of `prune_budget` (params | macs | latency) that goes with whole channels; `prune_criterion`: which
    (l1 | hrank | hessian | second-order); widths multiples of `channel_multiple`, layers in `keep` untouched; refit False:
    weights stay; prune_implant: the share of the filters that go in whose place a 1x1 filter is fitted.
    max_drop: the largest drop of top-1 accuracy, in percentage points, that `eval_data` (with labels) must not contradict;
    min_agreement: the least share of samples that keep their class. Where a limit does not hold on one half of `eval_data`,
    layers are raised to 8 bits, then to float, until it does; the verdict is on the other half (`qcompile.fallback`).
    on_inconclusive: fail | pass, what it means for a limit that the samples can neither confirm nor refute.
    max_requant_loss: of a model that already holds Q/DQ, the least SQNR in dB of the result against it. Such a model is imported:
    it keeps its scales and integers where they can be exact, and needs no `data`.
    compare_targets: where target is `any`, effort is not `fast` and there is `eval_data`, also say what `vnni` would have given.
    diagnose: measure each layer's part in the error as well (the report's `layers`); the written bytes stay the same.
    nodes: bits, activations, float or range of single nodes, by name or pattern, as a recipe's [nodes] (see `qcompile.recipe`).
    Returns the written path and the report. Raises InputError, ModelError or DataError (exit status 2), PassError (1), and
    LimitError (3) where a limit is broken: the file is then kept with `.failed` before its suffix.

    >>> compiled = compile_model("models/digits_cnn.onnx", data="models/digits_calib.npz")  # doctest: +SKIP
    >>> compiled.report["accuracy"]["sqnr_db"]  # doctest: +SKIP
    """
    asked = dict(locals())
    start = time.perf_counter()
    single = node_settings(nodes or {})
    effort_of_traces = Effort(loss=loss, tolerance=0.2, probes=64, max_seconds=max_seconds, workers=workers, scheduler=scheduler)
    narrow = activation_bits_of(activations)
    mixing = mixing_of(bits, limit, widths, mixed_by, pareto, effort_of_traces, activations, activation_widths)
    settings = Settings(
        bits=8 if mixing is not None else whole_bits(bits),
        format=format,
        target=target,
        ranges="minmax" if ranges == "mse" and (effort == "fast" or data is None) else ranges,
        effort=effort,
        exclude=(*exclude, *single.exclude),
        node_bits=single.bits,
        node_ranges=single.ranges,
        node_activations=single.activations,
        activation_bits=narrow if mixing is None else mixing.usual_activations,
        bias_correction=bias_correction,
        inputs_as=inputs_as,
        opset=opset,
        seed=seed,
        inline=inline,
        io=io,
        kernels=kernels,
        weight_only=weight_only_of(str(activations), block, symmetric, spelling, accuracy_level),
        sparsity=None if sparsity is None else str(sparsity),
        criterion=criterion,
        sparsity_scope=sparsity_scope,
        sparse_storage=sparse_storage,
        pruning=pruning_of(prune_channels, prune_criterion, prune_budget, channel_multiple, tuple(keep), refit, prune_implant),
    )
    if mixing is not None:
        check_mixing(mixing, settings, has_data=data is not None)
    check_activations(settings)
    check_settings(settings, max_drop, eval_data is not None, min_agreement)
    check_sparsity(settings, data is not None)
    limits = Limits(max_drop, min_agreement, on_inconclusive, max_requant_loss)
    source = Path(model)
    path = output_path(source, output, "mixed" if mixing is not None else settings.bits)
    loaded = load_model(source)
    if mixing is not None and loaded.quantised:
        raise InputError("--bits mixed: the model already holds Q/DQ, whose integers are kept; give the float model")
    check_import(settings, loaded.quantised, max_requant_loss)
    given = open_data(loaded, data, eval_data, samples, preprocess, settings)
    check_calibrated(settings, given.kind)
    if max_drop is not None and given.evaluation is not None and not given.evaluation.has_labels:
        raise DataError("--max-drop compares with the true answers; give --eval data with labels")
    check_node_names([n.name for n in loaded.graph.nodes], [v.name for v in loaded.graph.inputs], settings)
    compiler = _Compiler(source, path, given, diagnose or limits.given, progress)
    dump = Path(dump_passes) if dump_passes is not None else None
    mixed = None
    if mixing is None:
        built = compiler.build(loaded, settings, dump)
    else:
        mixed = choose_widths(source, path, loaded, settings, mixing, given, compiler.rehearsal(), progress)
        built = compiler.build(load_model(source), settings_of(settings, mixed.assigned), dump)
    try:
        if mixed is not None and mixing is not None:
            finish(mixed, mixing, source, path)
        found = None
        if limits.given and given.evaluation is not None:
            chosen_by, judged_on = given.evaluation.halves()
            # Two samples at least: else there is nothing left to judge on. What mixed precision chose keeps its own limits.
            may_raise = mixed is None and sum(1 for _ in islice(given.evaluation, 2)) == 2
            to_float = format != "integer"
            least = min(settings.bits, settings.least_activations) if settings.narrow_activations else settings.bits
            found = search(compiler.trials(built, chosen_by), limits, least, may_raise=may_raise, to_float=to_float)
            built = found.best.built
            built.loaded.graph.save(path)
            given = replace(given, evaluation=judged_on if found.moves else given.evaluation)
        audited = audit(path)
        measured, measured_on = _measure(source, path, given, latency, effort, progress)
        report = report_of(source, path, built, audited, measured, given, limits)
        report["data"]["evaluation"] = measured_on
        report["recipe"] = embedded(asked, compile_model)
        report.update({} if mixed is None else {"mixed": mixed.report})
        report.update(sparsity_json(source, path, built.context, given.calibration))
        report["seconds"] = round(time.perf_counter() - start, 3)
        report["peak_rss_mb"] = peak_rss_mb()
        if (
            compare_targets
            and mixed is None
            and settings.bits != FLOAT_BITS
            and target == "any"
            and effort != "fast"
            and eval_data is not None
        ):
            again = partial(compile_model, source, format=format, target=FREE, data=data, samples=samples, eval_data=eval_data)
            again = partial(again, bits=bits, ranges=ranges, effort=effort, exclude=exclude, opset=opset, inputs_as=inputs_as)
            again = partial(again, activations=narrow)
            again = partial(again, sparsity=sparsity, criterion=criterion, sparsity_scope=sparsity_scope)
            again = partial(again, prune_channels=prune_channels, prune_criterion=prune_criterion, prune_budget=prune_budget)
            again = partial(again, channel_multiple=channel_multiple, keep=keep, refit=refit, prune_implant=prune_implant)
            again = partial(again, preprocess=preprocess, bias_correction=bias_correction, seed=seed, latency=False, nodes=nodes)
            add_targets(path, report, lambda **options: again(**options).report, progress)
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


@dataclass(frozen=True)
class _Compiler:
    """Compiles one source, once as asked and again with layers raised; every build is written to `path`."""

    source: Path
    path: Path
    given: Data
    diagnose: bool
    progress: Progress | None

    def build(self, loaded: Loaded, settings: Settings, dump: Path | None = None, ranges: _Ranges | None = None) -> Built:
        """Run all passes on `loaded` and write the result. ranges: those of an earlier build, taken over where they fit."""
        given, graph = self.given, loaded.graph
        known = names_of(graph)
        context = Context(settings, calibration=lambda: (s.feeds for s in given.calibration))
        context.ranges = {} if ranges is None else ranges
        context.diagnose = self.diagnose
        context.synthetic = given.kind == "synthetic" or (given.kind == "imported" and not given.learn)
        context.progress = _stages(self.progress, given)
        feeds = [s.feeds for s in islice(given.calibration, 1 if settings.effort == "fast" else _CHECK_FEEDS)]
        steps = passes_for("float" if settings.bits == FLOAT_BITS else "weight_only" if settings.weight_only else given.kind)
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
        stamp(loaded, settings)
        graph.save(self.path)
        return Built(loaded, rows, context)

    def rehearsal(self) -> Rehearsal:
        """Builds from every other calibration sample, to be judged on the others; from all where there are fewer than eight."""
        samples = self.given.calibration
        part, held_out = samples.halves() if sum(1 for _ in islice(samples, 8)) == 8 else (samples, samples)
        compiler = replace(self, given=replace(self.given, calibration=part), diagnose=False)
        return Rehearsal(lambda settings: compiler.build(load_model(self.source), settings), held_out)

    def trials(self, first: Built, part: Dataset) -> Callable[[Raised], Trial[Built]]:
        """What `search` tries with: `first` as it stands, and builds with layers raised; measured on `part`."""

        def compile_with(raised: Raised) -> Trial[Built]:
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


def _stages(progress: Progress | None, given: Data) -> Any:
    if progress is None:
        return None
    counts: dict[str, int] = {}

    def tick(stage: str) -> None:
        counts[stage] = counts.get(stage, 0) + 1
        progress(stage, counts[stage], given.calibration.count if stage == "calibrating" else None)

    return tick


def _measure(
    source: Path, path: Path, given: Data, latency: bool, effort: str, progress: Progress | None
) -> tuple[Measured, dict[str, Any]]:
    if given.evaluation is not None:
        return measure(source, path, given.evaluation, latency=latency, progress=progress), {"kind": "evaluation"}
    own = given.calibration.sample(_OWN_SAMPLES if effort != "fast" else 8)
    kind = "calibration" if given.real else "synthetic"
    if effort == "fast":
        return measure(source, path, own, latency=latency, rounds=5, slot_seconds=0.01, progress=progress), {"kind": kind}
    return measure(source, path, own, latency=latency, progress=progress), {"kind": kind}


def _enforce(compiled: Compiled, accuracy: Accuracy, limits: Limits, found: Found[Built]) -> Compiled:
    """The verdict on the limits; where one is broken the file is renamed and LimitError raised."""
    verdicts, broken = limits.verdicts(accuracy)
    compiled.report.update(verdicts)
    compiled.report["fallback"] = found.as_json(accuracy.samples)
    if not found.enough and "mixed" not in compiled.report:
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
