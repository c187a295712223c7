"""onnxruntime's own INT8 quantiser, with the data that qcompile reads: the other side of compare.py.

    python benchmarks/ort_quantise.py MODEL OUT --kind u8s8|default|dynamic [--data SPEC] [--samples N]

`u8s8` is its best static setting on x86 (uint8 activations, int8 weights per channel, min/max ranges), `default` what
`quantize_static` does when nothing is set, `dynamic` quantises activations at run time and needs no data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)

from qcompile.data import load_dataset, model_inputs
from qcompile.errors import QcompileError

KINDS = ("u8s8", "default", "dynamic")
_OLDEST_OPSET = 13  # per-channel Q/DQ begins here; onnxruntime writes it into older files too, which then do not load
_STATIC: dict[str, dict[str, Any]] = {
    "u8s8": {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8},
    "default": {},
}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds one calibration sample after the other."""

    def __init__(self, feeds: Iterator[dict[str, npt.NDArray[Any]]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next sample, or None at the end."""
        return next(self._feeds, None)


def quantise(model: Path, out: Path, kind: str, data: str | None, samples: int | None) -> None:
    """Write the quantised model to `out`. Raises DataError and ModelError for data or a model that do not fit."""
    source = onnx.load(model)
    inputs = model_inputs(source)
    if next(o.version for o in source.opset_import if o.domain in ("", "ai.onnx")) < _OLDEST_OPSET:
        source = onnx.version_converter.convert_version(source, _OLDEST_OPSET)
    with tempfile.TemporaryDirectory(prefix="ort-quantise-") as folder:
        ready = Path(folder) / "ready.onnx"
        onnx.save(source, ready)
        quant_pre_process(str(ready), str(ready), skip_symbolic_shape=True)
        if kind == "dynamic":
            quantize_dynamic(ready, out, per_channel=True, weight_type=QuantType.QInt8)
            return
        if data is None:
            raise click.UsageError(f"--kind {kind} needs --data")
        feeds = (dict(sample.feeds) for sample in load_dataset(data, inputs, samples=samples))
        quantize_static(ready, out, Reader(feeds), **_STATIC[kind])


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--kind", type=click.Choice(KINDS), default="u8s8", show_default=True)
@click.option("--data", help="Calibration data, a SPEC as qcompile's --data.")
@click.option("--samples", type=click.IntRange(1), help="Use at most so many.")
def main(model: Path, out: Path, kind: str, data: str | None, samples: int | None) -> None:
    """Quantise MODEL with onnxruntime.quantization and write OUT."""
    np.seterr(all="ignore")
    try:
        quantise(model, out, kind, data, samples)
    except QcompileError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
