"""`qcompile bench`: models timed in turn."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli_common import FILE, PREPROCESS, TRACEBACK
from qcompile.printing import console, print_bench


@click.command()
@click.argument("float_model", metavar="FLOAT", type=FILE)
@click.argument("quantised", metavar="QUANTISED", type=FILE)
@click.option("--data", metavar="SPEC", help="Where the sample to run comes from.  [made up]")
@PREPROCESS
@click.option("--rounds", type=click.IntRange(min=1), default=11, metavar="N", help="Turns each model has.  [11]")
@click.option("--threads", type=click.IntRange(min=1), default=1, metavar="N", help="Threads of onnxruntime.  [1]")
@TRACEBACK
def bench(float_model: Path, quantised: Path, data: str | None, preprocess: str | None, rounds: int, threads: int) -> int:
    """Time FLOAT and QUANTISED in turn on the same sample."""
    if preprocess is not None and data is None:
        raise click.UsageError("--preprocess is for images; give them with --data")
    from qcompile.bench import bench_models

    found = bench_models(float_model, quantised, data_spec=data, preprocess=preprocess, rounds=rounds, threads=threads)
    print_bench(found, console())
    return 0
