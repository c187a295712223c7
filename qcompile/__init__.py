"""qcompile: from a float ONNX model to a fast, exact integer ONNX model."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Compiled", "compile_model", "__version__"]

if TYPE_CHECKING:
    from qcompile.pipeline import Compiled, compile_model


def __getattr__(name: str) -> Any:
    """`qcompile.compile_model` and `qcompile.Compiled`, imported when first used: `qcompile --help` needs no onnxruntime."""
    if name in ("Compiled", "compile_model"):
        from qcompile import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'qcompile' has no attribute '{name}'")
