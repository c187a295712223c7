"""The command line: options in, tables out. What is done stands in `pipeline`, `check` and `inspection`.

Those are imported inside the commands: `--help` need not wait for onnxruntime, and Ctrl-C while they load is handled.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import qcompile
from qcompile.command_group import CompileCommand, CompileGroup, Invocation, LaterChoice, run
from qcompile.errors import LimitError
from qcompile.printing import (
    TerminalProgress,
    console,
    print_bench,
    print_certificate,
    print_passes,
    print_report,
    print_rescales,
    print_rows,
    print_summary,
)
from qcompile.report_file import check_report_path, write_report

_FILE = click.Path(path_type=Path)
_FOLDER = click.Path(path_type=Path, file_okay=False)


def _set_traceback(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Invocation).traceback |= value


_TRACEBACK = click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_traceback,
    help="Show where in the program an error arose.",
)
_PREPROCESS = click.option("--preprocess", metavar="P", help="How images become inputs, e.g. imagenet; for image directories.")
_SAMPLES = click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use at most N samples, drawn with --seed.")
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of everything random.  [0]")
_MAX_DROP = click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Fail (exit status 3) where accuracy drops by more percentage points.",
)
_MIN_AGREEMENT = click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Fail (exit status 3) where fewer samples keep their class.",
)
_MAX_REQUANT_LOSS = click.option(
    "--max-requant-loss",
    type=click.FloatRange(0),
    metavar="DB",
    help="For a MODEL that already holds Q/DQ: fail (exit status 3) where the SQNR against it is below DB.",
)
_REPORT = click.option("--report", type=_FILE, metavar="FILE.json", help="Write the report as JSON.")
_NO_LATENCY = click.option("--no-latency", is_flag=True, help="Do not measure latency.")
_QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


@click.group(cls=CompileGroup)
def cli() -> None:
    """Compile a float (or Q/DQ) ONNX model to an exact integer ONNX model that stock onnxruntime runs.

    SPEC, the data: a .npz file, a directory of .npz files or of images, an ONNX test_data_set_* directory,
    file.py:function or package.module:function. A subcommand's name wins over a file of that name: ./check is the file.
    """


@cli.command("compile", cls=CompileCommand, hidden=True)
@click.argument("model", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="OUT", help="Where to write.  [MODEL with .int8.onnx]")
@click.option("--bits", type=LaterChoice(["8", "4"], ["mixed"]), default="8", help="Width of weights.  [8]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["qdq", "qoperator", "integer"]),
    default="qdq",
    help="Operators written; integer: no float between the ends.  [qdq]",
)
@click.option(
    "--io",
    type=click.Choice(["float", "integer"]),
    default="float",
    help="With --format integer: its inputs and outputs.  [float]",
)
@click.option(
    "--kernels",
    type=click.Choice(["table", "ibert"]),
    default="table",
    help="With --format qoperator or integer: GELU and exponentials by table, or by I-BERT's polynomials.  [table]",
)
@click.option("--inline", is_flag=True, help="With --format integer: write functions out.")
@click.option(
    "--target",
    type=click.Choice(["any", "vnni", "arm", "tensorrt"]),
    default="any",
    help="Machines to run on; any: the same bits everywhere.  [any]",
)
@click.option("--data", metavar="SPEC", help="Calibration samples.")
@_SAMPLES
@_PREPROCESS
@click.option("--eval", "eval_data", metavar="SPEC", help="Samples, best with labels, to measure the result on.")
@_MAX_DROP
@_MIN_AGREEMENT
@_MAX_REQUANT_LOSS
@_REPORT
@click.option("--effort", type=click.Choice(["fast", "default", "best"]), default="default", help="How hard to try.  [default]")
@click.option("--ranges", type=click.Choice(["mse", "minmax", "percentile"]), default="mse", help="How ranges are chosen.  [mse]")
@click.option("--exclude", multiple=True, metavar="NODE-OR-PATTERN", help="Keep nodes float; may be repeated.")
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Opset to write.")
@click.option(
    "--inputs-as", type=click.Choice(["float32", "uint8"]), default="float32", help="Type of the model's inputs.  [float32]"
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "float"]),
    default="int8",
    help="float: weight-only, for --bits 4; the next four options are for it.  [int8]",
)
@click.option("--block", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale.  [32]")
@click.option("--symmetric/--asymmetric", default=None, help="Blocks without or with zero points.  [asymmetric]")
@click.option(
    "--spelling",
    type=click.Choice(["matmulnbits", "portable"]),
    help="onnxruntime's own operators, or DequantizeLinear of opset 21.  [matmulnbits]",
)
@click.option(
    "--accuracy-level",
    type=click.IntRange(0, 4),
    metavar="N",
    help="Of MatMulNBits: 0 computes in float32, 4 on int8.  [4]",
)
@click.option("--no-bias-correction", is_flag=True, help="Leave biases as they are.")
@click.option("--dump-passes", type=_FOLDER, metavar="DIR", help="Write the model after every pass.")
@_SEED
@_NO_LATENCY
@click.option("--no-compare-targets", is_flag=True, help="With --eval and --report: do not measure target vnni beside any.")
@_QUIET
@_TRACEBACK
@click.version_option(qcompile.__version__, message="qcompile %(version)s")
def compile_command(
    model: Path,
    output: Path | None,
    bits: str,
    format_: str,
    block: str | None,
    eval_data: str | None,
    max_drop: float | None,
    min_agreement: float | None,
    report: Path | None,
    no_bias_correction: bool,
    no_latency: bool,
    no_compare_targets: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Compile MODEL."""
    if max_drop is not None and eval_data is None:
        raise click.UsageError("--max-drop compares on labelled samples; give them with --eval")
    if min_agreement is not None and eval_data is None:
        raise click.UsageError("--min-agreement compares on samples; give them with --eval")
    if options["preprocess"] is not None and options["data"] is None and eval_data is None:
        raise click.UsageError("--preprocess is for images; give them with --data or --eval")
    _check_report(report, model, output)
    from qcompile.pipeline import compile_model

    try:
        with TerminalProgress(quiet=quiet) as progress:
            compiled = compile_model(
                model,
                output,
                bits=int(bits),
                format=format_,
                block=None if block is None else int(block),
                eval_data=eval_data,
                max_drop=max_drop,
                min_agreement=min_agreement,
                bias_correction=not no_bias_correction,
                latency=not no_latency,
                compare_targets=report is not None and eval_data is not None and not no_compare_targets,
                diagnose=report is not None,
                progress=progress,
                **options,
            )
    except LimitError as error:
        failed = error.compiled
        _deliver(getattr(failed, "report", {}), report, quiet=quiet, written=getattr(failed, "path", None))
        raise
    _deliver(compiled.report, report, quiet=quiet, written=compiled.path)
    return 0


