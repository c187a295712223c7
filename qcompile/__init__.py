"""qcompile: from a float ONNX model to a fast, exact integer ONNX model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Compiled", "check_models", "compile_model", "__version__"]

if TYPE_CHECKING:
    from qcompile.checking import check_models
    from qcompile.pipeline import Compiled, compile_model

_HOMES = {"Compiled": "pipeline", "compile_model": "pipeline", "check_models": "checking"}


def __getattr__(name: str) -> Any:
    """The functions above, imported when first used: `qcompile --help` needs no onnxruntime."""
    if name in _HOMES:
        return getattr(import_module(f"qcompile.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qcompile' has no attribute '{name}'")
