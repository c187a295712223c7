"""The command line: options in, tables out. What is done stands in `pipeline`, `checking` and `inspection`.

Those are imported inside the commands: `--help` need not wait for onnxruntime, and Ctrl-C while they load is handled.
Each subcommand has a module of its own, `cli_*`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import click

import qcompile
from qcompile.cli_bench import bench
from qcompile.cli_bundle import bundle
from qcompile.cli_check import check
from qcompile.cli_common import (
    FILE,
    FOLDER,
    HTML,
    MAX_DROP,
    MAX_REQUANT_LOSS,
    MIN_AGREEMENT,
    NO_LATENCY,
    ON_INCONCLUSIVE,
    PREPROCESS,
    QUIET,
    REPORT,
    SAMPLES,
    SEED,
    TRACEBACK,
    check_html,
    check_report,
    deliver,
)
from qcompile.cli_diff import diff
from qcompile.cli_inspect import inspect
from qcompile.cli_mixed import mixed_options, sensitivity
from qcompile.cli_recipe import RECIPE
from qcompile.command_group import CompileCommand, CompileGroup, run
from qcompile.errors import LimitError
from qcompile.options_activations import CHOICES
from qcompile.printing import TerminalProgress, console, print_passes
from qcompile.recipe import Recipe


@click.group(cls=CompileGroup)
def cli() -> None:
    """Compile a float (or Q/DQ) ONNX model to an exact integer ONNX model that stock onnxruntime runs.

    SPEC, the data: a .npz file, a directory of .npz files or of images, an ONNX test_data_set_* directory,
    file.py:function or package.module:function. A subcommand's name wins over a file of that name: ./check is the file.
    """


@cli.command("compile", cls=CompileCommand, hidden=True)
@click.argument("model", type=FILE)
@RECIPE
@click.option("-o", "--output", type=FILE, metavar="OUT", help="Where to write.  [MODEL with .int8.onnx]")
@click.option(
    "--bits",
    type=click.Choice(["8", "6", "5", "4", "3", "2", "mixed", "32"]),
    default="8",
    help="Width of weights; mixed: each layer's own, under --limit; 32: quantise nothing.  [8]",
)
@mixed_options
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
    type=click.Choice(["any", "wasm", "vnni", "arm", "tensorrt"]),
    default="any",
    help="Machines to run on; any: the same bits everywhere; wasm: what is slower as int8 there stays float.  [any]",
)
@click.option("--data", metavar="SPEC", help="Calibration samples.")
@SAMPLES
@PREPROCESS
@click.option("--eval", "eval_data", metavar="SPEC", help="Samples, best with labels, to measure the result on.")
@MAX_DROP
@MIN_AGREEMENT
@MAX_REQUANT_LOSS
@ON_INCONCLUSIVE
@REPORT
@HTML
@click.option("--effort", type=click.Choice(["fast", "default", "best"]), default="default", help="How hard to try.  [default]")
@click.option("--ranges", type=click.Choice(["mse", "minmax", "percentile"]), default="mse", help="How ranges are chosen.  [mse]")
@click.option("--exclude", multiple=True, metavar="NODE-OR-PATTERN", help="Keep nodes float; may be repeated.")
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Opset to write.")
@click.option(
    "--inputs-as", type=click.Choice(["float32", "uint8"]), default="float32", help="Type of the model's inputs.  [float32]"
)
@click.option(
    "--activations",
    type=click.Choice(CHOICES),
    default="int8",
    help="Width of activations; float: weight-only, for --bits 4; the next four options are for it.  [int8]",
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
@click.option("--sparsity", metavar="N:M-OR-SHARE", help="Weights that become zero: 2:4 (N of M stay), or a share such as 0.5.")
@click.option(
    "--criterion", type=click.Choice(["magnitude", "wanda", "obd", "obs"]), default="obs", help="Which weights those are.  [obs]"
)
@click.option(
    "--sparsity-scope", type=click.Choice(["layer", "global"]), default="layer", help="What a share is a share of.  [layer]"
)
@click.option(
    "--sparse-storage", type=click.Choice(["compressed", "dense"]), default="compressed", help="Of 2:4 weights.  [compressed]"
)
@click.option(
    "--prune-channels", type=float, metavar="SHARE", help="Remove whole channels, heads and hidden units: the share that goes."
)
@click.option(
    "--prune-criterion",
    type=click.Choice(["l1", "hrank", "hessian", "second-order"]),
    help="Which channels those are.  [second-order]",
)
@click.option("--prune-budget", type=click.Choice(["params", "macs", "latency"]), help="What it is a share of.  [macs]")
@click.option("--channel-multiple", type=click.IntRange(min=1), metavar="N", help="Kept widths are multiples of N.  [8]")
@click.option("--keep", multiple=True, metavar="NODE-OR-PATTERN", help="Layers that lose no channels; may be repeated.")
@click.option("--no-refit", "refit", flag_value=False, default=None, help="Do not fit what is left of the weights anew.")
@click.option(
    "--prune-implant",
    type=float,
    metavar="SHARE",
    help="Of the filters that go: become 1x1 filters, fitted anew.  [0]",
)
@click.option("--no-bias-correction", is_flag=True, help="Leave biases as they are.")
@click.option("--dump-passes", type=FOLDER, metavar="DIR", help="Write the model after every pass.")
@SEED
@NO_LATENCY
@click.option("--no-compare-targets", is_flag=True, help="With --eval and --report: do not measure target vnni beside any.")
@QUIET
@TRACEBACK
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
    html: Path | None,
    no_bias_correction: bool,
    no_latency: bool,
    no_compare_targets: bool,
    quiet: bool,
    recipe: Recipe | None,
    **options: Any,
) -> int:
    """Compile MODEL."""
    if max_drop is not None and eval_data is None:
        raise click.UsageError("--max-drop compares on labelled samples; give them with --eval")
    if min_agreement is not None and eval_data is None:
        raise click.UsageError("--min-agreement compares on samples; give them with --eval")
    if options["preprocess"] is not None and options["data"] is None and eval_data is None:
        raise click.UsageError("--preprocess is for images; give them with --data or --eval")
    check_report(report, model, output)
    check_html(html, model, output)
    from qcompile.pipeline import compile_model

    broken: LimitError | None = None
    try:
        with TerminalProgress(quiet=quiet) as progress:
            compiled = compile_model(
                model,
                output,
                bits=bits if bits == "mixed" else int(bits),
                format=format_,
                block=None if block is None else int(block),
                eval_data=eval_data,
                max_drop=max_drop,
                min_agreement=min_agreement,
                bias_correction=not no_bias_correction,
                latency=not no_latency,
                compare_targets=report is not None and eval_data is not None and not no_compare_targets,
                diagnose=report is not None or html is not None,
                nodes={} if recipe is None else recipe.nodes,
                progress=progress,
                **options,
            )
    except LimitError as error:
        compiled, broken = cast(Any, error.compiled), error
    found = getattr(compiled, "report", {})
    deliver(found, report, quiet=quiet, written=getattr(compiled, "path", None))
    if html is not None and found:
        from qcompile.html_report import make_html

        spec = eval_data if eval_data is not None else options["data"]
        with TerminalProgress(quiet=quiet) as progress:
            make_html(found, model, html, spec=spec, preprocess=options["preprocess"], seed=options["seed"], progress=progress)
    if broken is not None:
        raise broken
    return 0


@cli.command()
@TRACEBACK
def passes() -> int:
    """List the passes in the order in which they run."""
    from qcompile.passes import PASSES

    print_passes(PASSES, console())
    return 0


for _command in (check, inspect, bench, bundle, diff, sensitivity):
    cli.add_command(_command)


def main(args: list[str] | None = None) -> None:
    """Entry point; ends the process with the exit status."""
    sys.exit(run(cli, args))