@cli.command()
@click.argument("float_model", metavar="FLOAT", type=_FILE)
@click.argument("quantised", metavar="QUANTISED", type=_FILE)
@click.option("--eval", "eval_data", metavar="SPEC", required=True, help="Samples, best with labels, to compare on.")
@_SAMPLES
@_PREPROCESS
@_MAX_DROP
@_REPORT
@_SEED
@_NO_LATENCY
@_QUIET
@_TRACEBACK
def check(
    float_model: Path,
    quantised: Path,
    eval_data: str,
    report: Path | None,
    no_latency: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure QUANTISED against FLOAT: accuracy, fusion, latency and size."""
    _check_report(report, float_model, quantised)
    from qcompile.check import check_models

    try:
        with TerminalProgress(quiet=quiet) as progress:
            found = check_models(float_model, quantised, eval_data, latency=not no_latency, progress=progress, **options)
    except LimitError as error:
        _deliver(getattr(error.compiled, "report", {}), report, quiet=quiet)
        raise
    _deliver(found, report, quiet=quiet)
    return 0


@cli.command()
@click.argument("model", type=_FILE)
@click.option("--dyadic", is_flag=True, help="List b and c of every rescale, b/2^c, derived again from the file.")
@click.option("--nodes", is_flag=True, help="List the nodes' names, as --exclude takes them.")
@click.option("--require-exact", is_flag=True, help="With --dyadic: exit status 3 unless all are exact.")
@click.option("--require-integer-only", is_flag=True, help="Exit status 3 where a float tensor lies between the ends.")
@_TRACEBACK
def inspect(model: Path, dyadic: bool, nodes: bool, require_exact: bool, require_integer_only: bool) -> int:
    """Show what MODEL holds."""
    if require_exact and not dyadic:
        raise click.UsageError("--require-exact goes with --dyadic")
    from qcompile.certificate import certify
    from qcompile.inspection import rescales, summary
    from qcompile.model_file import list_nodes

    if nodes:
        print_rows(("name", "operator", "first output"), list_nodes(model), console())
    certificate = certify(model) if require_integer_only or not (dyadic or nodes) else None
    if not dyadic and not nodes:
        print_summary(summary(model), console())
    if certificate is not None:
        print_certificate(certificate, console(), every=require_integer_only)
    if certificate is not None and require_integer_only and not certificate.integer_only:
        first = certificate.floats[0]
        raise LimitError(
            f"{model}: not integer-only: {len(certificate.floats)} float tensors between the ends, first '{first.tensor}' "
            f"of node '{first.node}' ({first.op})"
        )
    if not dyadic:
        return 0
    found = rescales(model)
    print_rescales(found, console())
    inexact = [r for r in found if not r.exact]
    if require_exact and not found:
        raise LimitError(f"{model}: holds no rescale; is it a quantised model?")
    if require_exact and inexact:
        raise LimitError(f"{model}: {len(inexact)} of {len(found)} rescales are not exact, first '{inexact[0].node}'")
    return 0


@cli.command()
@click.argument("float_model", metavar="FLOAT", type=_FILE)
@click.argument("quantised", metavar="QUANTISED", type=_FILE)
@click.option("--data", metavar="SPEC", help="Where the sample to run comes from.  [made up]")
@_PREPROCESS
@click.option("--rounds", type=click.IntRange(min=1), default=11, metavar="N", help="Turns each model has.  [11]")
@click.option("--threads", type=click.IntRange(min=1), default=1, metavar="N", help="Threads of onnxruntime.  [1]")
@_TRACEBACK
def bench(float_model: Path, quantised: Path, data: str | None, preprocess: str | None, rounds: int, threads: int) -> int:
    """Time FLOAT and QUANTISED in turn on the same sample."""
    if preprocess is not None and data is None:
        raise click.UsageError("--preprocess is for images; give them with --data")
    from qcompile.check import bench_models

    found = bench_models(float_model, quantised, data_spec=data, preprocess=preprocess, rounds=rounds, threads=threads)
    print_bench(found, console())
    return 0


@cli.command()
@_TRACEBACK
def passes() -> int:
    """List the passes in the order in which they run."""
    from qcompile.passes import PASSES

    print_passes(PASSES, console())
    return 0


def main(args: list[str] | None = None) -> None:
    """Entry point; ends the process with the exit status."""
    sys.exit(run(cli, args))


def _check_report(report: Path | None, *models: Path | None) -> None:
    if report is not None:
        check_report_path(report, model_files=models)


def _deliver(found: Mapping[str, Any], path: Path | None, *, quiet: bool, written: Path | None = None) -> None:
    """The report into its file first: a reader of the tables may go away."""

    if not found:
        return
    if path is not None:
        write_report(found, path)
    if not quiet:
        out = console()
        print_report(found, out)
        if written is not None:
            out.print(f"wrote {written}")
