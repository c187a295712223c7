"""Limits on the result that a user asks for (`--max-drop`, `--min-agreement`): do they hold, and what is the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qcompile.accuracy import Accuracy
from qcompile.agreement import judge_agreement
from qcompile.check import judge
from qcompile.errors import DataError


@dataclass(frozen=True)
class Limits:
    """max_drop: percentage points of accuracy; min_agreement: share of samples that keep their class. None: no limit.

    max_requant_loss: of an imported Q/DQ model, the least SQNR of the result against it in dB. It raises no layer.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    max_requant_loss: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is a limit that layers are raised to hold."""
        return self.max_drop is not None or self.min_agreement is not None

    def __str__(self) -> str:
        drop = [] if self.max_drop is None else [f"--max-drop {self.max_drop:g}"]
        agreement = [] if self.min_agreement is None else [f"--min-agreement {self.min_agreement:g}"]
        return " ".join([*drop, *agreement])

    def holds(self, accuracy: Accuracy, spare: float = 0.0) -> bool:
        """Whether the measured numbers are within the limits with `spare` standard errors left: for choices, not a verdict.

        The standard error of an agreement is that of a share at the limit, that of a drop McNemar's, from lost and won samples.
        Raises DataError where the samples or the model's outputs do not tell.
        """
        drop, agreement = accuracy.drop_points, accuracy.top1_agreement
        if self.max_drop is not None and drop is None:
            raise DataError("--max-drop compares with the true answers; give --eval data with labels")
        if self.min_agreement is not None and agreement is None:
            raise DataError("--min-agreement compares classes, and no output of this model looks like classes; use --max-drop")
        samples = accuracy.samples
        if self.max_drop is not None and drop is not None:
            lost, won = accuracy.lost or 0, accuracy.won or 0
            error = 100 * math.sqrt(max(0.0, lost + won - (lost - won) ** 2 / samples)) / samples
            if drop + spare * error > self.max_drop:
                return False
        if self.min_agreement is not None and agreement is not None:
            error = math.sqrt(self.min_agreement * (1 - self.min_agreement) / samples)
            return agreement - spare * error >= self.min_agreement
        return True

    def verdicts(self, accuracy: Accuracy) -> tuple[dict[str, Any], str | None]:
        """The report's `verdict` and `agreement_verdict`, and the reason of the first that failed (None: none did)."""
        self.holds(accuracy)
        found: dict[str, Any] = {}
        broken = None
        if self.min_agreement is not None:
            agreed = round((accuracy.top1_agreement or 0.0) * accuracy.samples)
            agreement = judge_agreement(agreed, accuracy.samples, self.min_agreement, identical=accuracy.identical)
            found["agreement_verdict"] = agreement.as_json()
            broken = f"--min-agreement {self.min_agreement:g}: {agreement.reason}" if agreement.outcome == "fail" else None
        if self.max_drop is not None:
            verdict = judge(accuracy, self.max_drop)
            found["verdict"] = verdict.as_json()
            broken = f"--max-drop {self.max_drop:g}: {verdict.reason}" if verdict.outcome == "fail" else broken
        return found, broken

    def requant_loss(self, accuracy: Accuracy | None) -> str | None:
        """Why `max_requant_loss` is broken, None where it holds or was not asked for; no difference at all always holds."""
        least = self.max_requant_loss
        if least is None or accuracy is None or accuracy.sqnr_db is None or accuracy.sqnr_db >= least:
            return None
        return f"--max-requant-loss {least:g}: {accuracy.sqnr_db:.2f} dB against the imported model on {accuracy.samples} samples"
