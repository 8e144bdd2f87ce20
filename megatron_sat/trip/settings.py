"""How a trip is made: what is added to the vocabulary, how long and how it is trained, how much is evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

_LADDER = ("sat_schedule", "sat_omission_rate", "sat_rungs", "sat_schedule_start")
"""What omission_rate, sparse_share and rungs say."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What belongs to the trip and not to a training run; that is in pretrain_sat.py's own file of settings."""

    steps: int
    """Updates of SAT and of the dense reference, at least 3. The control's follow from SAT's time."""
    add: int
    """New pieces of the vocabulary, at least 1."""
    seq_length: int
    """Tokens of a sample, and of a window of the evaluation."""
    ranks: int = 1
    """Processes of a training run."""
    tensor_parallel: int = 1
    """TP size; rows of the vocabulary are padded for it."""
    resumable: bool = False
    """Whether training saves whole checkpoints on its way, so that an interrupted run goes on from the last one."""
    character_coverage: float = 0.998
    """Part of the new language's text whose characters get a piece."""
    loss_characters: int = 4000
    """Held-out text on which the extended model is measured before training."""
    max_loss_increase: float = 1.2
    """Nats a character that extending may cost before training."""
    replay_share: float = 0.2
    """Part of the training samples in the language that must not be forgotten, in (0, 1)."""
    omission_rate: str = "0.5"
    """Of SAT's first stretch; exact, as text."""
    sparse_share: str = "2/3"
    """Part of the steps before the ladder begins, in (0, 1); exact, as text."""
    rungs: int = 5
    """Of the ladder."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """SAT's further settings by key (sat_importance, ...), as pretrain_sat.py knows them."""
    max_characters: int = 100_000
    """Of each domain that evaluations read."""
    evaluation_stride: int | None = None
    """Tokens from one window to the next; None: half of seq_length."""
    evaluation_dtype: str = "fp32"
    """fp32 or bf16."""
    evaluation_batch: int = 8
    """Windows at once."""

    def __post_init__(self) -> None:
        if self.steps < 3:
            raise ValueError(f"steps must be at least 3, so that a ladder has room, got {self.steps}; set --steps")
        if self.add < 1:
            raise ValueError(f"add must be at least 1, got {self.add}; the paper adds 33000: set --add")
        if not 0 < self.replay_share < 1:
            raise ValueError(f"replay_share must be in (0, 1), got {self.replay_share}; a fifth is 0.2")
        if not 0 < Fraction(self.sparse_share) < 1:
            raise ValueError(f"sparse_share must be in (0, 1), got {self.sparse_share}; the paper's is 2/3")
        for key in self.method:
            if not key.startswith("sat_") or key in _LADDER:
                raise ValueError(f"method must hold sat_* settings other than {', '.join(_LADDER)}, got {key}")
        if self.ranks < 1 or self.ranks % self.tensor_parallel:
            raise ValueError(
                f"ranks ({self.ranks}) must be a multiple of the TP size ({self.tensor_parallel}); set --nproc"
            )

    @property
    def schedule(self) -> tuple[str, ...]:
        """SAT's flags."""
        start = max(1, int(self.steps * Fraction(self.sparse_share)))
        ladder = ("--sat-schedule", "ladder", "--sat-omission-rate", self.omission_rate)
        more = [word for key, value in self.method.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        return (*ladder, "--sat-rungs", str(self.rungs), *more, "--sat-schedule-start", str(start))


def settings_from(given: Mapping[str, Any]) -> Settings:
    """Settings by name, as a file gives them. Raises ValueError for a name that is none, and one that is missing."""
    known = {each.name: each.type for each in fields(Settings)}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"trip: {', '.join(unknown)} must be a setting; there are {', '.join(known)}")
    texts = {name: str(value) for name, value in given.items() if known[name] is str}
    try:
        return Settings(**{**given, **texts})
    except TypeError as error:
        raise ValueError(f"trip: every setting without a default must be given, as it is meant: {error}") from error
