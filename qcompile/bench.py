"""`qcompile bench`: models timed in turn on the same sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompile.check import ROUNDS, Measured, made_up_feeds, paired_inputs
from qcompile.data import load_dataset
from qcompile.latency import measure_latency
from qcompile.size import size_bytes


def bench_models(
    float_model: str | Path,
    quantised: str | Path,
    *,
    data_spec: str | None = None,
    preprocess: str | None = None,
    rounds: int = ROUNDS,
    threads: int = 1,
) -> dict[str, Any]:
    """`latency_ms` and `size_bytes` of a report, on the first sample of `data_spec` or on made-up feeds.

    Raises ModelError, InputError, and DataError where there are no data and the inputs are such that none can be made up.
    """
    float_path, quantised_path = Path(float_model), Path(quantised)
    inputs, convert = paired_inputs(float_path, quantised_path)
    data = None if data_spec is None else load_dataset(data_spec, inputs, preprocess=preprocess)
    feeds = made_up_feeds(inputs) if data is None else next(iter(data)).feeds
    both = [feeds, convert(feeds) if convert else feeds]
    timed = measure_latency([float_path, quantised_path], both, rounds=rounds, threads=threads)
    sizes = Measured(None, timed, size_bytes(float_path), size_bytes(quantised_path))
    return {"latency_ms": sizes.latency_json(), "size_bytes": sizes.size_json(), "rounds": rounds}
