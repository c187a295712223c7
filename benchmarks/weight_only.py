"""One-row and many-row products in float and in blocks of 4 bits, compiled and timed in turn on one thread.

    python benchmarks/weight_only.py [--width K] [--channels N] [--rows M]... [--rounds R]

Every file is written by qcompile itself from a float MatMul of random weights. Medians, and the paired speed-up with its 95 %
interval; SQNR of the product against float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile import compile_model
from qcompile.latency import measure_latency
from qcompile.runtime import Session

SETTINGS: dict[str, dict[str, Any]] = {
    **{
        f"block {block}, {'symmetric' if symmetric else 'asymmetric'}, level {level}": {
            "block": block,
            "symmetric": symmetric,
            "accuracy_level": level,
        }
        for block in (32, 128)
        for symmetric in (False, True)
        for level in (0, 4)
    },
    "block 32, asymmetric, portable": {"block": 32, "spelling": "portable"},
}


def float_model(width: int, channels: int) -> onnx.ModelProto:
    """x [n, K] times random weights [K, N]."""
    weight = np.random.default_rng(0).normal(size=(width, channels)).astype(np.float32)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in (("x", width), ("y", channels))]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sqnr_db(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """10 log10 of signal over noise."""
    signal, noise = (np.square(a.astype(np.float64)).sum() for a in (expected, expected - got))
    return float(10 * np.log10(signal / noise))


@click.command()
@click.option("--width", type=click.IntRange(1), default=2048, help="K.  [2048]")
@click.option("--channels", type=click.IntRange(1), default=8192, help="N.  [8192]")
@click.option("--rows", type=click.IntRange(1), multiple=True, default=(1, 16, 128), help="M, may be repeated.  [1, 16, 128]")
@click.option("--rounds", type=click.IntRange(1), default=11, help="Turns each file has.  [11]")
def main(width: int, channels: int, rows: Sequence[int], rounds: int) -> None:
    """Write the files, then time all of them in turn for every number of rows."""
    with tempfile.TemporaryDirectory(prefix="qcompile-benchmark-") as folder:
        source = Path(folder) / "float.onnx"
        onnx.save(float_model(width, channels), source)
        files = [source]
        for index, options in enumerate(SETTINGS.values()):
            made = compile_model(
                source, source.with_name(f"{index}.onnx"), bits=4, activations="float", latency=False, effort="fast", **options
            )
            files.append(made.path)
        for count in rows:
            feeds = {"x": np.random.default_rng(1).normal(size=(count, width)).astype(np.float32)}
            outputs = [Session(f).run(feeds)["y"] for f in files]
            found = measure_latency(files, feeds, rounds=rounds)
            click.echo(f"{count} x {width} x {channels}: float {found.median_ms[0]:.3f} ms")
            for index, name in enumerate(SETTINGS, start=1):
                speed = found.speedups[index]
                size = files[index].stat().st_size / source.stat().st_size
                click.echo(
                    f"  {name:34} {found.median_ms[index]:8.3f} ms  {speed.median:5.2f} x ({speed.low:.2f} to {speed.high:.2f})"
                    f"  {sqnr_db(outputs[0], outputs[index]):6.2f} dB  {size:.3f} size"
                )


if __name__ == "__main__":
    main()
