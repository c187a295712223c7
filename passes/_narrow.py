"""Which stored integers have fewer than 8 bits: the weights of linear nodes and the tables that Gather reads."""

from __future__ import annotations

from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Const, Graph


def narrow_weights(graph: Graph, context: Context) -> dict[Const, int]:
    """The width that was asked for of every int8 constant that is a weight or table of fewer than 8 bits, in file order."""
    settings = context.settings
    asked: dict[str, int] = {}
    if context.plan is None:  # activations quantised at run time: `quantise_dynamic` names the product after its node
        for node in graph.nodes:
            if node.op == "MatMulInteger" and isinstance(node.inputs[1], Const):
                asked[node.inputs[1].name] = settings.bits_for(node.name.removesuffix("_integer"))
    else:
        asked |= context.plan.stored
        for site in context.plan.linears:
            if site.stored is not None:
                asked[site.stored.name] = settings.bits_for(site.node.name)
    found = {}
    for const in graph.constants.values():
        if const.elem_type != TensorProto.INT8:
            continue
        bits = asked.get(const.name)
        if bits is None and _is_table(const):
            bits = max(settings.bits_for(n.name) for n in const.consumers)
        if bits is not None and bits < 8:
            found[const] = bits
    return found


def _is_table(const: Const) -> bool:
    """Whether it is an embedding table, which only Gather reads."""
    readers = const.consumers
    return len(const.dims) == 2 and bool(readers) and all(n.op == "Gather" and n.inputs[0] is const for n in readers)
