"""What passes know besides the graph: the settings, and what was measured so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qcompile.bn_statistics import BatchNormRecord
from qcompile.graph import Graph
from qcompile.imported import Imported
from qcompile.plan import Plan
from qcompile.qparams import ACTIVATIONS, ActivationType
from qcompile.ranges import Observer
from qcompile.runtime import Array, Feeds
from qcompile.sparsity import SparseRecord

FLOAT_BITS = 32  # in `Settings.raised`: the layer stays float
WIDTHS = (2, 3, 4, 5, 6, 8)  # of integer weights, each within +-(2^(bits-1) - 1)


@dataclass(frozen=True)
class WeightOnly:
    """How weights of 4 bits are stored where activations stay float.

    block: weights that share a scale; spelling: matmulnbits | portable. accuracy_level: of MatMulNBits, 0 (float32) to 4 (the
    kernel rounds its float input to 8 bits block by block); None where no such node is written.
    """

    block: int = 32
    symmetric: bool = False
    spelling: str = "matmulnbits"
    accuracy_level: int | None = 4

    def stored_bytes(self, rows: int, width: int) -> int:
        """Bytes of a weight [rows, width] in blocks: integers, float32 scales and zero points."""
        blocks = -(-width // self.block)
        zero_points = 0 if self.symmetric else -(-blocks // 2)
        return rows * (blocks * (self.block // 2 + 4) + zero_points)


@dataclass(frozen=True)
class ChannelPruning:
    """How channels are removed.

    ratio: the share of the budget that goes; budget: params | macs | latency; criterion: l1 | hrank | hessian | second-order;
    multiple: kept widths are multiples of it; keep: names or patterns of layers that stay; refit: weights are fitted anew;
    implant: the share of the filters that go in whose place a 1x1 filter is fitted.
    """

    ratio: float
    criterion: str = "second-order"
    budget: str = "macs"
    multiple: int = 8
    keep: tuple[str, ...] = ()
    refit: bool = True
    implant: float = 0.0

    @staticmethod
    def keeps(name: str, pattern: str) -> bool:
        """Whether node `name` is one that `pattern` means."""
        return name == pattern or fnmatchcase(name, pattern)


@dataclass(frozen=True)
class PrunedRecord:
    """A layer that lost filters: how many it had, how many it has, and how many more became 1x1 filters."""

    node: str
    op: str
    channels: int
    kept: int
    implanted: int = 0


@dataclass(frozen=True)
class Settings:
    """Options of one compilation; every field changes the output and stands in the report.

    format: qdq | qoperator | integer; target: any | wasm | vnni | arm | tensorrt; ranges: mse | minmax | percentile;
    effort: fast | default | best.
    exclude: node names or shell patterns that stay float. node_bits, node_ranges: (name or pattern, bits) and (name or pattern,
    low, high) that a user gives; the last that matches counts. raised: (node, bits) of layers that a limit on the result needs
    to have more bits than the others, `FLOAT_BITS` for float. assigned: (node, bits) that mixed precision chose; node_bits win.
    weight_only: set where activations stay float. activation_bits: the width of integer activations; node_activations: (pattern,
    bits) of what single nodes read, of a user, or `FLOAT_BITS`; assigned_activations: the same by name, of mixed precision.
    sparsity: `2:4` or a share such as `0.5` of weights that become zero; criterion: magnitude | wanda | obd | obs;
    sparsity_scope: layer | global, what a share is a share of; sparse_storage: compressed | dense, of 2:4 weights.
    pruning: set where channels are removed.
    inline: functions of the integer format are written out. io: float | integer, the type of its inputs and outputs.
    kernels: table | ibert, how integer formats compute GELU and the exponentials of Softmax.
    """

    bits: int = 8
    format: str = "qdq"
    target: str = "any"
    ranges: str = "mse"
    effort: str = "default"
    exclude: tuple[str, ...] = ()
    bias_correction: bool = True
    inputs_as: str = "float32"
    opset: int | None = None
    seed: int = 0
    weight_only: WeightOnly | None = None
    raised: tuple[tuple[str, int], ...] = ()
    assigned: tuple[tuple[str, int], ...] = ()
    node_bits: tuple[tuple[str, int], ...] = ()
    node_ranges: tuple[tuple[str, float, float], ...] = ()
    inline: bool = False
    io: str = "float"
    sparsity: str | None = None
    criterion: str = "obs"
    sparsity_scope: str = "layer"
    sparse_storage: str = "compressed"
    pruning: ChannelPruning | None = None
    kernels: str = "table"
    activation_bits: int = 8
    node_activations: tuple[tuple[str, int], ...] = ()
    assigned_activations: tuple[tuple[str, int], ...] = ()

    @property
    def pair_rule(self) -> bool:
        """Whether neighbouring weights must not saturate an int16, so that every machine gives the same bits."""
        return self.target in ("any", "wasm")

    @property
    def integer_kernels(self) -> bool:
        """Whether GELU, Softmax, LayerNormalization and what joins them are computed in integers too."""
        return self.format in ("qoperator", "integer")

    @property
    def blocked(self) -> bool:
        """Whether weights are N:M: their input channels must stay in the order in which they were chosen."""
        return self.sparsity is not None and ":" in self.sparsity

    @property
    def weight_top(self) -> int:
        """The largest magnitude of an integer weight where nothing is raised: 127; 7 for 4 bits, 1 for 2."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def widths(self) -> frozenset[int]:
        """All widths of weights that are asked for."""
        return frozenset({self.bits, *(bits for _, bits in (*self.node_bits, *self.assigned))})

    def bits_for(self, name: str) -> int:
        """The width of node `name`'s weights."""
        asked = [bits for pattern, bits in self.node_bits if matches(name, pattern)]
        return dict(self.raised).get(name, asked[-1] if asked else dict(self.assigned).get(name, self.bits))

    def pinned(self, name: str) -> int | None:
        """The width that a user gives node `name`; None where none does."""
        return next((bits for pattern, bits in reversed(self.node_bits) if matches(name, pattern)), None)

    def pinned_activations(self, name: str) -> int | None:
        """The width that a user gives what node `name` reads; None where none does."""
        return next((bits for pattern, bits in reversed(self.node_activations) if matches(name, pattern)), None)

    @property
    def narrow_activations(self) -> bool:
        """Whether activations of fewer than 8 bits are asked for anywhere."""
        return self.least_activations < 8

    @property
    def least_activations(self) -> int:
        """The least width of integer activations that is asked for."""
        return min(self.activation_bits, *(bits for _, bits in (*self.node_activations, *self.assigned_activations)), 8)

    def activations_for(self, name: str) -> int | None:
        """The width that is asked for what node `name` reads: 8 where a limit needs it raised; None where nothing is asked."""
        if dict(self.raised).get(name) == 8:
            return 8
        asked = self.pinned_activations(name)
        return asked if asked is not None else dict(self.assigned_activations).get(name)

    def range_for(self, name: str) -> tuple[float, float] | None:
        """(low, high) that is asked for the output of node `name`, or for the graph input of that name; None: none is."""
        asked = [(low, high) for pattern, low, high in self.node_ranges if matches(name, pattern)]
        return asked[-1] if asked else None

    def top_for(self, name: str) -> int:
        """The largest magnitude of an integer weight of node `name`."""
        return int(2 ** (self.bits_for(name) - 1) - 1)

    def names_float(self, pattern: str) -> bool:
        """Whether `pattern` names a node that a limit on accuracy, or mixed precision, leaves in float."""
        chosen = {name for name, _ in (*self.raised, *self.assigned)}
        return any(matches(name, pattern) and self.bits_for(name) == FLOAT_BITS for name in chosen)

    def excluded(self, name: str) -> bool:
        """Whether node `name` is to compute in float."""
        patterns = any(matches(name, pattern) for pattern in self.exclude)
        return patterns or (self.bits != FLOAT_BITS and self.bits_for(name) == FLOAT_BITS) or self.stores(name)

    def why_float(self, name: str) -> str | None:
        """Why node `name` computes in float, as reports say it; None where it need not."""
        if not self.excluded(name):
            return None
        if self.stores(name):
            return "its activations stay float: only its weights are integers"
        chosen = any(matches(name, pattern) for pattern in self.exclude)
        return "excluded by --exclude" if chosen else "raised to float to hold the limit"

    def stores(self, name: str) -> bool:
        """Whether node `name` multiplies float activations by weights that are stored as integers."""
        asked = self.stores_any and self.activations_for(name) == FLOAT_BITS and self.bits_for(name) != FLOAT_BITS
        return asked and not any(matches(name, pattern) for pattern in self.exclude)

    @property
    def stores_any(self) -> bool:
        """Whether any node is asked to."""
        return any(bits == FLOAT_BITS for _, bits in (*self.node_activations, *self.assigned_activations))


