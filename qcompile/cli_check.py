"""`qcompile check`: the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.cli_common import (
    FILE,
    HTML,
    MAX_DROP,
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
from qcompile.cli_recipe import RECIPE
from qcompile.errors import LimitError
from qcompile.printing import TerminalProgress
from qcompile.recipe import Recipe
from qcompile.report_file import check_report_path


@click.command()
@click.argument("float_model", metavar="FLOAT", type=FILE)
@click.argument("quantised", metavar="QUANTISED", type=FILE)
@RECIPE
@click.option("--eval", "eval_data", metavar="SPEC", required=True, help="Samples, best with labels, to compare on.")
@SAMPLES
@PREPROCESS
@click.option("--metric", metavar="M", help="top1, topk:K, mse, f1 or file.py:function.  [top1 where there are labels]")
@MAX_DROP
@MIN_AGREEMENT
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail where the outputs are less than this many dB above the error.")
@click.option(
    "--max-latency-ratio",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Fail where QUANTISED takes more times as long.",
)
@click.option(
    "--max-size-ratio", type=click.FloatRange(0, min_open=True), metavar="R", help="Fail where QUANTISED is more times as large."
)
@click.option("--require-integer-only", is_flag=True, help="Fail where a float tensor lies between the ends.")
@ON_INCONCLUSIVE
@click.option("--baseline", type=FILE, metavar="FILE.json", help="Fail where QUANTISED is worse than what this file records.")
@click.option("--update-baseline", is_flag=True, help="Write the baseline instead of comparing with it.")
@REPORT
@HTML
@click.option("--junit", type=FILE, metavar="FILE.xml", help="Write the limits as JUnit test cases.")
@click.option("--github", is_flag=True, help="Write annotations, and the step summary of GitHub Actions.")
@SEED
@NO_LATENCY
@QUIET
@TRACEBACK
def check(
    float_model: Path,
    quantised: Path,
    eval_data: str,
    report: Path | None,
    html: Path | None,
    junit: Path | None,
    github: bool,
    no_latency: bool,
    quiet: bool,
    recipe: Recipe | None,
    **options: Any,
) -> int:
    """Measure QUANTISED against FLOAT and judge it: accuracy, fusion, latency and size."""
    check_report(report, float_model, quantised)
    check_html(html, float_model, quantised)
    for path, option in ((junit, "--junit"), (options["baseline"] if options["update_baseline"] else None, "--baseline")):
        if path is not None:
            check_report_path(path, model_files=(float_model, quantised), option=option)
    from qcompile.checking import check_models
    from qcompile.ci_reports import summary_path

    if github:
        summary_path()
    broken: LimitError | None = None
    try:
        with TerminalProgress(quiet=quiet) as progress:
            found = check_models(float_model, quantised, eval_data, latency=not no_latency, progress=progress, **options)
    except LimitError as error:
        found, broken = getattr(error.compiled, "report", {}), error
    _tell(found, report, junit, github, quiet)
    if html is not None:
        from qcompile.html_report import make_html

        chosen = {key: options[key] for key in ("preprocess", "samples", "seed")}
        with TerminalProgress(quiet=quiet) as progress:
            make_html(found, float_model, html, spec=eval_data, progress=progress, **chosen)
    if broken is not None:
        raise broken
    return 0


def _tell(found: dict[str, Any], report: Path | None, junit: Path | None, github: bool, quiet: bool) -> None:
    from qcompile.ci_reports import append_summary, github_annotations, write_junit

    if junit is not None:
        write_junit(found, junit)
    if github:
        append_summary(found)
        for line in github_annotations(found):
            click.echo(line)
    deliver(found, report, quiet=quiet)
