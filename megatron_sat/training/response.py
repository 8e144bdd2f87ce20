"""What is done about a bad step: named by rank and documents, then passed over, taken back, or the end of the run.

*stop* ends the run before the step has touched anything. *skip* leaves weights, moments and learning-rate schedule as
they were before the step. *rollback* puts those of the last checkpoint back, so that whatever led there is gone too.
Under both the step counts as done and its samples as read, as a step of fp16 that overflowed: sample i belongs to the
same step in every run, and a resumed run needs to know nothing of it. Choices that the bad numbers may have led to are
dropped; the next step chooses anew.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_sat import log
from megatron_sat.data.whereabouts import Whereabouts, whereabouts
from megatron_sat.distributed import Layout
from megatron_sat.engines.base import Engine, StepResult
from megatron_sat.engines.veto import Judged
from megatron_sat.sparsity.controller import Controller
from megatron_sat.training.guard import Finding, Guard

MAX_NAMED = 8
"""Documents named of one sample."""


class BadStep(RuntimeError):
    """A step that ends the run, on all ranks alike. Its text is for the user."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """How the training samples are dealt out, to find those of a micro-batch again."""

    dataset: Dataset
    names: Mapping[str, str]
    """Prefix of a data set to the name of its domain."""
    micro_batch_size: int
    dp_size: int

    def of(self, micro_batch: int, *, dp_rank: int, first: int) -> range:
        """The samples of a replica's micro-batch in the step whose first sample is ``first``."""
        start = first + (micro_batch * self.dp_size + dp_rank) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)

    def documents(self, sample: int) -> str:
        """Domain and documents of a sample, in words."""
        places = whereabouts(self.dataset, sample)
        return " and ".join(map(self._named, places)) or "of unknown documents"

    def _named(self, place: Whereabouts) -> str:
        named = ", ".join(map(str, place.documents[:MAX_NAMED])) + (" ..." if len(place.documents) > MAX_NAMED else "")
        return f"{self.names.get(place.prefix, place.prefix)} {named}"


def worst_micro_batch(engine: Engine, *, layout: Layout, samples: Samples, first: int) -> str:
    """The micro-batch with the highest loss of the step just computed, or whose loss is no number: its rank, samples
    and documents, in words. Collective.

    first: the step's first sample of the global order.
    """
    mine = engine.micro_batch_losses if isinstance(engine, Judged) else []
    everyone: list[tuple[int, int, list[float]]] = [(0, 0, [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (dist.get_rank(), layout.dp_rank, mine))
    found = [
        (not math.isfinite(loss), 0.0 if not math.isfinite(loss) else loss, -rank, -at, dp_rank, loss)
        for rank, dp_rank, losses in everyone
        for at, loss in enumerate(losses)
    ]
    if not found:
        return f"in the step's samples from {first} on"
    *_, minus_rank, minus_at, dp_rank, loss = max(found, key=lambda one: one[:4])
    read = samples.of(-minus_at, dp_rank=dp_rank, first=first)
    texts = "; ".join(f"sample {sample}: {samples.documents(sample)}" for sample in read)
    return f"highest on rank {-minus_rank}, micro-batch {-minus_at + 1}, loss {loss:.4f} (documents of {texts})"


class Response:
    """The policy at work."""

    def __init__(
        self, guard: Guard, *, engine: Engine, controller: Controller, roll_back: Callable[[], int | None]
    ) -> None:
        """roll_back: puts the run's last checkpoint back, on all ranks; its step, or None where there is none.

        Raises ValueError for an engine that cannot skip.
        """
        self.guard, self._engine, self._controller, self._roll_back = guard, engine, controller, roll_back
        if isinstance(engine, Judged):
            engine.judge(guard.permits)
        elif guard.config.on_bad_step == "skip":
            raise ValueError(
                "--on-bad-step skip needs an engine that can ask before it updates, this one cannot; use --on-bad-step "
                "rollback, or --engine megatron"
            )

    def settle(self, step: int, *, finding: Finding, result: StepResult, where: Callable[[], str]) -> None:
        """Book a step with the finding that all ranks agreed on, and act on a bad one; collective where it is bad.

        where: names the culprits, asked only for a bad step. Raises BadStep where the run ends.
        """
        guard, policy = self.guard, self.guard.config.on_bad_step
        guard.enter(finding, result=result)
        if finding is Finding.NONE:
            return
        what = f"step {step}: {guard.explain(finding, loss=result.loss)}; {where()}"
        if guard.gives_up:
            raise BadStep(f"{what}. {self._why_it_ends()}")
        self._controller.forget()
        if policy == "skip":
            log.say(f"{what}. The step is skipped; nothing was updated")
            return
        back = self._roll_back()
        if back is None:
            raise BadStep(f"{what}. There is no checkpoint yet to roll back to; lower --save-interval")
        self._controller.forget()
        log.say(f"{what}. Rolled back: weights and moments are those of step {back}, the data go on behind this step")

    def _why_it_ends(self) -> str:
        if self.guard.config.on_bad_step == "stop":
            return (
                "The run ends and saves nothing: resume from the last checkpoint, with --on-bad-step skip or rollback "
                "to pass over such steps"
            )
        return (
            f"That is bad step {self.guard.bad_steps}, --max-bad-steps is {self.guard.config.max_bad_steps}: the run "
            "ends and saves nothing; look at data and learning rate before it goes on"
        )
