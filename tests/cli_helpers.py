"""What tests of the command line share: the shipped models, and what an error looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
CNN = str(MODELS / "digits_cnn.onnx")

Command = Callable[..., tuple[int, str, str]]


def is_one_error(err: str) -> bool:
    return err.startswith("qcompile: error: ") and err.endswith("\n") and err.count("\n") == 1
