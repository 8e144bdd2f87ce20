"""The optimizer and the learning-rate schedule: megatron.core's own, put together so that nothing is set twice.

`LearningRateConfig` carries Megatron-LM's flags of the schedule. Megatron counts the schedule in samples;
here it is said in iterations and multiplied by the global batch, as Megatron-LM does, so that a checkpoint's
schedule means the same to both. Weight decay skips norms and biases only where the scheduler writes it into
the parameter groups: an optimizer without `build_scheduler` decays them too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.log import warn_once

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
_FILLED_IN = (
    "lr",
    "min_lr",
    "weight_decay",
    "fp16",
    "bf16",
    "params_dtype",
    "use_distributed_optimizer",
    "overlap_param_gather",
)


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """The schedule of learning rate and weight decay. Field names are Megatron-LM's flags."""

    lr: float
    """Highest learning rate, > 0."""
    train_iters: int
    """Updates of the whole run, >= 1."""
    global_batch_size: int
    """Samples an update, >= 1."""
    min_lr: float = 0.0
    """Lowest learning rate after the decay, in [0, lr]."""
    lr_decay_style: str = "linear"
    """One of DECAY_STYLES."""
    lr_decay_iters: int | None = None
    """Updates until min_lr is reached; None: train_iters."""
    lr_warmup_iters: int = 0
    """Updates of linear warm-up, < lr_decay_iters."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of lr_decay_iters, in [0, 1); instead of lr_warmup_iters."""
    lr_warmup_init: float = 0.0
    """Rate at which the warm-up starts, in [0, lr]."""
    lr_wsd_decay_style: str = "exponential"
    """Form of the last leg of WSD, one of WSD_STYLES."""
    lr_wsd_decay_iters: int | None = None
    """Updates of the last leg of WSD, in [1, lr_decay_iters]; required by WSD."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices, >= 0; norms and biases have none."""
    start_weight_decay: float | None = None
    """First decay where it grows; None: weight_decay."""
    end_weight_decay: float | None = None
    """Last decay where it grows, >= the first; None: weight_decay."""
    weight_decay_incr_style: str = "constant"
    """constant, linear or cosine growth over train_iters."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resume the checkpoint's schedule replaces this one."""
    override_opt_param_scheduler: bool = False
    """On resume this schedule replaces the checkpoint's, at the place where the run stopped."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{_flag(name)} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise ValueError(f"--lr must be above 0, got {self.lr}")
        for name in ("min_lr", "lr_warmup_init"):
            if not 0.0 <= getattr(self, name) <= self.lr:
                raise ValueError(f"--{_flag(name)} must be in [0, --lr = {self.lr}], got {getattr(self, name)}")
        self._check_styles()
        self._check_lengths()
        self._check_weight_decay()
        if self.use_checkpoint_opt_param_scheduler and self.override_opt_param_scheduler:
            raise ValueError(
                "--use-checkpoint-opt-param-scheduler and --override-opt-param-scheduler exclude each other, "
                "both are set; keep the one whose schedule is to rule"
            )

    def _check_styles(self) -> None:
        for name, allowed in (
            ("lr_decay_style", DECAY_STYLES),
            ("lr_wsd_decay_style", WSD_STYLES),
            ("weight_decay_incr_style", ("constant", "linear", "cosine")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{_flag(name)} must be one of {', '.join(allowed)}, got {getattr(self, name)}")

    def _check_lengths(self) -> None:
        if self.decay_iters < 1:
            raise ValueError(f"--lr-decay-iters must be at least 1, got {self.lr_decay_iters}")
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_iters:
                raise ValueError(
                    f"--lr-warmup-fraction ({self.lr_warmup_fraction}) and --lr-warmup-iters "
                    f"({self.lr_warmup_iters}) exclude each other; leave one out"
                )
            if not 0.0 <= self.lr_warmup_fraction < 1.0:
                raise ValueError(f"--lr-warmup-fraction must be in [0, 1), got {self.lr_warmup_fraction}")
        if not 0 <= self.lr_warmup_iters < self.decay_iters:
            raise ValueError(
                f"--lr-warmup-iters must be in [0, --lr-decay-iters = {self.decay_iters}), got {self.lr_warmup_iters}"
            )
        if self.lr_decay_style != "WSD":
            if self.lr_wsd_decay_iters is not None:
                warn_once(f"--lr-wsd-decay-iters has no effect with --lr-decay-style {self.lr_decay_style}")
        elif self.lr_wsd_decay_iters is None or not 1 <= self.lr_wsd_decay_iters <= self.decay_iters:
            raise ValueError(
                f"--lr-wsd-decay-iters must be in [1, --lr-decay-iters = {self.decay_iters}] with "
                f"--lr-decay-style WSD, got {self.lr_wsd_decay_iters}"
            )

    def _check_weight_decay(self) -> None:
        start, end = self.weight_decays
        if not 0.0 <= start <= end:
            raise ValueError(
                f"weight decay must be >= 0 and must not shrink, got {start} at the start and {end} at the end"
            )
        if self.weight_decay_incr_style == "constant" and start != end:
            raise ValueError(
                "--weight-decay-incr-style constant needs equal --start-weight-decay and "
                f"--end-weight-decay, got {start} and {end}; try --weight-decay-incr-style linear"
            )

    @property
    def decay_iters(self) -> int:
        """Updates until the lowest rate."""
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def weight_decays(self) -> tuple[float, float]:
        """Weight decay at the first and at the last update."""
        start = self.weight_decay if self.start_weight_decay is None else self.start_weight_decay
        return start, self.weight_decay if self.end_weight_decay is None else self.end_weight_decay


def _flag(name: str) -> str:
    return name.replace("_", "-")


def make_optimizer_config(
    learning_rate: LearningRateConfig,
    *,
    model: TransformerConfig,
    ddp: DistributedDataParallelConfig,
    **more: Any,
) -> OptimizerConfig:
    """megatron.core's optimizer configuration, with all that the three other configurations already say filled in.

    more: any other field of OptimizerConfig (clip_grad, adam_beta1, ...). Raises ValueError for a field that
    is filled in here, or that this megatron.core has not.
    """
    known = set(OptimizerConfig.__dataclass_fields__)
    for name in more:
        if name in _FILLED_IN:
            raise ValueError(
                f"{name} of the optimizer follows from the other settings and cannot be given, got {more[name]}"
            )
        if name not in known:
            raise ValueError(f"the optimizer of this megatron.core has no setting {name}, got {more[name]}")
    return OptimizerConfig(
        lr=learning_rate.lr,
        min_lr=learning_rate.min_lr,
        weight_decay=learning_rate.weight_decay,
        fp16=model.fp16,
        bf16=model.bf16,
        params_dtype=model.params_dtype,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
        **more,
    )


def build_optimizer(chunks: Sequence[torch.nn.Module], *, config: OptimizerConfig) -> MegatronOptimizer:
    """megatron.core's optimizer over DDP-wrapped model chunks; collective."""
    optimizer = get_megatron_optimizer(config, list(chunks))
    if torch.cuda.is_available():
        _fuse(optimizer)
    return optimizer


