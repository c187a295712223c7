"""`qcompile bench`: models timed in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.cli_common import FILE, FOLDER, PREPROCESS, QUIET, REPORT, TRACEBACK, check_report
from qcompile.printing import TerminalProgress, console, print_bench
from qcompile.report_file import write_report


@click.command()
@click.argument("models", metavar="MODEL...", type=FILE, nargs=-1, required=True)
@click.option("--data", metavar="SPEC", help="Where the sample to run comes from.  [made up]")
@PREPROCESS
@click.option("--rounds", type=click.IntRange(min=1), default=11, metavar="N", help="Turns each model has.  [11]")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="S", help="Time for each model.  [.05 a round]")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Repeat the sample N times along its first axis.")
@click.option("--threads", type=click.IntRange(min=1), default=1, metavar="N", help="Threads of onnxruntime.  [1]")
@click.option("--no-cold", is_flag=True, help="Do not measure cold starts and memory.")
@click.option("--no-profile", is_flag=True, help="Do not measure time by operator.")
@click.option(
    "--runtime",
    type=click.Choice(["python", "node", "web"]),
    default="python",
    help="Where: onnxruntime here, onnxruntime-node, or onnxruntime-web's WebAssembly in Node.  [python]",
)
@click.option("--node-modules", type=FOLDER, metavar="DIR", help="With --runtime node or web: where node_modules lies.")
@REPORT
@QUIET
@TRACEBACK
def bench(
    models: tuple[Path, ...],
    data: str | None,
    preprocess: str | None,
    no_cold: bool,
    no_profile: bool,
    runtime: str,
    node_modules: Path | None,
    report: Path | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Time MODELs in turn on the same sample; the first is what the others are compared with."""
    if preprocess is not None and data is None:
        raise click.UsageError("--preprocess is for images; give them with --data")
    if node_modules is not None and runtime == "python":
        raise click.UsageError("--node-modules goes with --runtime node or web")
    check_report(report, *models)
    if runtime == "python":
        from qcompile.bench import bench_models

        with TerminalProgress(quiet=quiet) as progress:
            options |= {"cold": not no_cold, "profile": not no_profile, "progress": progress}
            found = bench_models(*models, data_spec=data, preprocess=preprocess, **options)
    else:
        from qcompile.bench_node import bench_in_node

        found = bench_in_node(*models, runtime=runtime, modules=node_modules, data_spec=data, preprocess=preprocess, **options)
    if report is not None:
        write_report(found, report)
    if not quiet:
        print_bench(found, console())
    return 0
