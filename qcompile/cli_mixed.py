"""The options of mixed precision on the command line, and `qcompile sensitivity`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qcompile.cli_common import FILE, PREPROCESS, QUIET, REPORT, SEED, TRACEBACK, check_report
from qcompile.printing import TerminalProgress, console
from qcompile.report_file import write_report, write_text

_WIDTHS = click.option("--widths", metavar="LIST", help="Widths open to weights, such as 2,4,8 or 4,8,float.  [2,3,4,5,6,8]")
_LOSS = click.option(
    "--loss", type=click.Choice(["kl", "noise", "labels"]), default="kl", help="The loss whose Hessian is estimated.  [kl]"
)
_MAX_SECONDS = click.option(
    "--max-seconds", type=click.FloatRange(0, min_open=True), metavar="S", help="No new probes of the Hessian after that."
)
_WORKERS = click.option("--workers", type=click.IntRange(min=1), default=1, metavar="N", help="Local processes.  [1]")
_SCHEDULER = click.option("--scheduler", metavar="ADDRESS", help="Of a Dask cluster, in place of local processes.")


def mixed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of `--bits mixed`."""
    added = (
        click.option("--limit", multiple=True, metavar="NAME=VALUE", help="With --bits mixed: avg-bits, size, bops or latency."),
        _WIDTHS,
        click.option("--activation-widths", metavar="LIST", help="Widths open to activations, such as 4,8,float.  [8]"),
        click.option(
            "--mixed-by",
            type=click.Choice(["best", "noise", "kl", "hessian"]),
            default="best",
            help="What a width costs a layer; best: compile several and keep the best.  [best]",
        ),
        click.option(
            "--pareto", type=click.IntRange(min=0), default=0, metavar="N", help="Points of the front to compile too.  [0]"
        ),
        _LOSS,
        _MAX_SECONDS,
        _WORKERS,
        _SCHEDULER,
    )
    for option in reversed(added):
        command = option(command)
    return command


@click.command()
@click.argument("model", type=FILE)
@click.option("--data", metavar="SPEC", required=True, help="Samples to measure on.")
@click.option("--samples", type=click.IntRange(min=1), default=128, metavar="N", help="Use at most N, spread evenly.  [128]")
@PREPROCESS
@_WIDTHS
@_LOSS
@click.option(
    "--tolerance", type=float, default=0.1, metavar="SHARE", help="Half the trace's 95 % interval at which to stop.  [0.1]"
)
@click.option("--probes", type=click.IntRange(min=8), default=128, metavar="N", help="At most so many a layer.  [128]")
@_MAX_SECONDS
@click.option("--no-trace", is_flag=True, help="Measure only; no Hessian.")
@click.option("--eigenvalue", is_flag=True, help="The Hessian's top eigenvalue of each layer too, by torch's gradients.")
@click.option("--no-activations", is_flag=True, help="Do not measure inputs of fewer bits.")
@click.option("--exclude", multiple=True, metavar="NODE-OR-PATTERN", help="Leave nodes out; may be repeated.")
@click.option(
    "--target", type=click.Choice(["any", "vnni", "arm", "tensorrt"]), default="any", help="As in a compilation.  [any]"
)
@_WORKERS
@_SCHEDULER
@REPORT
@click.option("--csv", "csv_file", type=FILE, metavar="FILE.csv", help="Write the table as CSV.")
@SEED
@QUIET
@TRACEBACK
def sensitivity(
    model: Path,
    data: str,
    report: Path | None,
    csv_file: Path | None,
    no_trace: bool,
    no_activations: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """What each layer of MODEL costs at each width: predicted by the Hessian's trace, and measured."""
    check_report(report, model)
    check_report(csv_file, model)
    from qcompile.printing_mixed import print_sensitivity
    from qcompile.sensitivity_run import model_sensitivity

    with TerminalProgress(quiet=quiet) as progress:
        found, written = model_sensitivity(
            model, data, with_trace=not no_trace, activations=not no_activations, progress=progress, **options
        )
    if report is not None:
        write_report(written, report)
    if csv_file is not None:
        write_text(found.as_csv(), csv_file, "--csv")
    if not quiet:
        print_sensitivity(written["sensitivity"], console())
    return 0
