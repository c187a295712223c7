"""`qcompile diff`: where two models part."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli_common import FILE, PREPROCESS, QUIET, REPORT, SEED, TRACEBACK, check_report
from qcompile.printing import TerminalProgress, console
from qcompile.report_file import write_report


@click.command()
@click.argument("first", metavar="A", type=FILE)
@click.argument("second", metavar="B", type=FILE)
@click.option("--eval", "eval_data", metavar="SPEC", required=True, help="Samples to run both models on.")
@click.option("--samples", type=click.IntRange(min=1), default=8, metavar="N", help="Use at most N samples.  [8]")
@PREPROCESS
@click.option("--within", "within_db", type=float, metavar="DB", help="Tensors this close count as equal.  [bit for bit]")
@click.option("--all", "every", is_flag=True, help="List every tensor that both compute.")
@REPORT
@SEED
@QUIET
@TRACEBACK
def diff(
    first: Path,
    second: Path,
    eval_data: str,
    samples: int,
    preprocess: str | None,
    within_db: float | None,
    every: bool,
    report: Path | None,
    seed: int,
    quiet: bool,
) -> int:
    """Find the first layer where A and B part, and the one that adds most error."""
    check_report(report, first, second)
    from qcompile.diff import diff_models
    from qcompile.printing_diff import print_difference

    with TerminalProgress(quiet=quiet) as progress:
        found = diff_models(
            first, second, eval_data, samples=samples, within_db=within_db, preprocess=preprocess, seed=seed, progress=progress
        )
    if report is not None:
        write_report(found.as_json(), report)
    if not quiet:
        print_difference(found, console(), every=every)
    return 0
