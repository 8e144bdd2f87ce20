"""The engine on DeepSpeed: ZeRO 0 to 3 with Megatron's tensor, sequence and context parallelism.

The only door to the package, which is imported when an engine is built and not before. Model, parameter groups,
schedule, loss and what a step reports are those of the engine on megatron.core; DeepSpeed accumulates and reduces
gradients, clips, keeps the optimizer's state in shards and updates. Its own pipelines, schedulers, data loaders and
checkpoints are not used.

Shapes: `b` micro-batch, `s` sequence, `cp` context-parallel size.
"""

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_sat.distributed import Layout, declare_local_rank
from megatron_sat.engines import zero_state
from megatron_sat.engines.base import (
    Batch,
    Evaluation,
    Forward,
    Held,
    StepResult,
    forward_tokens,
    masked_sum,
    mean_losses,
)
from megatron_sat.engines.frozen import hold_stretches
from megatron_sat.engines.mpu import ModelParallelUnit
from megatron_sat.engines.optim import LearningRateConfig, build_scheduler, coming_rate, match_groups
from megatron_sat.engines.state import (
    CONTENT_METADATA,
    missing_state,
    model_key,
    other_rates,
    restore_schedule,
    settle_rates,
)
from megatron_sat.engines.stretch import stretches_of_deepspeed
from megatron_sat.engines.veto import Verdict
from megatron_sat.engines.zero_adam import build_adam
from megatron_sat.engines.zero_settings import offloads
from megatron_sat.engines.zero_veto import ZeroVeto


