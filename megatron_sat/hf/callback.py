"""A callback that takes a sparse model through the steps of transformers' Trainer.

It opens a step before its first micro-batch and closes it after the update, so evaluation and checkpoints in between
are dense; it knows from the Trainer's position which step that is, also after a resume; and it refuses, before the
first step, what would train something else than was asked for. The Trainer itself stays as it is, with DDP through
accelerate or with DeepSpeed's ZeRO.
"""

from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, DynamoBackend
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from megatron_sat.hf import state as saved_state
from megatron_sat.hf.frozen import Freezer
from megatron_sat.hf.model import SparseModel

_CUT_OTHERWISE = (DistributedType.FSDP, DistributedType.XLA, DistributedType.MEGATRON_LM)


class SatCallback(TrainerCallback, ExportableState):
    """Give it to the Trainer that trains ``sparse.model``: ``Trainer(..., callbacks=[SatCallback(sparse)])``."""

    def __init__(self, sparse: SparseModel, *, pack: bool = True, omitted_neurons: str = "optimizer") -> None:
        """pack: cut each weight once a step, for all its micro-batches; False: in each of them, as DeepSpeed needs.

        omitted_neurons: what an update does to them: optimizer (a zero gradient), or frozen (nothing, eq. 2).
        Raises ValueError for another word.
        """
        if omitted_neurons not in ("optimizer", "frozen"):
            raise ValueError(f"omitted_neurons must be one of optimizer, frozen, got {omitted_neurons!r}")
        self.sparse, self.pack, self.frozen = sparse, pack, omitted_neurons == "frozen"
        self._freezer: Freezer | None = None

    # -- before the first step

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what the arguments alone tell. Raises ValueError."""
        _refuse(args, pack=self.pack, frozen=self.frozen)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what is known only now, and take over the choices of a checkpoint. Raises ValueError."""
        _refuse(args, pack=self.pack, frozen=self.frozen)  # a callback that was added late has not seen the beginning
        self.sparse.abandon()  # of an attempt that ran out of memory, as auto_find_batch_size makes them
        last = self.sparse.schedule.last_step
        if last != state.max_steps:
            raise ValueError(
                f"the schedule's last step (train_iters) must be the Trainer's last, {state.max_steps}, got {last}; "
                f"build the schedule with train_iters={state.max_steps}, or say TrainingArguments(max_steps={last})"
            )
        if not self.sparse.intact:
            raise ValueError(
                "the model must keep the layers that sparsify found, some were replaced since; apply adapters, "
                "quantization and kernels that replace linear layers before, or not at all"
            )
        local = self.sparse.selection.dp_selection == "local"
        if local and args.world_size > 1 and saved_state.outlives_a_step(self.sparse):
            raise ValueError(
                "--sat-dp-selection must be shared where choices or sums outlive a step (--sat-selection-interval "
                "above 1, --sat-statistics lagged), got local: a checkpoint of the Trainer holds those of one replica"
            )
        saved: Any = state.stateful_callbacks  # by a callback's name what its `state` gave
        if state.global_step and type(self).__name__ in saved:
            saved_state.load(self.sparse, saved[type(self).__name__]["attributes"])
        self._thaw()
        if self.frozen:
            optimizer = kwargs["optimizer"]
            self._freezer = self.sparse.freeze_omitted(getattr(optimizer, "optimizer", optimizer))  # in accelerate's

    # -- a step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the step's first micro-batch."""
        is_last = (lambda: GradientState().sync_gradients) if self.pack else None
        self.sparse.open(state.global_step + 1, is_last=is_last)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the update."""
        self.sparse.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing stays open where training ended in the middle of a step."""
        self.sparse.abandon()
        self._thaw()

    def _thaw(self) -> None:
        if self._freezer is not None:
            self._freezer.remove()
        self._freezer = None

    # -- what is said and saved

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Beside a training loss: the schedule's rate of that step, and what it came to for heads and channels."""
        if logs is None or "loss" not in logs or not state.global_step:
            return
        found = {"sat_omission_rate": float(self.sparse.rate(state.global_step))}
        kinds = self.sparse.omission_rates(state.global_step)
        found |= {f"sat_omitted_{kind}": rate for kind, rate in kinds.items()}
        logs.update(found)
        state.log_history[-1].update(found)  # which was written before any callback is asked

    def state(self) -> dict[str, Any]:
        """What a checkpoint's trainer_state.json says of this run."""
        return {"args": {}, "attributes": saved_state.save(self.sparse)}


def _refuse(args: TrainingArguments, *, pack: bool, frozen: bool) -> None:
    """Settings under which a choice could not be made, not be shared, or not be obeyed."""
    if args.n_gpu > 1:
        raise ValueError(
            f"sparse training needs a process for each GPU, this one has {args.n_gpu}, which would be DataParallel's "
            f"threads; start it with torchrun --nproc-per-node {args.n_gpu}, or show it one GPU by CUDA_VISIBLE_DEVICES"
        )
    if dist.is_initialized() and dist.get_world_size() != args.world_size:
        raise ValueError(
            f"the Trainer must know of all {dist.get_world_size()} processes, it knows of {args.world_size} and would "
            "give each the same texts; start it with torchrun; with deepspeed accelerate wants GPUs"
        )
    here = AcceleratorState()  # also knows what `accelerate launch` was told
    if here.distributed_type in _CUT_OTHERWISE or args.parallelism_config is not None:
        raise ValueError(
            f"sparse training needs every layer's weights whole in its forward, {here.distributed_type.value} (or a "
            "parallelism_config) cuts them; leave it out and use DDP (torchrun) or deepspeed"
        )
    if here.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "torch_compile must be off for sparse training, got it on: a compiled graph is of one choice, and each "
            "step has another; leave it out"
        )
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "restore_callback_states_from_checkpoint must be off: it would build this callback anew without its model; "
            "leave it out, the callback restores its choices by itself"
        )
    if frozen and here.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "omitted_neurons must be optimizer with deepspeed, whose optimizers keep their state elsewhere, got frozen;"
            " use DDP, or finetune_sat.py --engine deepspeed --sat-omitted-neurons frozen"
        )
    if pack and here.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "pack must be False with deepspeed, which wants each micro-batch's gradient as it comes, got True; say "
            "SatCallback(sparse, pack=False)"
        )
