from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, ops, parse

from qcompile.passes.pool_to_conv import PoolToConv

WEIGHT = np.random.default_rng(1).normal(size=(6, 3, 3, 3)).astype(np.float32)
FEED = {"x": np.random.default_rng(0).normal(size=(2, 3, 9, 9)).astype(np.float32)}


def net(pool: str, dims: str = "2,3,9,9", middle: str = "m = Relu (c)") -> str:
    return f"""g (float[{dims}] x) => (float[a,b,d,e] y) {{
        c = Conv <pads = [1,1,1,1]> (x, w)
        {middle}
        y = AveragePool <{pool}> (m)
    }}"""


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param("kernel_shape = [2,2]", id="plain"),
        pytest.param("kernel_shape = [3,2], strides = [2,1]", id="strides"),
        pytest.param("kernel_shape = [3,3], pads = [1,1,0,1], count_include_pad = 1", id="counted padding"),
        pytest.param("kernel_shape = [2,2], dilations = [2,3]", id="dilations"),
        pytest.param('kernel_shape = [2,2], auto_pad = "VALID"', id="valid"),
    ],
)
def test_a_pool_behind_a_convolution_becomes_depthwise(pool: str) -> None:
    report, graph = check_pass(PoolToConv(), parse(net(pool), w=WEIGHT), FEED)
    assert report.rewrites == 1
    assert ops(graph) == {"Conv": 2, "Relu": 1}
    assert graph.nodes[-1].attr("group") == 6


@pytest.mark.parametrize(
    ("pool", "middle", "reason"),
    [
        pytest.param(
            "kernel_shape = [3,3], pads = [1,1,1,1]",
            "m = Relu (c)",
            "padding is not counted: the divisor changes at the edges",
            id="edge divisor",
        ),
        pytest.param("kernel_shape = [2,2], strides = [2,2], ceil_mode = 1", "m = Relu (c)", "ceil_mode", id="ceil"),
        pytest.param('kernel_shape = [2,2], auto_pad = "SAME_UPPER"', "m = Relu (c)", "auto_pad", id="auto_pad"),
        pytest.param("kernel_shape = [2,2]", "m = Tanh (c)", "no convolution computes its input", id="float input"),
        pytest.param("kernel_shape = [2,2]", "m = Relu (x)", "no convolution computes its input", id="graph input"),
    ],
)
def test_refusals(pool: str, middle: str, reason: str) -> None:
    report, _ = check_pass(PoolToConv(), parse(net(pool, middle=middle), w=WEIGHT), FEED)
    assert report.rewrites == 0
    assert report.skipped == {reason: 1}


def test_unknown_channels_are_refused() -> None:
    text = "g (float[n,c,h,v] x) => (float[a,b,d,e] y) { y = AveragePool <kernel_shape = [2,2]> (x) }"
    report, _ = check_pass(PoolToConv(), parse(text), FEED)
    assert report.skipped == {"the number of channels is not known": 1}
