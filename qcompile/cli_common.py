"""What several commands of the command line share: options, and how a report is delivered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.command_group import Invocation
from qcompile.printing import console, print_report
from qcompile.report_file import check_report_path, write_report

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)


def _set_traceback(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Invocation).traceback |= value


TRACEBACK = click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_traceback,
    help="Show where in the program an error arose.",
)
PREPROCESS = click.option("--preprocess", metavar="P", help="How images become inputs, e.g. imagenet; for image directories.")
SAMPLES = click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use at most N samples, drawn with --seed.")
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of everything random.  [0]")
MAX_DROP = click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Fail (exit status 3) where accuracy drops by more percentage points.",
)
MIN_AGREEMENT = click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Fail (exit status 3) where fewer samples keep their class.",
)
MAX_REQUANT_LOSS = click.option(
    "--max-requant-loss",
    type=click.FloatRange(0),
    metavar="DB",
    help="For a MODEL that already holds Q/DQ: fail (exit status 3) where the SQNR against it is below DB.",
)
ON_INCONCLUSIVE = click.option(
    "--on-inconclusive",
    type=click.Choice(["fail", "pass"]),
    default="fail",
    help="What it means for a limit that the samples cannot decide.  [fail: exit status 3]",
)
REPORT = click.option("--report", type=FILE, metavar="FILE.json", help="Write the report as JSON.")
HTML = click.option("--html", type=FILE, metavar="FILE.html", help="Write the report as one self-contained page.")
NO_LATENCY = click.option("--no-latency", is_flag=True, help="Do not measure latency.")
QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


def check_report(report: Path | None, *models: Path | None) -> None:
    """Raise InputError where the report cannot be written, before any work."""
    if report is not None:
        check_report_path(report, model_files=models)


def check_html(html: Path | None, *models: Path | None) -> None:
    """Raise InputError where the page cannot be made or written, before any work."""
    if html is not None:
        from qcompile.html_report import require_extra

        require_extra()
        check_report_path(html, model_files=models, option="--html")


def deliver(found: Mapping[str, Any], path: Path | None, *, quiet: bool, written: Path | None = None) -> None:
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
