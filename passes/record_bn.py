"""Remember what BatchNormalizations say about the training data, before `fold_bn` folds them away. The graph is not changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.bn_statistics import batch_norm_records
from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class RecordBatchNorm:
    """Fills `context.batch_norms`; only where no calibration data are given."""

    name: str = "record_bn"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """No rewrites."""
        if context.synthetic and not context.batch_norms:
            context.batch_norms = batch_norm_records(graph)
        return Report()
