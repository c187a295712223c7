"""The steps of wide sums: powers of two in which no operand leaves 2^29, and weights whose steps are whole multiples."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from core_models import core_context
from wide_models import D, Spec, samples, transformer

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes import passes_for
from qcompile.passes._wide_sums import wide_sums
from qcompile.passes.wide_units import WideUnits, reach_of


def until(name: str, spec: Spec, **settings: str) -> tuple[Graph, Context]:
    graph = Graph.from_proto(transformer(spec))
    context = core_context(samples(spec, 8), **{"format": "integer", "effort": "fast", **settings})
    for step in passes_for():
        step.run(graph, context)
        if step.name == name:
            break
    return graph, context


SPECS = {"pre": Spec(), "post": Spec("post", "tokens", "additive", pool="masked", length=None), "rms": Spec("post", norm="rms")}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_units_are_powers_of_two_that_leave_every_operand_room(spec: Spec) -> None:
    _, context = until("integer_bias", spec)
    plan = context.plan
    assert plan is not None and plan.units
    assert all(Fraction(unit).numerator == 1 or Fraction(unit).denominator == 1 for unit in plan.units.values())
    sites = [s for s in plan.linears if s.unit is not None]
    assert len(sites) >= 4, "two blocks with two sums each"
    for site in sites:
        unit = Fraction(float(site.unit))  # type: ignore[arg-type]
        right, bias = site.node.inputs[1].producer, site.node.inputs[2].producer
        assert right is not None and bias is not None
        weight, scales, offsets = right.constant(0), right.constant(1), bias.constant(0)
        assert weight is not None and scales is not None and offsets is not None
        integers = weight.array().astype(np.int64)
        sums = np.abs(integers).sum(axis=0 if site.axis == 1 else 1)
        for total, scale, offset in zip(sums, scales.array().reshape(-1), offsets.array().reshape(-1), strict=True):
            step = Fraction(float(site.source.scale)) * Fraction(float(scale))
            whole = step / unit
            assert round(whole) >= 1 and abs(whole / round(whole) - 1) < Fraction(1, 10**6), "float32 of a whole multiple"
            assert (255 * int(total) + abs(int(offset))) * whole <= 2**29 * Fraction(21, 20), "rounding may add a little"


def test_the_format_without_integer_kernels_has_no_units() -> None:
    _, context = until("wide_units", Spec(), format="qdq")
    assert context.plan is not None and not context.plan.units


def test_a_second_run_changes_nothing() -> None:
    graph, context = until("wide_units", Spec())
    assert context.plan is not None
    before = dict(context.plan.units)
    assert WideUnits().run(graph, context).rewrites == 0 and context.plan.units == before


def test_an_epsilon_beside_an_unknown_tensor_gives_no_unit() -> None:
    """A step chosen for 1e-5 alone would clip what it is added to."""
    _, context = until("wide_units", Spec(norm="rms", pool="mean"))
    assert context.plan is not None
    assert not any(name.endswith("me") for name in context.plan.units)
    assert min(context.plan.units.values()) > 1e-5 * 2.0**-20


def test_a_residual_stream_is_one_sum_or_one_a_block() -> None:
    pre, post = (until("sum_residuals", Spec(order))[0] for order in ("pre", "post"))
    assert len([s for s in wide_sums(pre) if len(s.sources) > 1]) == 1
    assert len([s for s in wide_sums(post) if len(s.sources) > 1]) == 4


def test_no_row_of_a_norm_gives_more() -> None:
    gamma, beta = np.array([-2.0, 0.5, 1.0] + [0.1] * (D - 3)), np.linspace(-0.3, 0.2, D)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(2000, D)) ** 3, np.eye(D) * 100, -np.eye(D)])
    centred = rows - rows.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True)) * gamma + beta
    most = float(np.abs(normed).max())
    assert 0.8 * reach_of(gamma, beta) < most <= reach_of(gamma, beta)
