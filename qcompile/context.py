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

FLOAT_BITS = 32  # in `Settings.raised`: the layer stays float


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
class Settings:
    """Options of one compilation; every field changes the output and stands in the report.

    format: qdq | qoperator | integer; target: any | vnni | arm | tensorrt; ranges: mse | minmax | percentile;
    effort: fast | default | best.
    exclude: node names or shell patterns that stay float. raised: (node, bits) of layers that a limit on the result needs to have
    more bits than the others, `FLOAT_BITS` for float. weight_only: set where activations stay float.
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
    inline: bool = False
    io: str = "float"
    kernels: str = "table"

    @property
    def integer_kernels(self) -> bool:
        """Whether GELU, Softmax, LayerNormalization and what joins them are computed in integers too."""
        return self.format in ("qoperator", "integer")

    @property
    def weight_top(self) -> int:
        """The largest magnitude of an integer weight where nothing is raised: 127, or 7 for 4 bits."""
        return int(2 ** (self.bits - 1) - 1)

    def bits_for(self, name: str) -> int:
        """The width of node `name`'s weights."""
        return dict(self.raised).get(name, self.bits)

    def top_for(self, name: str) -> int:
        """The largest magnitude of an integer weight of node `name`."""
        return int(2 ** (self.bits_for(name) - 1) - 1)

    def excluded(self, name: str) -> bool:
        """Whether node `name` is to stay float."""
        patterns = any(name == pattern or fnmatchcase(name, pattern) for pattern in self.exclude)
        return patterns or self.bits_for(name) == FLOAT_BITS


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

    @property
    def measures(self) -> bool:
        """Whether passes may decide by errors measured on `samples`: real data, and more effort than `fast`."""
        return bool(self.samples) and not self.synthetic and self.settings.effort != "fast"

    @property
    def activations(self) -> ActivationType:
        """The integer type of activations for the target."""
        return ACTIVATIONS[self.settings.target]
