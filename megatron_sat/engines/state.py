"""What a MegatronEngine puts into a checkpoint and takes back: model, optimizer, learning-rate schedule.

The optimizer's state is described parameter by parameter (`fully_reshardable`), so that tensor, pipeline and
data parallelism may change between saving and loading; keys are Megatron-LM's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_sat.engines.optim import Groups, LearningRateConfig, match_groups, saved_group_lists

CONTENT_METADATA: Mapping[str, Any] = {
    # the only format of the distributed optimizer that reshards over TP and PP and that both 0.16.1 and
    # 0.19.2 keep
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""What dist_checkpointing saves as content metadata and hands to every sharded_state_dict."""

_OF_THE_RATE = ("max_lr", "min_lr", "start_wd", "end_wd")

Pairs = list[tuple[dict[str, Any], dict[str, Any]]]
"""Saved and current parameter groups."""


def model_key(index: int, *, of: int) -> str:
    """Megatron-LM's name for a model chunk in a state: "model", or "model0", "model1", ... of an interleaved
    pipeline."""
    return "model" if of == 1 else f"model{index}"


def describe_state(
    chunks: Sequence[MegatronModule],
    *,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler,
    metadata: Mapping[str, Any],
    is_loading: bool,
) -> dict[str, Any]:
    """The state of chunks and, where given, of the optimizer and the schedule, for dist_checkpointing."""
    metadata = dict(metadata)
    state: dict[str, Any] = {
        model_key(index, of=len(chunks)): chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def complaint(
    saved: Mapping[str, Any],
    *,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    learning_rate: LearningRateConfig,
) -> str | None:
    """Why this optimizer and schedule cannot go on from the unsharded part of a checkpoint, or None. Touches
    nothing."""
    if (missing := missing_state(saved)) is not None:
        return missing
    if (theirs := _kind_saved(saved["optimizer"])) != (ours := _kind(optimizer)):
        return (
            f"the optimizer state must be of this run's kind ({ours}), the checkpoint's is {theirs}; set "
            "--engine, precision and --use-distributed-optimizer as they were, or pass --no-load-optim"
        )
    pairs = _pairs(saved["optimizer"], optimizer=optimizer)
    return other_rates(saved, pairs=pairs, scheduler=scheduler, learning_rate=learning_rate)


def missing_state(saved: Mapping[str, Any]) -> str | None:
    """A complaint about a checkpoint without an optimizer; None of any other."""
    if "optimizer" in saved and "opt_param_scheduler" in saved:
        return None
    return "the checkpoint has no optimizer state; pass --no-load-optim, or --finetune for a new run from its weights"


def other_rates(
    saved: Mapping[str, Any],
    *,
    pairs: Pairs,
    scheduler: OptimizerParamScheduler,
    learning_rate: LearningRateConfig,
) -> str | None:
    """Why a saved schedule is not this run's, or None. pairs: saved and current parameter groups."""
    if learning_rate.override_opt_param_scheduler or learning_rate.use_checkpoint_opt_param_scheduler:
        return None
    way_out = (
        "pass --override-opt-param-scheduler for the new schedule, --use-checkpoint-opt-param-scheduler for the old"
    )
    for name, value in scheduler.state_dict().items():
        if name != "num_steps" and saved["opt_param_scheduler"].get(name, value) != value:
            old = saved["opt_param_scheduler"][name]
            return f"{name} of the schedule must be the checkpoint's ({old}), got {value}; {way_out}"
    for before, now in pairs:
        for name in _OF_THE_RATE:
            old, new = before.get(name), now.get(name)
            if old != new:
                return f"{name} of a parameter group must be the checkpoint's ({old}), got {new}; {way_out}"
    return None


def take_back(
    state: Mapping[str, Any],
    *,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    learning_rate: LearningRateConfig,
    with_optimizer: bool,
) -> None:
    """Put a loaded state into place. Without the optimizer, its fp32 weights are made anew from the model's."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[model_key(index, of=len(chunks))])
    if not with_optimizer:
        optimizer.reload_model_params()
        return
    # megatron.core pairs groups by their rates (0.19) and then takes the saved ones over (both): settle first
    # whose count
    settle_rates(_pairs(state["optimizer"], optimizer=optimizer), learning_rate=learning_rate)
    optimizer.load_state_dict(state["optimizer"])
    restore_schedule(scheduler, saved=state["opt_param_scheduler"])


def settle_rates(pairs: Pairs, *, learning_rate: LearningRateConfig) -> None:
    """Give both of each pair of parameter groups the rates that count: the checkpoint's where it is asked for, else
    this run's."""
    for before, now in pairs:
        source, target = (before, now) if learning_rate.use_checkpoint_opt_param_scheduler else (now, before)
        target.update({name: source[name] for name in _OF_THE_RATE if name in source})


def restore_schedule(scheduler: OptimizerParamScheduler, *, saved: Mapping[str, Any]) -> None:
    """Put the schedule where the saved one was, and write its rates into the parameter groups."""
    scheduler.num_steps = 0  # its load_state_dict adds the saved count to the present one
    scheduler.load_state_dict(dict(saved))
    scheduler.step(0)  # and writes the groups before it has taken the saved weight decay


def _inner(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _kind(optimizer: MegatronOptimizer) -> str:
    first = _inner(optimizer)[0]
    if isinstance(first, DistributedOptimizer):
        return f"distributed, {CONTENT_METADATA['distrib_optim_sharding_type']}"
    return "16-bit with fp32 copies" if isinstance(first, Float16OptimizerWithFloat16Params) else "fp32"


def _kind_saved(saved: Mapping[Any, Any]) -> str:
    if "engine" in saved:
        return str(saved["engine"])
    if "param_groups" in saved:
        return "fp32"
    if "param_state_sharding_type" in saved:
        return f"distributed, {saved['param_state_sharding_type']}"
    if "optimizer" in saved:
        return "16-bit with fp32 copies"
    first = saved.get(0)
    return _kind_saved(first) if isinstance(first, Mapping) else "unknown"


def _pairs(saved: Any, *, optimizer: MegatronOptimizer) -> Pairs:
    """Saved and current parameter groups, pairwise, over all inner optimizers."""
    lists: list[Groups] = list(saved_group_lists(saved))
    return [
        pair
        for groups, wrapper in zip(lists, _inner(optimizer), strict=True)
        for pair in match_groups(groups, current=wrapper.param_groups)
    ]
