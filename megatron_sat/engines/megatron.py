"""The engine on megatron.core: its DDP, schedules, optimizers and learning-rate scheduler under one `train_step`.

All of Megatron's parallelism passes through here unchanged: pipelines (1F1B and interleaved), data and context
parallelism with overlapped reduction, the distributed optimizer with overlapped gathering, sequence parallelism, tied
embeddings, bf16 and fp16. The loss is summed over unmasked tokens and divided once by their number in the whole global
batch where `calculate_per_token_loss` is set; without it every micro-batch has the same weight, as in Megatron-LM.

Shapes: `b` micro-batch, `s` sequence, `cp` context-parallel size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_sat.distributed import Layout
from megatron_sat.engines.base import (
    Batch,
    Evaluation,
    Filled,
    Forward,
    Held,
    StepResult,
    forward_tokens,
    masked_sum,
    mean_losses,
)
from megatron_sat.engines.cleared import Cleared, clear_entries, gather_gradients
from megatron_sat.engines.ddp import wrap_chunks
from megatron_sat.engines.frozen import hold_entries
from megatron_sat.engines.optim import LearningRateConfig, build_optimizer, build_scheduler, coming_rate
from megatron_sat.engines.sparse_reduce import SparseReduction
from megatron_sat.engines.state import CONTENT_METADATA, complaint, describe_state, take_back
from megatron_sat.engines.veto import Verdict, Veto, pass_over


class MegatronEngine:
    """`Engine` on megatron.core. Takes over the model's configuration: its sync functions and its loss scaling.

    chunks: this rank's model chunks as built, in Float16Module where the configuration says bf16 or fp16.
    seq_length: tokens of a whole sequence, before context parallelism cuts it.
    align_grad_reduce: pipeline stages start their gradient reductions together (Megatron-LM's flag of that name).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        layout: Layout,
        ddp_config: DistributedDataParallelConfig,
        optimizer_config: OptimizerConfig,
        learning_rate: LearningRateConfig,
        seq_length: int,
        micro_batch_size: int,
        align_grad_reduce: bool = True,
    ) -> None:
        self._config: TransformerConfig = get_model_config(chunks[0])
        _check_agreement(self._config, ddp_config=ddp_config, optimizer_config=optimizer_config)
        _check_pipeline(self._config, num_chunks=len(chunks))
        self._chunks = [chunk.module if isinstance(chunk, Float16Module) else chunk for chunk in chunks]
        self._layout = layout
        self._seq_length = seq_length
        self._micro_batch_size = micro_batch_size
        self._pp_group = parallel_state.get_pipeline_model_parallel_group()
        self._wrapped = wrap_chunks(
            chunks,
            config=self._config,
            ddp_config=ddp_config,
            one_bucket=optimizer_config.overlap_param_gather_with_optimizer_step,
        )
        self._learning_rate_config = learning_rate
        self._optimizer = build_optimizer(self._wrapped, config=optimizer_config)
        self._scheduler = build_scheduler(self._optimizer, config=learning_rate)
        self._connect(ddp_config, align_grad_reduce=align_grad_reduce)
        self._veto: Veto | None = None
        self._sparse_reduction: SparseReduction | None = None
        self._sums: list[Tensor] = []

    def _connect(self, ddp_config: DistributedDataParallelConfig, *, align_grad_reduce: bool) -> None:
        """Tell the schedules when to reduce, when to gather and how to scale."""

        def one_or_all(functions: list[Any]) -> Any:
            return functions[0] if len(functions) == 1 else functions

        self._config.finalize_model_grads_func = finalize_model_grads
        self._config.grad_scale_func = self._optimizer.scale_loss
        if ddp_config.overlap_grad_reduce:
            self._config.no_sync_func = one_or_all([chunk.no_sync for chunk in self._wrapped])
            if align_grad_reduce:
                self._config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in self._wrapped])
        self._gathers_late = ddp_config.use_distributed_optimizer and ddp_config.overlap_param_gather
        self._param_sync_func = None
        if self._gathers_late:
            if ddp_config.align_param_gather:
                self._param_sync_func = one_or_all([chunk.start_param_sync for chunk in self._wrapped])
            self._gathering = True
            self._stop_gathering(param_sync=False)

    # With overlapped gathering the weights lie in shards between an update and the next forward. A forward
    # outside of training, a checkpoint, and the first forward after a load (which must not gather what was
    # never updated) need them whole: Megatron-LM's loop switches the hooks off and on for these, and so do
    # we.
    def _stop_gathering(self, *, param_sync: bool) -> None:
        if self._gathers_late and self._gathering:
            for chunk in self._wrapped:
                chunk.disable_forward_pre_hook(param_sync=param_sync)
            self._config.param_sync_func = None
            self._gathering = False

    def _start_gathering(self) -> None:
        if self._gathers_late and not self._gathering:
            for chunk in self._wrapped:
                chunk.enable_forward_pre_hook()
            self._config.param_sync_func = self._param_sync_func
            self._gathering = True

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """This rank's model chunks without wrappers."""
        return self._chunks

    @property
    def learning_rate(self) -> float:
        """The rate that the next update will use (of the embedding-free group where rates are decoupled)."""
        return coming_rate(self._optimizer.param_groups)

    def train_step(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward = forward_tokens
    ) -> StepResult:
        """One update; see `Engine.train_step`."""
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        if self._sparse_reduction is not None:
            self._sparse_reduction.begin_step()
            forward = self._sparse_reduction.watching(forward)
        loss, num_tokens = self._run(micro_batches, num_micro_batches=num_micro_batches, forward=forward, train=True)
        if self._sparse_reduction is not None:
            self._sparse_reduction.check()
        if self._veto is not None:
            self._veto.loss = loss
        learning_rate = self.learning_rate
        succeeded, grad_norm, _ = self._optimizer.step()
        done, norm = self._agree_on(succeeded, grad_norm=grad_norm)
        if done:
            self._scheduler.step(increment=num_micro_batches * self._micro_batch_size * self._layout.dp_size)
            self._start_gathering()
        return StepResult(
            loss=loss, num_tokens=num_tokens, grad_norm=norm, learning_rate=learning_rate, skipped=not done
        )

    def _agree_on(self, succeeded: bool, *, grad_norm: float | None) -> tuple[bool, float]:
        """Whether all ranks of the model updated, and the norm: a rank without trainable parameters knows neither."""
        stats = torch.tensor(
            [0.0 if succeeded else 1.0, -1.0 if grad_norm is None else float(grad_norm)],
            device=torch.cuda.current_device(),
        )
        dist.all_reduce(stats, op=dist.ReduceOp.MAX, group=self._layout.model_group)
        failed, norm = stats.tolist()
        return failed == 0.0, math.nan if failed else norm

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward = forward_tokens
    ) -> Evaluation:
        """The loss alone; see `Engine.evaluate`."""
        gathering = self._gathers_late and self._gathering
        self._stop_gathering(param_sync=True)
        for chunk in self._wrapped:
            chunk.eval()
        loss, num_tokens = self._run(micro_batches, num_micro_batches=num_micro_batches, forward=forward, train=False)
        for chunk in self._wrapped:
            chunk.train()
        if gathering:
            self._start_gathering()
        return Evaluation(loss=loss, num_tokens=num_tokens)

    def _run(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward, train: bool
    ) -> tuple[float, int]:
        """All micro-batches through the schedule. Returns (mean loss, unmasked tokens) of the global batch."""
        # the chunks of an interleaved pipeline read the same micro-batches, each at its own pace
        drawn = [next(micro_batches) for _ in range(num_micro_batches)]
        iterators = [iter(drawn) for _ in self._wrapped]
        sums = get_forward_backward_func()(
            forward_step_func=_as_megatron_calls_it(forward),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._wrapped if len(self._wrapped) > 1 else self._wrapped[0],
            num_microbatches=num_micro_batches,
            seq_length=self._seq_length,
            micro_batch_size=self._micro_batch_size,
            forward_only=not train,
        )
        self._sums = sums
        return self._mean_over_ranks(sums)

    def _mean_over_ranks(self, sums: list[Tensor]) -> tuple[float, int]:
        """sums: [loss, tokens] of each micro-batch, float64, only on the last stage."""
        device = torch.cuda.current_device()
        total = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._layout.dp_cp_group)
        dist.all_reduce(total, group=self._pp_group)  # all stages but the last add zeros
        loss, tokens = total.tolist()
        return loss / tokens if tokens else math.nan, int(tokens)

    def judge(self, verdict: Verdict) -> None:
        """Ask before each coming update; see `engines.veto.Judged`."""
        self._veto = Veto(self._optimizer, verdict=verdict, replicas=self._layout.dp_cp_group)

    @property
    def micro_batch_losses(self) -> list[float]:
        """Of the last step; see `engines.veto.Judged`."""
        return mean_losses(self._sums)

    def gather_weights(self) -> None:
        """Make the weights whole now; see `Engine.gather_weights`."""
        if self._gathers_late and self._gathering:
            for chunk in self._wrapped:
                chunk.start_param_sync(force_sync=True)

    def hold(self, entries: Callable[[], Iterable[Held]]) -> None:
        """Leave these entries alone in every coming update; see `Engine.hold`."""
        hold_entries(self._optimizer, entries=entries)

    def clear(self, entries: Iterable[Cleared]) -> None:
        """Zero these entries in every copy that an update reads; see `cleared.clear_entries`."""
        clear_entries(self._optimizer, entries=entries)

    def pass_over(self, when: Callable[[], bool]) -> None:
        """Leave updates out where `when` says so; see `veto.pass_over`."""
        pass_over(self._optimizer, when=when)

    def gather_gradients(self) -> None:
        """After the reduction: every replica gets the whole gradient; see `cleared.gather_gradients`."""
        gather_gradients(self._wrapped)

    def reduce_only(self, entries: Callable[[], Iterable[Filled]]) -> None:
        """From now on leave zeros that all replicas share out of the reduction; see `SparseReduction`.

        entries: asked in each step. Raises ValueError where DDP's settings do not allow it.
        """
        self._sparse_reduction = SparseReduction(self._wrapped, entries=entries)

    @property
    def content_metadata(self) -> dict[str, Any]:
        """How this engine names and cuts the tensors of a checkpoint that it saves."""
        return dict(CONTENT_METADATA)

    def sharded_state_dict(
        self, *, is_loading: bool, with_optimizer: bool, content_metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Engine.sharded_state_dict`: keys "model" (or "model0", ...), "optimizer", "opt_param_scheduler"."""
        self.gather_weights()
        return describe_state(
            self._chunks,
            optimizer=self._optimizer if with_optimizer else None,
            scheduler=self._scheduler,
            metadata={**content_metadata, "dp_cp_group": self._layout.dp_cp_group},
            is_loading=is_loading,
        )

    def complaint(self, saved: Mapping[str, Any]) -> str | None:
        """Why the unsharded part of a saved state cannot be taken back, or None; nothing is touched."""
        return complaint(
            saved,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            learning_rate=self._learning_rate_config,
        )

    def load_state_dict(self, state: Mapping[str, Any], *, with_optimizer: bool) -> None:
        """See `Engine.load_state_dict`. Without the optimizer its fp32 weights are made from the model's."""
        self._stop_gathering(param_sync=False)
        take_back(
            state,
            chunks=self._chunks,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            learning_rate=self._learning_rate_config,
            with_optimizer=with_optimizer,
        )


def _as_megatron_calls_it(forward: Forward) -> Callable[..., tuple[Tensor, Callable[..., Any]]]:
    """megatron.core's forward_step_func: (iterator, chunk) to output and loss function."""

    def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)

        def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """losses: [b, s/cp]. Returns the sum, the number of tokens, and a report of both."""
            total, tokens = masked_sum(losses, batch)
            # double makes copies: the schedule goes on to divide the first two in place
            report = torch.stack((total.detach().double(), tokens.double()))
            return total, tokens.to(torch.int), report

        return forward(chunk, batch), loss_of

    return forward_step


def _check_agreement(
    model: TransformerConfig, *, ddp_config: DistributedDataParallelConfig, optimizer_config: OptimizerConfig
) -> None:
    """Refuse settings that contradict each other in megatron.core's three configurations."""
    pairs = (
        ("use_distributed_optimizer", ddp_config, "DDP"),
        ("overlap_param_gather", ddp_config, "DDP"),
        ("bf16", model, "the model"),
        ("fp16", model, "the model"),
    )
    for name, other, owner in pairs:
        if getattr(optimizer_config, name) != getattr(other, name):
            raise ValueError(
                f"{name} of the optimizer must be that of {owner} ({getattr(other, name)}), got "
                f"{getattr(optimizer_config, name)}; build it with make_optimizer_config"
            )
    if model.calculate_per_token_loss and ddp_config.average_in_collective:
        raise ValueError(
            "average_in_collective must be off with calculate_per_token_loss, whose divisor is the number of "
            "tokens, got on; leave --ddp-average-in-collective out"
        )
    if ddp_config.overlap_param_gather and not ddp_config.use_distributed_optimizer:
        raise ValueError(
            "overlap_param_gather needs use_distributed_optimizer, got it without; add --use-distributed-optimizer"
        )
    if ddp_config.overlap_param_gather and not ddp_config.overlap_grad_reduce:
        raise ValueError("overlap_param_gather needs overlap_grad_reduce, got it without; add --overlap-grad-reduce")


def _check_pipeline(model: TransformerConfig, *, num_chunks: int) -> None:
    """Refuse an interleaved pipeline whose messages would meet the wrong receiver: two stages, both ways in
    one batch."""
    if num_chunks > 1 and model.pipeline_model_parallel_size == 2 and not model.overlap_p2p_comm:
        raise ValueError(
            "overlap_p2p_comm must be on for an interleaved pipeline of 2 stages, got off; leave "
            "--no-overlap-p2p-communication out"
        )
