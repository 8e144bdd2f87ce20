"""Which steps cannot be trusted: a loss or gradient that is no number, and, where asked for, one far above its like.

Pure bookkeeping on figures that all ranks share. What is done about a bad step is `response`'s. The yardstick of a leap
is the median of the last good steps, which goes through the checkpoints: a resumed run judges as the uninterrupted one.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from statistics import median
from typing import Any

from megatron_sat.engines.base import StepResult

WINDOW = 64
"""Good steps that the yardstick is made of, the latest."""
ENOUGH = 16
"""Good steps before a leap is told from the unrest of a beginning."""
POLICIES = ("stop", "skip", "rollback")


class Finding(IntEnum):
    """What is wrong with a step; of several ranks' findings the highest counts."""

    NONE = 0
    LOSS_LEAPT = 1
    NORM_LEAPT = 2
    NORM_NOT_FINITE = 3
    LOSS_NOT_FINITE = 4


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What counts as a bad step, and what follows. Field names are the flags."""

    on_bad_step: str = "stop"
    """One of POLICIES."""
    max_bad_steps: int = 10
    """Bad steps that skip and rollback pass over in the whole run, at least 0; one more stops it."""
    max_loss_leap: float | None = None
    """A loss above this multiple of the recent median is bad, > 1; None: only one that is no number."""
    max_norm_leap: float | None = None
    """The same of the gradient's norm before clipping."""

    def __post_init__(self) -> None:
        if self.on_bad_step not in POLICIES:
            raise ValueError(f"--on-bad-step must be one of {', '.join(POLICIES)}, got {self.on_bad_step}")
        if self.max_bad_steps < 0:
            raise ValueError(f"--max-bad-steps must be at least 0, got {self.max_bad_steps}; leave it out")
        for name in ("max_loss_leap", "max_norm_leap"):
            leap = getattr(self, name)
            if leap is not None and not 1.0 < leap < math.inf:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be a number above 1, got {leap}; twice the usual is {flag} 2")


class Guard:
    """Judges step after step."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.bad_steps = 0
        """So far, in the whole run."""
        self.suspicious = False
        """Whether the last step was bad: no good one has yet shown that the weights are sound."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._asked: Finding | None = None

    def permits(self, loss: float, norm: float | None) -> bool:
        """An engine's question before it updates (`engines.veto.Verdict`)."""
        self._asked = self.judge(loss, norm)
        return self._asked is Finding.NONE

    def found(self, result: StepResult) -> Finding:
        """What this rank found in the step that ended so, whether or not the engine asked before."""
        asked, self._asked = self._asked, None
        if asked is not None:
            return asked
        return self.judge(result.loss, None if result.skipped else result.grad_norm)  # overflow of fp16 is no fault

    def judge(self, loss: float, norm: float | None) -> Finding:
        """The worst of these figures. norm: None where it is not known."""
        if not math.isfinite(loss):
            return Finding.LOSS_NOT_FINITE
        if norm is not None and not math.isfinite(norm):
            return Finding.NORM_NOT_FINITE
        if norm is not None and self._leapt(norm, before=self._norms, limit=self.config.max_norm_leap):
            return Finding.NORM_LEAPT
        if self._leapt(loss, before=self._losses, limit=self.config.max_loss_leap):
            return Finding.LOSS_LEAPT
        return Finding.NONE

    def _leapt(self, value: float, *, before: deque[float], limit: float | None) -> bool:
        return limit is not None and len(before) >= ENOUGH and value > limit * median(before)

    def enter(self, finding: Finding, *, result: StepResult) -> None:
        """Book the step, with the finding that all ranks agreed on."""
        self.suspicious = finding is not Finding.NONE
        if self.suspicious:
            self.bad_steps += 1
        elif not result.skipped:
            self._losses.append(result.loss)
            self._norms.append(result.grad_norm)

    @property
    def gives_up(self) -> bool:
        """Whether the bad step just entered ends the run."""
        return self.config.on_bad_step == "stop" or self.bad_steps > self.config.max_bad_steps

    def explain(self, finding: Finding, *, loss: float) -> str:
        """The finding in words."""
        usual, leap = self.config.max_loss_leap, self.config.max_norm_leap
        return {
            Finding.NONE: "nothing is wrong",
            Finding.LOSS_NOT_FINITE: f"the loss is {loss}",
            Finding.NORM_NOT_FINITE: f"the gradient's norm is not a number, at a loss of {loss:.4f}",
            Finding.LOSS_LEAPT: f"the loss of {loss:.4f} is above {usual} times the recent median"
            + (f", {median(self._losses):.4f}" if self._losses else ""),
            Finding.NORM_LEAPT: f"the gradient's norm is above {leap} times the recent median"
            + (f", {median(self._norms):.4f}" if self._norms else ""),
        }[finding]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"bad_steps": self.bad_steps, "losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave; nothing of it is required (older checkpoints)."""
        self.bad_steps = int(state.get("bad_steps", 0))
        self._losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self._norms = deque(state.get("norms", ()), maxlen=WINDOW)
