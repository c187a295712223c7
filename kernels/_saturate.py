"""How rescaling kernels end: int32 clipped to the output's type."""

from __future__ import annotations

from onnx import FunctionProto, TensorProto

from qcompile.kernels._protocol import Kernel, function

# Clip takes scalars; `moved` is what the body makes.
_SATURATE = """
    clipped = Clip (moved, low_, high_)
    y = Cast <to : int = @to> (clipped)
"""


def rescale_function(kernel: Kernel, body: str, meaning: str) -> FunctionProto:
    """The function of `kernel` from x and its constants: `body` makes int32 `moved`, which is clipped to low..high and cast."""
    head = f"{kernel.name} <{', '.join(kernel.attributes())}> (x, {', '.join(kernel.constants())}) => (y)"
    made = function(f"{head} {{ {body} {_SATURATE} }}", {"low": TensorProto.INT32, "high": TensorProto.INT32})
    made.doc_string = meaning
    return made
