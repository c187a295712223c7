"""What an integer kernel is: one frozen dataclass whose fields are what is known when the model is compiled (scales, widths)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, parser

Array: TypeAlias = npt.NDArray[Any]
Float64: TypeAlias = npt.NDArray[np.float64]

DOMAIN = "qcompile"  # of the model-local functions
OPSET = 21  # of the operators in their bodies

_HEADER = '<domain: "{domain}", opset_import: ["" : {opset}]>\n'


@dataclass(frozen=True)
class Kernel(ABC):
    """One integer kernel for given scales; making one outside its domain raises ValueError naming the value.

    `reference` is the definition, `lower` the same in ONNX operators, equal to it bit for bit on every input of the domain.
    What the integers mean: real = (y - output_zero_point) * output_scale, and |real - oracle| <= tolerance.
    """

    source: ClassVar[str]  # paper and equations
    domain: ClassVar[str]  # which scales and widths, in a sentence
    #: Largest |real - oracle| over the whole domain. A constant TOLERANCE where one holds for all scales; else see `tolerance`.
    TOLERANCE: ClassVar[float]
    #: Constants that all calls have alike, by role: a model holds each once.
    shared: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def name(self) -> str:
        """Operator type of the function; kernels of one name share one body."""

    @property
    @abstractmethod
    def output_scale(self) -> float:
        """The real value of one step of the output."""

    @property
    def output_zero_point(self) -> int:
        """The output integer that means 0."""
        return 0

    @property
    def least_opset(self) -> int:
        """The first opset in which the operators of its body have their meaning."""
        return OPSET

    @property
    def tolerance(self) -> float:
        """TOLERANCE, or what it is for these scales."""
        return self.TOLERANCE

    @abstractmethod
    def reference(self, *inputs: Array) -> Array:
        """The output integers for the input tensors (constants not among them), in numpy integers wide enough never to wrap."""

    @abstractmethod
    def lower(self) -> FunctionProto:
        """The body: a model-local function in the domain `qcompile`. It depends on `name` alone, not on the scales."""

    @abstractmethod
    def oracle(self, *inputs: Array) -> Float64:
        """The float64 function of what the input integers mean; values outside the output's range are at its ends."""

    def attributes(self) -> dict[str, int]:
        """Compile-time integers that stand at the node, where a viewer shows them."""
        return {}

    def constants(self) -> dict[str, Array]:
        """Compile-time tensors: inputs that follow the others, each an initializer."""
        return {}

    def node(self, inputs: Sequence[str], outputs: Sequence[str], name: str = "", constants: Sequence[str] = ()) -> NodeProto:
        """The call. `constants`: the names that `constants()` were given in the graph, in order (default: their own)."""
        given = list(constants) or list(self.constants())
        made = helper.make_node(self.name, [*inputs, *given], list(outputs), name=name, domain=DOMAIN)
        made.attribute.extend(helper.make_attribute(key, value) for key, value in self.attributes().items())
        return made

    def real(self, output: Array) -> Float64:
        """What output integers mean."""
        return np.asarray((output.astype(np.float64) - self.output_zero_point) * self.output_scale)


def function(text: str, constants: Mapping[str, int] | None = None) -> FunctionProto:
    """A function from onnx's text form, without its header.

    `constants`: scalar attributes that the body reads as tensors {attribute: element type}; `ln2` is read as `ln2_`.
    """
    made = parser.parse_function(_HEADER.format(domain=DOMAIN, opset=OPSET) + text)
    first: list[NodeProto] = []
    for attribute, element in (constants or {}).items():
        wide = element == TensorProto.INT64
        node = helper.make_node("Constant", [], [f"{attribute}_" if wide else f"{attribute}_wide"])
        node.attribute.add(name="value_int", ref_attr_name=attribute, type=AttributeProto.INT)
        first.append(node)
        if not wide:
            first.append(helper.make_node("Cast", [f"{attribute}_wide"], [f"{attribute}_"], to=element))
    body = list(made.node)
    del made.node[:]
    made.node.extend([*first, *body])
    return made


def within(what: str, value: float, low: float, high: float, instead: str) -> None:
    """Raise ValueError naming `what` and its domain unless low <= value <= high; `instead` says what to do."""
    if not (isfinite(value) and low <= value <= high):
        raise ValueError(f"{what} {value:g} is outside {low:g}..{high:g}: {instead}")