def library() -> ModuleType:
    """The package, quiet and without what it would compile. Raises ValueError where it is not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of a CPU while it is imported
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ValueError(
            f"--engine deepspeed needs the package deepspeed, which cannot be imported ({error}); "
            "pip install 'megatron-sat[deepspeed]', or leave --engine out"
        ) from error
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # gloo serves as well; without ninja and a compiler DeepSpeed fails at its start where it counts on this one
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine:
    """`Engine` on DeepSpeed.

    chunks: this rank's model, one chunk, in Float16Module where the configuration says bf16.
    settings: DeepSpeed's configuration, as `zero_settings.merge` makes it.
    check_for_nan: raise RuntimeError where a gradient is not finite.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        layout: Layout,
        optimizer_config: OptimizerConfig,
        learning_rate: LearningRateConfig,
        settings: Mapping[str, Any],
        micro_batch_size: int,
        check_for_nan: bool = True,
    ) -> None:
        (wrapped,) = chunks
        self._library = library()
        self._config: TransformerConfig = get_model_config(wrapped)
        self._chunk = wrapped.module if isinstance(wrapped, Float16Module) else wrapped
        self._layout, self._micro_batch_size = layout, micro_batch_size
        self._check_for_nan = check_for_nan
        self._stage: int = settings["zero_optimization"]["stage"]
        self._learning_rate_config = learning_rate
        _sum_over_tp(self._chunk, config=self._config, group=layout.tp_group)
        self._parameters = [p for p in self._chunk.parameters() if p.requires_grad]
        self._elsewhere = offloads(settings)
        adam = build_adam(
            wrapped,
            config=optimizer_config,
            library=self._library,
            state_on_host="offload_optimizer" in self._elsewhere,
        )
        self._adam, self._adams_name = adam.optimizer, adam.name
        self._scheduler = build_scheduler(self._adam, config=learning_rate)  # type: ignore[arg-type]
        declare_local_rank()
        self._engine, *_ = self._library.initialize(
            model=wrapped, optimizer=self._adam, config=dict(settings), mpu=ModelParallelUnit(layout)
        )
        self._veto: ZeroVeto | None = None
        self._sums: list[Tensor] = []
        self._find = stretches_of_deepspeed(self._engine.optimizer, stage=self._stage)
        self._state = zero_state.OptimizerState(
            self._adam,
            parameters=self._parameters,
            find=self._find,
            replicas=layout.dp_cp_group,
            replicated=self._stage == 0,
        )

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """The model without wrappers. At stage 3 its parameters are empty but while they are used."""
        return [self._chunk]

    def describe(self) -> str:
        """One line for the start of a run: who steps, and where its state lies."""
        elsewhere = ", ".join(name.removeprefix("offload_") for name in self._elsewhere)
        host = f", {elsewhere} in the host's memory" if elsewhere else ""
        return f"optimizer: {self._adams_name} in DeepSpeed {version('deepspeed')}, ZeRO {self._stage}{host}"

    @property
    def learning_rate(self) -> float:
        """The rate that the next update will use (of the embedding-free group where rates are decoupled)."""
        return coming_rate(self._adam.param_groups)

    def train_step(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward = forward_tokens
    ) -> StepResult:
        """One update; see `Engine.train_step`."""
        drawn = [next(micro_batches) for _ in range(num_micro_batches)]
        self._engine.train()
        factors = self._factors(drawn)
        sums = []
        for number, (batch, factor) in enumerate(zip(drawn, factors, strict=True), start=1):
            self._engine.set_gradient_accumulation_boundary(number == num_micro_batches)
            total, tokens = masked_sum(forward(self._engine, batch), batch)
            self._engine.backward(total * factor, scale_wrt_gas=False)
            sums.append(torch.stack((total.detach().double(), tokens.double())))
        self._sums = sums
        loss, num_tokens = self._mean_over_ranks(sums)
        learning_rate = self.learning_rate
        done, norm = self._update(loss)
        if self._check_for_nan and not (done and math.isfinite(norm)):
            raise RuntimeError(
                f"the gradient must be finite, its norm is {norm} at loss {loss}; lower --lr, look at the data of this "
                "step, or pass --no-check-for-nan-in-loss-and-grad"
            )
        if done:
            self._scheduler.step(increment=num_micro_batches * self._micro_batch_size * self._layout.dp_size)
        return StepResult(
            loss=loss, num_tokens=num_tokens, grad_norm=norm, learning_rate=learning_rate, skipped=not done
        )

    def _update(self, loss: float) -> tuple[bool, float]:
        """Clip, update, and forget the gradients. Returns whether the weights moved, and the norm before clipping."""
        veto, norm = self._veto, math.nan
        if veto is not None:
            veto.begin(loss)
        if self._stage == 0:
            norm = self._norm_of_whole()
            if veto is not None and not veto.permits(norm):
                self._engine.zero_grad()
                return False, math.nan
        self._engine.step()
        done = bool(self._engine.was_step_applied())
        if veto is not None and not veto.asked:  # DeepSpeed saw what is no number before it took the norm
            veto.permits(math.nan)
        return done, norm if self._stage == 0 else self._norm_of_shards() if done else math.nan

    def judge(self, verdict: Verdict) -> None:
        """Ask before each coming update; see `engines.veto.Judged`."""
        self._veto = ZeroVeto(
            self._engine.optimizer,
            verdict=verdict,
            replicas=self._layout.dp_cp_group,
            norm_of=importlib.import_module("deepspeed.runtime.utils").get_global_norm_of_tensors,
        )

    @property
    def micro_batch_losses(self) -> list[float]:
        """Of the last step; see `engines.veto.Judged`."""
        return mean_losses(self._sums)

    def _factors(self, drawn: Sequence[Batch]) -> list[Tensor]:
        """What the summed loss of each micro-batch is multiplied by, so that DeepSpeed's mean over the replicas is the
        gradient: of the mean over all tokens (calculate_per_token_loss), or of the mean of the micro-batches' means."""
        tokens = torch.stack([batch["loss_mask"].float().sum() for batch in drawn])
        if not self._config.calculate_per_token_loss:
            return list(1.0 / (tokens.clamp(min=1) * len(drawn)))
        everywhere = tokens.sum()
        dist.all_reduce(everywhere, group=self._layout.dp_cp_group)
        factor = dist.get_world_size(self._layout.dp_cp_group) / everywhere.clamp(min=1)
        return [factor] * len(drawn)

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward = forward_tokens
    ) -> Evaluation:
        """The loss alone; see `Engine.evaluate`."""
        self._engine.eval()
        sums = []
        for _ in range(num_micro_batches):
            batch = next(micro_batches)
            total, tokens = masked_sum(forward(self._engine, batch), batch)
            sums.append(torch.stack((total.double(), tokens.double())))
        self._engine.train()
        loss, num_tokens = self._mean_over_ranks(sums)
        return Evaluation(loss=loss, num_tokens=num_tokens)

    def _mean_over_ranks(self, sums: list[Tensor]) -> tuple[float, int]:
        """sums: [loss, tokens] of each micro-batch, float64. Returns the global batch's mean loss and tokens."""
        total = torch.stack(sums).sum(0)
        dist.all_reduce(total, group=self._layout.dp_cp_group)
        loss, tokens = total.tolist()
        return loss / tokens if tokens else math.nan, int(tokens)

    def _norm_of_shards(self) -> float:
        norm = float(self._engine.get_global_grad_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed says -1 for what is not finite

    def _norm_of_whole(self) -> float:
        """At stage 0 DeepSpeed keeps its norm to itself. The gradients are reduced already."""
        squares = torch.zeros((), dtype=torch.float32, device=self._parameters[0].device)
        for parameter in self._parameters:
            once = self._layout.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
            if once and parameter.grad is not None:
                squares += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        dist.all_reduce(squares, group=self._layout.tp_group)
        return float(squares.sqrt())

    def gather_weights(self) -> None:
        """Nothing to do: updates are gathered when made, and stage 3 gathers for whoever computes."""

    def whole(self, *, to_write: bool = False) -> AbstractContextManager[Any]:
        """While it is open every parameter has its values, at stage 3 too. to_write: what the first replica leaves in
        them holds from then on."""
        parameters = list(self._chunk.parameters())
        return self._library.zero.GatheredParameters(
            parameters, modifier_rank=0 if to_write else None, enabled=self._stage == 3
        )

    def hold(self, entries: Callable[[], Iterable[Held]]) -> None:
        """Leave these entries alone in every coming update; see `Engine.hold`."""
        hold_stretches(self._adam, find=self._find, entries=entries)

    # -- checkpoints

    @property
    def content_metadata(self) -> dict[str, Any]:
        """How this engine names and cuts the tensors of a checkpoint that it saves."""
        return dict(CONTENT_METADATA)

    def sharded_state_dict(
        self, *, is_loading: bool, with_optimizer: bool, content_metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Engine.sharded_state_dict`: keys "model", "optimizer", "opt_param_scheduler"."""
        with self.whole():
            metadata = {**content_metadata, "dp_cp_group": self._layout.dp_cp_group}
            model = self._chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
            places = zero_state.places_of(model, parameters=self._parameters)
            zero_state.detach(model)
        state: dict[str, Any] = {model_key(0, of=1): model}
        if with_optimizer:
            state["optimizer"] = self._state.describe(places, is_loading=is_loading)
            state["opt_param_scheduler"] = self._scheduler.state_dict()
        return state

    def complaint(self, saved: Mapping[str, Any]) -> str | None:
        """Why the unsharded part of a saved state cannot be taken back, or None; nothing is touched."""
        if (missing := missing_state(saved)) is not None:
            return missing
        theirs = saved["optimizer"].get("engine", "megatron.core's")
        if theirs != zero_state.KIND:
            return (
                f"optimizer state must be {zero_state.KIND}, the checkpoint's is {theirs}; leave --engine deepspeed "
                "out, or pass --no-load-optim"
            )
        copies = zero_state.MAIN in self._state.names
        if saved["optimizer"]["copies"] != copies:
            said = "16-bit" if saved["optimizer"]["copies"] else "fp32"
            return f"weights must be {said} as in the checkpoint, they are not; change --bf16, or pass --no-load-optim"
        return other_rates(
            saved,
            pairs=match_groups(saved["optimizer"]["groups"], current=self._adam.param_groups),
            scheduler=self._scheduler,
            learning_rate=self._learning_rate_config,
        )

    def load_state_dict(self, state: Mapping[str, Any], *, with_optimizer: bool) -> None:
        """See `Engine.load_state_dict`. Without the optimizer its fp32 weights are made from the model's."""
        with self.whole(to_write=True):
            self._chunk.load_state_dict(state[model_key(0, of=1)])
        with self.whole(), torch.no_grad():
            self._state.copy_weights()
        if not with_optimizer:
            return
        pairs = match_groups(state["optimizer"]["groups"], current=self._adam.param_groups)
        settle_rates(pairs, learning_rate=self._learning_rate_config)
        with torch.no_grad():
            self._state.take_back(state["optimizer"])
        restore_schedule(self._scheduler, saved=state["opt_param_scheduler"])


def _sum_over_tp(model: torch.nn.Module, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
    """Let autograd sum over TP the gradients of what every TP rank has whole and sees a part of the tokens or heads of.

    Megatron does so after the backward; DeepSpeed by then has reduced a gradient and cut it.
    """
    if group.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in model.named_parameters():
        by_tokens = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        by_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if parameter.requires_grad and (by_tokens or by_heads):
            parameter.register_hook(summed)
