"""qcompile: from a float ONNX model to a fast, exact integer ONNX model."""

__version__ = "0.1.0"
