from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, ops, parse

from qcompile.passes.patch_to_gemm import PatchToGemm

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(5, 3, 2, 4)).astype(np.float32)
BIAS = RANDOM.normal(size=5).astype(np.float32)
FEED = {"x": RANDOM.normal(size=(2, 3, 6, 8)).astype(np.float32)}


def net(
    conv: str = "strides = [2,4]", inputs: str = "x, w, b", tail: str = "y = Transpose <perm = [0,2,1]> (f)", size: str = "6,8"
) -> str:
    return f"""g (float[N,3,{size}] x) => (float[a,b,d] y) <int64[3] s = {{0, 5, -1}}> {{
        c = Conv <{conv}> ({inputs})
        f = Reshape (c, s)
        {tail}
    }}"""


@pytest.mark.parametrize("inputs", [pytest.param("x, w, b", id="bias"), pytest.param("x, w", id="no bias")])
def test_a_patch_embedding_becomes_a_product(inputs: str) -> None:
    constants = {"w": WEIGHT, "b": BIAS} if "b" in inputs else {"w": WEIGHT}
    report, graph = check_pass(PatchToGemm(), parse(net(inputs=inputs), **constants), FEED)
    assert report.rewrites == 1
    assert ops(graph) == {"Reshape": 3, "Transpose": 1, "Gemm": 1}


@pytest.mark.parametrize(
    ("conv", "size", "reason"),
    [
        pytest.param("strides = [1,4]", "6,8", "kernel and stride differ", id="stride"),
        pytest.param("strides = [2,4], pads = [1,0,1,0]", "6,8", "padding", id="padding"),
        pytest.param("strides = [2,4], dilations = [2,1]", "6,8", "groups or dilation", id="dilation"),
        pytest.param("strides = [2,4]", "h,v", "the picture's size is not known", id="dynamic"),
    ],
)
def test_refusals(conv: str, size: str, reason: str) -> None:
    report, _ = check_pass(PatchToGemm(), parse(net(conv, size=size), w=WEIGHT, b=BIAS), FEED)
    assert report.skipped == {reason: 1}


def test_a_remainder_is_refused() -> None:
    feed = {"x": RANDOM.normal(size=(2, 3, 7, 8)).astype(np.float32)}
    report, _ = check_pass(PatchToGemm(), parse(net(size="7,8"), w=WEIGHT, b=BIAS), feed)
    assert report.skipped == {"the kernel does not divide the picture": 1}


def test_another_reader_is_left_alone() -> None:
    text = net(tail="t = Transpose <perm = [0,2,1]> (f) y = Concat <axis = 2> (t, t) z = Relu (c)").replace(
        "y) <", "y, float[a,e,g,h] z) <"
    )
    report, graph = check_pass(PatchToGemm(), parse(text, w=WEIGHT, b=BIAS), FEED)
    assert report.rewrites == 0
    assert ops(graph)["Conv"] == 1
