"""Graph passes: one file each; the registry is `PASSES`, in the order in which they run."""

from __future__ import annotations

from qcompile.context import Settings
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.dyadic_scales import DyadicScales
from qcompile.passes.eliminate import Eliminate
from qcompile.passes.fold_bn import FoldBatchNorm
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.integer_bias import IntegerBias
from qcompile.passes.linear_form import LinearForm
from qcompile.passes.quantise import Quantise
from qcompile.passes.refine_layers import RefineLayers
from qcompile.passes.round_weights import RoundWeights
from qcompile.passes.search_ranges import SearchRanges
from qcompile.passes.simplify_shapes import SimplifyShapes
from qcompile.passes.sink_reshapes import SinkReshapes
from qcompile.rewrite import Pass

PASSES: tuple[Pass, ...] = (
    FoldConstants(),
    SimplifyShapes(),
    Eliminate(),
    FuseLinear(),
    FoldBatchNorm(),
    LinearForm(),
    SinkReshapes(),
    Eliminate(),
    Calibrate(),
    Quantise(),
    SearchRanges(),
    DyadicScales(),
    RoundWeights(),
    IntegerBias(),
    RefineLayers(),
)


def passes_for(settings: Settings) -> tuple[Pass, ...]:
    """The passes that a compilation with `settings` runs, in order."""
    return PASSES
