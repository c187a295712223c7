"""Integer kernels: one file each, a numpy reference beside its ONNX lowering; the registry is `KERNELS`, one line a kernel."""

from __future__ import annotations

from qcompile.kernels._protocol import Kernel
from qcompile.kernels.channel_table import ChannelTable
from qcompile.kernels.idivide import IDivide
from qcompile.kernels.iexp_levels import IExpLevels
from qcompile.kernels.igelu import IGelu
from qcompile.kernels.ilayernorm import ILayerNorm, IRmsNorm
from qcompile.kernels.inormalise import INormalise
from qcompile.kernels.isoftmax import IExp, ISoftmax
from qcompile.kernels.isqrt import ISqrt
from qcompile.kernels.ratio import RatioRescale
from qcompile.kernels.rescale import DyadicRescale, FusedRescale
from qcompile.kernels.table import Table
from qcompile.kernels.table_exp import TableExp

KERNELS: tuple[type[Kernel], ...] = (
    ChannelTable,
    DyadicRescale,
    FusedRescale,
    IDivide,
    IExp,
    IExpLevels,
    IGelu,
    ILayerNorm,
    INormalise,
    IRmsNorm,
    ISoftmax,
    ISqrt,
    RatioRescale,
    Table,
    TableExp,
)