def _fuse(optimizer: MegatronOptimizer) -> None:
    """One kernel for torch's AdamW, which megatron.core makes without (apex' and Transformer Engine's always have)."""
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(wrapper, "optimizer", None)
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False


def build_scheduler(optimizer: MegatronOptimizer, *, config: LearningRateConfig) -> OptimizerParamScheduler:
    """megatron.core's scheduler, advanced in samples. It writes rate and decay into the groups at once."""
    batch = config.global_batch_size
    decay_steps = config.decay_iters * batch
    warmup_steps: float = config.lr_warmup_iters * batch
    if config.lr_warmup_fraction is not None:
        warmup_steps = config.lr_warmup_fraction * decay_steps
    start, end = config.weight_decays
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=config.train_iters * batch,
        wd_incr_style=config.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=config.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=config.override_opt_param_scheduler,
        wsd_decay_steps=None if config.lr_wsd_decay_iters is None else config.lr_wsd_decay_iters * batch,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )


def coming_rate(param_groups: Iterable[Mapping[str, Any]]) -> float:
    """The rate that the next update will use (of the embedding-free group where rates are decoupled)."""
    return next(float(group["lr"]) for group in param_groups if group["default_config"])


def describe_adam() -> str:
    """One line for the start of a run: whose Adam megatron.core found."""
    source = mcore_optimizer.Adam.__module__.split(".")[0]
    names = {
        "transformer_engine": "Transformer Engine's FusedAdam",
        "apex": "apex's FusedAdam",
        "torch": "torch's AdamW (neither Transformer Engine nor apex is installed)",
    }
    return f"optimizer: {names.get(source, mcore_optimizer.Adam.__module__)}"


Groups = list[dict[str, Any]]


def saved_group_lists(state: Any) -> Iterator[Groups]:
    """The parameter groups inside an optimizer's saved state, one list an inner optimizer, in order."""
    if isinstance(state, Mapping):
        if "param_groups" in state:
            yield state["param_groups"]
        else:
            for value in state.values():
                yield from saved_group_lists(value)


def match_groups(saved: Groups, *, current: Groups) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Saved and current parameter groups in pairs, by what they are for and not by their rates.

    Raises ValueError where a group has no counterpart.
    """

    def purpose(group: Mapping[str, Any]) -> tuple[Any, ...]:
        return (
            group.get("wd_mult", 1.0),
            group.get("lr_mult", 1.0),
            bool(group.get("is_expert_parallel", False)),
            bool(group.get("default_config", True)),
        )

    by_purpose = {purpose(group): group for group in saved}
    missing = [purpose(group) for group in current if purpose(group) not in by_purpose]
    if missing:
        raise ValueError(
            "the checkpoint's optimizer must have a parameter group for each (weight-decay factor, "
            f"learning-rate factor, expert, default rate) of this run, it has none for {missing[0]}; set "
            "--decoupled-lr and --apply-wd-to-qk-layernorm as they were, or pass --no-load-optim"
        )
    return [(by_purpose[purpose(group)], group) for group in current]
