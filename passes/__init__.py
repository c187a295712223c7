"""Graph passes: one file each; the registry is `PASSES`, in the order in which they run."""

from __future__ import annotations

from qcompile.passes.calibrate import Calibrate
from qcompile.passes.cancel_qdq import CancelQdq
from qcompile.passes.compress_sparse import CompressSparse
from qcompile.passes.correct_means import CorrectMeans
from qcompile.passes.diagnose import Diagnose
from qcompile.passes.dyadic_scales import DyadicScales
from qcompile.passes.eliminate import Eliminate
from qcompile.passes.equalise import Equalise
from qcompile.passes.expect_ranges import ExpectRanges
from qcompile.passes.fold_bn import FoldBatchNorm
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.fold_width import FoldWidth
from qcompile.passes.fuse_activation import FuseActivation
from qcompile.passes.fuse_gelu import FuseGelu
from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.import_qdq import ImportQdq
from qcompile.passes.integer_bias import IntegerBias
from qcompile.passes.integer_head import IntegerHead
from qcompile.passes.level_functions import LevelFunctions
from qcompile.passes.linear_form import LinearForm
from qcompile.passes.lower_integer import LowerInteger
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.passes.lower_wide import LowerWide
from qcompile.passes.pack_bits import PackBits
from qcompile.passes.pack_int4 import PackInt4
from qcompile.passes.pad_channels import PadChannels
from qcompile.passes.pair_channels import PairChannels
from qcompile.passes.patch_to_gemm import PatchToGemm
from qcompile.passes.pool_to_conv import PoolToConv
from qcompile.passes.prune_channels import PruneChannels
from qcompile.passes.quantise import Quantise
from qcompile.passes.quantise_dynamic import QuantiseDynamic
from qcompile.passes.quantise_embeddings import QuantiseEmbeddings
from qcompile.passes.quantise_imported import QuantiseImported
from qcompile.passes.record_bn import RecordBatchNorm
from qcompile.passes.refine_layers import RefineLayers
from qcompile.passes.round_imported import RoundImported
from qcompile.passes.round_weights import RoundWeights
from qcompile.passes.search_ranges import SearchRanges
from qcompile.passes.simplify_shapes import SimplifyShapes
from qcompile.passes.sink_reshapes import SinkReshapes
from qcompile.passes.smooth import Smooth
from qcompile.passes.sparsify import Sparsify
from qcompile.passes.split_heads import SplitHeads
from qcompile.passes.store_weights import StoreWeights
from qcompile.passes.sum_residuals import SumResiduals
from qcompile.passes.sum_to_add import SumToAdd
from qcompile.passes.transpose_first import TransposeFirst
from qcompile.passes.weight_only import WeightOnlyInt4
from qcompile.passes.wide_units import WideUnits
from qcompile.rewrite import Pass

PASSES: tuple[Pass, ...] = (
    FoldConstants(),
    SumToAdd(),
    SimplifyShapes(),
    Eliminate(),
    FuseLayerNorm(),
    FuseGelu(),
    FuseActivation(),
    FuseLinear(),
    RecordBatchNorm(),
    FoldBatchNorm(),
    FuseLinear(),
    PruneChannels(),
    PatchToGemm(),
    LinearForm(),
    SinkReshapes(),
    Eliminate(),
    PoolToConv(),
    SplitHeads(),
    TransposeFirst(),
    PadChannels(dense=False),  # before the layer that makes the channels is folded
    FoldWidth(),
    Eliminate(),
    PadChannels(),
    Sparsify(),
    Calibrate(),
    ExpectRanges(),
    Equalise(),
    Smooth(),
    LevelFunctions(),
    PairChannels(),
    Quantise(),
    QuantiseEmbeddings(),
    SearchRanges(),
    DyadicScales(),
    WideUnits(),
    StoreWeights(),
    RoundWeights(),
    IntegerBias(),
    RefineLayers(),
    CorrectMeans(),
    Diagnose(),
    SumResiduals(),
    LowerWide(),
    LowerQOperator(),
    IntegerHead(),
    LowerInteger(),
    CompressSparse(),
    PackInt4(),
    PackBits(),
)

_NAMED = (FuseLayerNorm, FuseGelu, FuseActivation)
_CANONICAL = (FoldConstants, SumToAdd, SimplifyShapes, Eliminate, *_NAMED, FuseLinear, FoldBatchNorm, PruneChannels)
_DYNAMIC: tuple[Pass, ...] = (
    *(p for p in PASSES if isinstance(p, _CANONICAL)),
    Sparsify(),
    QuantiseDynamic(),
    QuantiseEmbeddings(),
    SumResiduals(),
    CompressSparse(),
    PackInt4(),
    PackBits(),
)
_WEIGHT_ONLY: tuple[Pass, ...] = (*(p for p in PASSES if isinstance(p, _CANONICAL)), Sparsify(), WeightOnlyInt4())
_FLOAT: tuple[Pass, ...] = (*(p for p in PASSES if isinstance(p, _CANONICAL)), Sparsify(), CompressSparse())
_IMPORTED: tuple[Pass, ...] = (
    FoldConstants(),
    ImportQdq(),
    *(p for p in PASSES if isinstance(p, _CANONICAL) and not isinstance(p, PruneChannels)),
    LinearForm(),
    SinkReshapes(),
    Eliminate(),
    PoolToConv(),
    QuantiseImported(),
    QuantiseEmbeddings(),
    DyadicScales(),
    WideUnits(),
    RoundImported(),
    RoundWeights(),  # what a pass made: averages as convolutions
    IntegerBias(),
    CorrectMeans(),
    CancelQdq(),
    Diagnose(),
    SumResiduals(),
    LowerWide(),
    LowerQOperator(),
    IntegerHead(),
    LowerInteger(),
    PackInt4(),
    PackBits(),
)
_WITHOUT_DATA = (RecordBatchNorm, ExpectRanges, CorrectMeans)
_WITH_DATA = (SearchRanges, RefineLayers)


def passes_for(data: str = "real") -> tuple[Pass, ...]:
    """The passes that a compilation runs, in order; `data`: real | synthetic | dynamic (none needed) | weight_only | float |
    imported (none needed: the source holds the scales).

    weight_only and float (`--bits 32`: nothing is quantised) run with any data.
    """
    if data == "float":
        return _FLOAT
    if data == "weight_only":
        return _WEIGHT_ONLY
    if data == "imported":
        return _IMPORTED
    if data == "dynamic":
        return _DYNAMIC
    idle = _WITHOUT_DATA if data == "real" else _WITH_DATA
    return tuple(p for p in PASSES if not isinstance(p, idle))
