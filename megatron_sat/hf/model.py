"""`sparsify`: a transformers model that computes, in each step, with the heads and channels that matter most.

The model stays the object it was: the same parameters under the same names, the same classes but for its linear layers.
Outside a step, and in evaluation mode, it is transformers' model bit for bit, so evaluation, generation and
``save_pretrained`` need no care.

The mathematics, and every setting, are those of `megatron_sat.sparsity`; docs/method.md says what each one does. The
noise is drawn by (seed, step, layer, neuron) as everywhere else in this program.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from megatron_sat.hf.block import Moment, SparseBlock
from megatron_sat.hf.family import Part, parts_of
from megatron_sat.hf.frozen import Freezer
from megatron_sat.sparsity.controller import Controller, Entry
from megatron_sat.sparsity.neurons import Channels
from megatron_sat.sparsity.schedule import Schedule
from megatron_sat.sparsity.selection import keep_count
from megatron_sat.sparsity.selector import Place, SelectionConfig

PAPER = SelectionConfig(importance="maxip", selection="sampling", temperature=0.05, selection_interval=1)
"""A new choice every step."""


def sparsify(model: Module, *, schedule: Schedule, selection: SelectionConfig = PAPER) -> "SparseModel":
    """Make the attentions and MLPs of a transformers model sparse in its steps; returns what opens them.

    model: a Llama, Mistral, Qwen2 or Qwen3 with any head, not yet wrapped (by DDP, DeepSpeed, peft, torch.compile).
    selection: its fields are the flags ``--sat-*``, which its errors name.

    Raises ValueError for another model, for layers that are not torch's, for omission in other than both passes, for
    MST's choices, and where selection groups or the channel multiple do not fit the model. The model is unchanged then.
    """
    if selection.omit != "both":
        raise ValueError(
            f"--sat-omit must be both inside transformers models, got {selection.omit}; pretrain_sat.py has others"
        )
    if selection.growing is not None:
        raise ValueError(
            f"--sat-selection must be sampling or top-k inside transformers models, got {selection.selection}; "
            "pretrain_sat.py --baseline mst-structured has it"
        )
    parts = parts_of(model, config=selection)
    places = [_place(part, config=selection) for part in parts]
    moment = Moment()
    blocks = [
        SparseBlock(
            part.module,
            columns=part.columns,
            row=part.row,
            neurons=part.neurons,
            rows_of_each=part.rows_of_each,
            place=place,
            config=selection,
            moment=moment,
        )
        for part, place in zip(parts, places, strict=True)
    ]
    return SparseModel(model, blocks=blocks, moment=moment, schedule=schedule, selection=selection)


class SparseModel:
    """Opens and closes the steps of the model that `sparsify` was given."""

    def __init__(
        self,
        model: Module,
        *,
        blocks: list[SparseBlock],
        moment: Moment,
        schedule: Schedule,
        selection: SelectionConfig,
    ) -> None:
        self.model, self.schedule, self.selection = model, schedule, selection
        self.controller = Controller(blocks, schedule=schedule, interval=selection.selection_interval)
        self._blocks, self._moment = blocks, moment
        self._open: AbstractContextManager[None] | None = None
        self._is_last: Callable[[], bool] | None = None
        body: Any = getattr(model, "base_model", model)  # where every head hands its attention_mask
        self._hook = body.register_forward_pre_hook(self._before, with_kwargs=True)

    # -- steps

    @contextmanager
    def step(self, step: int, *, micro_batches: int | None = None) -> Iterator[None]:
        """Step ``step`` (from 1): forwards and backwards inside are sparse, outside all is dense.

        micro_batches: forwards of the model, each followed by its backward, that the step has; then weights are cut
        once for all of them, and gradients arrive with the last. None: they are cut in each.
        A step whose body raises is not counted and leaves nothing behind.
        Raises ValueError where the schedule has no such step, and where there are more or fewer micro-batches.
        """
        self.open(step, is_last=None if micro_batches is None else _Countdown(micro_batches))
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.close()

    def open(self, step: int, *, is_last: Callable[[], bool] | None = None) -> None:
        """Begin `step` by hand. is_last: asked at each forward whether it is the step's last; None: cut in each.

        Raises ValueError where the schedule has no such step, and where one is open.
        """
        if self._open is not None:
            raise ValueError(
                f"step {step} must begin after the one before it ended, which is open still; close() it, or abandon() "
                "one that failed"
            )
        context = self.controller.step(step)
        context.__enter__()
        self._open, self._is_last = context, is_last
        self._moment.step = None if is_last is None else object()

    def close(self) -> None:
        """End it. Raises ValueError where none is open, and where gradients still wait for a last micro-batch."""
        if self._open is None:
            raise ValueError("a step must be open to be closed, none is; open() it before, or use `with step(...)`")
        context, self._open = self._open, None
        context.__exit__(None, None, None)
        if self._forget_forward():
            raise ValueError(
                "micro_batches must be the number of forwards with a backward in a step, there were fewer: the step's "
                "gradients were not handed over; say the true number, or none"
            )

    def abandon(self) -> None:
        """End a step that failed, if one is open: nothing of it is counted or kept."""
        if self._open is None:
            return
        context, self._open = self._open, None
        failed = _AbandonedError()
        try:
            context.__exit__(_AbandonedError, failed, None)
        finally:
            self._forget_forward()
        self.controller.forget()

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def freeze_omitted(self, optimizer: Optimizer) -> Freezer:
        """From now on an update leaves what its step omits bit for bit as it was (``--sat-omitted-neurons frozen``).

        optimizer: torch's own, whose steps are made inside `step`; one outside raises ValueError.
        """
        return Freezer(optimizer, entries=self._omitted)

    def _omitted(self) -> Iterable[Entry]:
        if self._open is None:
            raise ValueError(
                "an update that leaves omitted neurons as they were must be made inside its step, none is open; move "
                "optimizer.step() into the block of sparse.step(), or leave freeze_omitted out"
            )
        return self.controller.omitted_entries()

    # -- what was done

    def omission_rates(self, step: int) -> dict[str, float]:
        """By kind ("attention", "mlp") the share of units that ``step`` leaves out, after quotas and floors."""
        return self.controller.omission_rates(step)

    def rate(self, step: int) -> Fraction:
        """What the schedule asks for."""
        return self.schedule.rate(step)

    @property
    def intact(self) -> bool:
        """Whether the model still computes with the layers that are cut, and not with what replaced them."""
        return all(block.in_place for block in self._blocks)

    def remove(self) -> None:
        """Make the model transformers' own again, whole."""
        self.abandon()
        self._hook.remove()
        for block in self._blocks:
            block.remove()

    # -- inside

    def _before(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the body: which tokens are text, and whether it is the step's last."""
        self._moment.real = None
        if self._open is None or not body.training:
            return
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # one of 4 dimensions speaks of pairs, not of tokens
            self._moment.real = mask.bool()
        self._moment.last = True if self._is_last is None else self._is_last()

    def _forget_forward(self) -> bool:
        """Drop what the last forward said and what was packed; whether gradients were lost with it."""
        self._moment.real, self._moment.step, self._moment.last, self._is_last = None, None, True, None
        waiting = [block.drop_packs() for block in self._blocks]
        return any(waiting)


class _AbandonedError(Exception):
    """What the controller is told of a step that failed."""


class _Countdown:
    """Answers at each of a step's forwards whether it is the last."""

    def __init__(self, micro_batches: int) -> None:
        self._all = self._left = micro_batches

    def __call__(self) -> bool:
        self._left -= 1
        if self._left < 0:
            raise ValueError(
                f"micro_batches must be the number of forwards in a step, got {self._all} and one more forward; say "
                "the true number, or evaluate outside the step"
            )
        return self._left == 0


def _place(part: Part, *, config: SelectionConfig) -> Place:
    """Raises ValueError where quotas and multiples do not fit."""
    neurons, groups, multiple, noun = part.neurons, config.selection_groups, 1, "query groups"
    if isinstance(neurons, Channels):
        multiple, noun = config.channel_multiple, "channels"
    elif not neurons.whole_groups:
        groups = neurons.groups  # heads that leave singly have their quota in every query group
    if neurons.units % groups:
        raise ValueError(
            f"--sat-selection-groups ({groups}) must divide the {noun} ({neurons.units}) of {part.name}; try 1"
        )
    keep_count(neurons.units // groups, Fraction(0), multiple=multiple)  # refuses what could never be kept
    return Place(kind=part.kind, layer=part.layer, shard=0, num_shards=1, groups=groups, multiple=multiple)
