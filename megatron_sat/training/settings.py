"""What a run is told besides model, data and learning rate: how long, when to pause, where things go."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How far the run goes and when it pauses. Field names are Megatron-LM's flags; steps are updates."""

    train_iters: int
    """Updates of the whole run, at least 1."""
    micro_batch_size: int
    """Samples of one forward on one replica, at least 1."""
    global_batch_size: int
    """Samples of one update, a multiple of micro_batch_size times the replicas."""
    num_micro_batches: int
    """Micro-batches of one replica in one update: global_batch_size over micro_batch_size times replicas."""
    eval_interval: int | None = None
    """Updates between evaluations, at least 1; None: none on the way."""
    eval_iters: int = 100
    """Global batches of one evaluation, at least 0."""
    exit_interval: int | None = None
    """End the process after an update that this divides; None: never."""
    exit_duration_in_mins: int | None = None
    """End the process after the update in which this has passed; None: never."""
    exit_signal_handler: bool = False
    """Save and end at a signal, after the step under way."""
    exit_signal: str = "SIGTERM"
    """Name of that signal."""
    requeue_exit_code: int = 75
    """Code that the process then ends with, in [6, 125]; 75 is the system's word for "try again later"."""
    seed: int = 1234
    """Of weights and dropout, above 0."""
    train_only: str = "all"
    """all; new-embeddings: the rows of the vocabulary from train_only_first_id on."""
    train_only_first_id: int | None = None
    """First new token, at least 1; None: what vocabulary_extension.json beside the tokenizer says."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size", "num_micro_batches"):
            _at_least(1, name=name, value=getattr(self, name))
        for name in ("eval_interval", "exit_interval", "exit_duration_in_mins"):
            _at_least(1, name=name, value=getattr(self, name))
        _at_least(0, name="eval_iters", value=self.eval_iters)
        if not 6 <= self.requeue_exit_code <= 125:
            raise ValueError(
                f"--requeue-exit-code must be in [6, 125], which mean nothing else, got {self.requeue_exit_code}; "
                "leave it out for 75"
            )
        _at_least(1, name="seed", value=self.seed)
        _at_least(1, name="train_only_first_id", value=self.train_only_first_id)
        if self.global_batch_size % (self.micro_batch_size * self.num_micro_batches):
            raise ValueError(
                f"--global-batch-size ({self.global_batch_size}) must be a multiple of --micro-batch-size x "
                f"micro-batches ({self.micro_batch_size} x {self.num_micro_batches}); change one of them"
            )


    @property
    def listens_to(self) -> signal.Signals | None:
        """The signal that asks for an end; None: none does."""
        return signal.Signals[self.exit_signal] if self.exit_signal_handler else None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints go and come from. Field names are Megatron-LM's flags."""

    save: str | None = None
    """Folder of the checkpoints; None: none are written."""
    save_interval: int | None = None
    """Updates between checkpoints, at least 1; None: at the end alone."""
    async_save: bool = False
    """Write them while training goes on."""
    load: str | None = None
    """Folder to resume from, its newest checkpoint; None, or an empty one: a fresh start."""
    ckpt_step: int | None = None
    """Iteration of the checkpoint to load, at least 0; None: the newest."""
    save_keep_last: int | None = None
    """Checkpoints to leave in save, at least 1; None: all."""
    exit_on_missing_checkpoint: bool = False
    """Refuse a fresh start where load holds no checkpoint."""
    finetune: bool = False
    """Weights alone from load, and start at step 1."""
    save_optim: bool = True
    """Optimizer state into the checkpoint."""
    save_rng: bool = True
    """Random state into the checkpoint."""
    load_optim: bool = True
    """Optimizer state from the checkpoint."""
    load_rng: bool = True
    """Random state from the checkpoint."""
    allow_first_loss_apart: bool = False
    """Train an imported model whose first loss is not the one that Hugging Face's model has."""

    def __post_init__(self) -> None:
        _at_least(1, name="save_interval", value=self.save_interval)
        _at_least(1, name="save_keep_last", value=self.save_keep_last)
        _at_least(0, name="ckpt_step", value=self.ckpt_step)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """How often the run speaks, and where it writes. Field names are the flags."""

    log_interval: int = 100
    """Updates between log lines, at least 1."""
    tensorboard_dir: str | None = None
    """Folder of the TensorBoard files; None: none."""
    log_jsonl: str | None = None
    """File of one JSON object a line; None: none."""

    def __post_init__(self) -> None:
        _at_least(1, name="log_interval", value=self.log_interval)


def _at_least(least: int, *, name: str, value: int | None) -> None:
    if value is not None and value < least:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} must be at least {least}, got {value}; leave it out or raise it")
