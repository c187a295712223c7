"""What passes know besides the graph: the settings, and what was measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qcompile.runtime import Array


@dataclass(frozen=True)
class Settings:
    """Options of one compilation; every field changes the output and stands in the report.

    format: qdq | qoperator; target: any | vnni | arm | tensorrt; ranges: mse | minmax | percentile; effort: fast | default.
    exclude: node names or shell patterns that stay float.
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

    def excluded(self, name: str) -> bool:
        """Whether node `name` is to stay float."""
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in self.exclude)


@dataclass
class Context:
    """State of one compilation, handed from pass to pass.

    samples: a bounded list of calibration feeds (axis 0 the batch) that promise checks and the walk use.
    """

    settings: Settings = field(default_factory=Settings)
    samples: list[dict[str, Array]] = field(default_factory=list)