def matches(name: str, pattern: str) -> bool:
    """Whether node `name` is named by `pattern`, a name or a shell pattern."""
    return name == pattern or fnmatchcase(name, pattern)


@dataclass
class Context:
    """State of one compilation, handed from pass to pass.

    observers: calibration statistics by tensor name. float_graph: the canonical float model, kept before quantising.
    plan: what was decided, from `quantise` on. imported: what a source that already holds Q/DQ said. calibration: starts a fresh
    sweep over the calibration feeds; calibrated: how many the last sweep saw. synthetic: whether they are made up;
    batch_norms: what the model itself then says about its
    tensors. progress: called with a stage's name as work goes on.
    samples: a bounded list of calibration feeds (axis 0 the batch) that promise checks and the walk use.
    ranges: (low, high) of each scale class by what decided it; of use to the next compilation of the same model.
    paired: whether channels were put in the order that the pair rule likes (a search that starts anew might move them again).
    diagnose: whether each layer's part in the error is to be measured (it changes no byte of the output).
    """

    settings: Settings = field(default_factory=Settings)
    samples: list[dict[str, Array]] = field(default_factory=list)
    observers: dict[str, Observer] = field(default_factory=dict)
    float_graph: Graph | None = None
    plan: Plan | None = None
    imported: Imported | None = None
    calibration: Callable[[], Iterable[Feeds]] = tuple
    calibrated: int = 0
    synthetic: bool = False
    ranges: dict[object, list[tuple[float, float]]] = field(default_factory=dict)
    paired: bool = False
    diagnose: bool = False
    batch_norms: list[BatchNormRecord] = field(default_factory=list)
    progress: Callable[[str], None] | None = None
    sparse: list[SparseRecord] | None = None  # what became sparse, once that was decided
    pruned: list[PrunedRecord] | None = None  # what lost channels

    @property
    def measures(self) -> bool:
        """Whether passes may decide by errors measured on `samples`: real data, and more effort than `fast`."""
        return bool(self.samples) and not self.synthetic and self.settings.effort != "fast"

    @property
    def activations(self) -> ActivationType:
        """The integer type of activations for the target."""
        return ACTIVATIONS[self.settings.target]
