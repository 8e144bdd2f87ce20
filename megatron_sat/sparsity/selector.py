"""One selector a sparse module: it measures tokens, scores, chooses, and holds the choice for the step.

A step's first forward chooses (``fresh``), or the step before left the sums behind and the choice is made
before any forward (``lagged``; without sums, as ``fresh``). Later micro-batches and recomputation reuse it.
Outside a step the module is dense. What needs other ranks is handed in as a function; this room knows no
process group.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from megatron_sat.sparsity.compact import Packing
from megatron_sat.sparsity.growing import regrow
from megatron_sat.sparsity.importance import METRICS, Needs
from megatron_sat.sparsity.neurons import Kept, Neurons
from megatron_sat.sparsity.noise import Noise, Part, Take
from megatron_sat.sparsity.place import Counted, Place, Weights
from megatron_sat.sparsity.selection import keep_count, select
from megatron_sat.sparsity.settings import SelectionConfig

Key = tuple[int, int]
"""What a choice was made for: the step its noise is drawn from, and how many units of the shard stay."""


class Selector:
    """Chooses one module's kept units, once a step."""

    def __init__(
        self,
        neurons: Neurons,
        *,
        place: Place,
        config: SelectionConfig,
        weights: Weights,
        add_ranks: Callable[[Tensor, Needs], Tensor],
    ) -> None:
        """add_ranks adds sums over the ranks that hold other tokens of this step; it may work in place.

        Raises ValueError where a selection group has fewer units than one multiple.
        """
        assert neurons.units % place.groups == 0, f"{place.groups} groups of {neurons.units} units"
        self.neurons, self.place, self.config = neurons, place, config
        self._metric = METRICS[config.importance]
        self._weights, self._add_ranks = weights, add_ranks
        self._scored = weights.row if self._metric.needs == "activations" else weights.column
        self._scored_shape = self._scored().shape  # now: a weight that is left in shards has none later
        self._take_noise: Take
        self.draw_with(Noise())
        self.packing: Packing | None = None
        self.left_out = False
        """Whether the module's layer takes no part at all in the step under way."""
        self.layer_scale = 1.0
        """What the step multiplies the module's output by for the layers that take no part."""
        self.counted: Counted | None = None
        """Of the forward under way; None: all tokens."""
        self._wanted: Key | None = None
        self._choice: Kept | None = None
        self._choice_key: Key | None = None
        self._measures = False
        self._sums: Tensor | None = None
        self.count(Fraction(0))  # refuses what could not be kept at any rate, before the first step
        self.visits = torch.zeros(neurons.units, dtype=torch.int32)
        self.visited_steps = 0

    def draw_with(self, noise: Noise) -> None:
        """Take the noise from there, with others."""
        place, units = self.place, self.neurons.units
        first, total = place.shard * units, units * place.num_shards
        self._take_noise = noise.join(
            Part(
                seed=self.config.seed, kind=place.kind, layer=place.layer, total=total, first=first, last=first + units
            )
        )

    # -- the step, driven by the controller

    def begin_step(
        self,
        *,
        rate: Fraction,
        draw: int,
        next_rate: Fraction,
        next_draw: int,
        packing: Packing | None = None,
    ) -> None:
        """Enter a step at omission ``rate`` with the noise of step ``draw``, the first of its interval.

        The next step's pair says whether this one must leave sums behind (``lagged``). packing: for layers that pack
        their weights for this step.
        """
        self.packing = packing
        self._wanted = self._key(rate, draw)
        lagged, weights_alone = self.config.statistics == "lagged", self._metric.needs == "nothing"
        following = self._key(next_rate, next_draw)
        self._measures = lagged and not weights_alone and following not in (None, self._wanted)
        sums, self._sums = self._sums, None  # they are the last step's: older ones are never used
        if weights_alone:
            sums = torch.ones(1)  # of no tokens: there is nothing to wait for
        if self._must_choose and sums is not None:
            self._choose(sums, pick=self.pick)

    def count_visits(self) -> None:
        """Note in ``visits`` what the step under way kept."""
        self.visits = self.visits.to(self._weights.column().device)
        if self.left_out:
            pass
        elif self.choice is not None:
            index = self.choice.index
            self.visits.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        elif self.keeps_all:
            self.visits += 1
        self.visited_steps += 1

    def end_step(self) -> None:
        """Leave the step: dense from here on."""
        self._wanted, self._measures, self.packing = None, False, None
        self.left_out, self.layer_scale = False, 1.0

    def forget(self) -> None:
        """Drop choice and sums, which a step that is not to be trusted may have left: the next one chooses anew."""
        self._choice, self._choice_key, self._sums = None, None, None

    @torch.no_grad()
    def kept(self, tokens: Tensor, activations: Callable[[], Tensor]) -> Kept | None:
        """What the module keeps in this step, chosen now if it is not yet; None: everything.

        tokens: [.., h], the module's input as this rank has it (a shard of the sequence under SP and CP).
        activations: gives [.., k], the input of the row-parallel weight in a dense forward of these tokens;
        called only by metrics that need it.
        """
        if not self.settled:
            self.settle(self.add(self.measure(tokens, activations)))
        return self.choice

    # -- what `kept` does, part by part, for those who record it

    def measure(self, tokens: Tensor, activations: Callable[[], Tensor]) -> Tensor:
        """[sums_width] fp32: what the metric sums over this rank's tokens, those that are `counted`."""
        by_activations = self._metric.needs == "activations"
        looked_at = activations() if by_activations else tokens
        if self.counted is None:
            return self._metric.sums(looked_at)
        count = self.counted.activations if by_activations else self.counted.inputs
        sums = self._metric.sums(looked_at.masked_fill(~count.unsqueeze(-1), 0))
        sums[-1] = count.sum()
        return sums

    def add(self, sums: Tensor) -> Tensor:
        """The sums of all ranks that hold other tokens of this step; maybe in place."""
        return self._add_ranks(sums, self._metric.needs)

    def settle(self, sums: Tensor, *, pick: Callable[[Tensor, Tensor | None], Tensor] | None = None) -> None:
        """Choose, and leave the sums for the next step: whatever this step asks for. pick: another `pick`."""
        if self._must_choose:
            self._choose(sums, pick=pick or self.pick)
        if self._measures:
            self._sums, self._measures = sums, False

    @torch.no_grad()
    def pick(self, sums: Tensor, noise: Tensor | None) -> Tensor:
        """[units_to_keep] int64, ascending: the units that stay. noise: [units] where it `samples`."""
        weight = self._scored()
        shape_alone = weight.new_empty(()).expand(self._scored_shape)
        weight = self._weights.whole(weight) if self._metric.reads_weight else shape_alone
        if self._metric.needs == "activations":
            scores = self.neurons.scores_of_columns(self._metric.score(weight, sums))
        else:
            scores = self.neurons.scores_of_rows(self._metric.score(self.neurons.scored_rows(weight), sums))
        if self.config.growing is not None:
            assert self._wanted is not None and noise is not None
            return regrow(
                scores,
                before=self._choice,
                groups=self.place.groups,
                keep=self.units_to_keep // self.place.groups,
                growing=self.config.growing,
                step=self._wanted[0],
                noise=noise,
            )
        return select(
            scores,
            groups=self.place.groups,
            keep=self.units_to_keep // self.place.groups,
            noise=noise,
            temperature=self.config.temperature,
        )

    # -- what is true in this step

    @property
    def units_to_keep(self) -> int:
        """How many; 0 where everything stays."""
        return 0 if self._wanted is None else self._wanted[1]

    @property
    def samples(self) -> bool:
        """Whether noise takes part in the choice."""
        return self.config.selection != "top-k"

    @property
    def sums_width(self) -> int:
        """Of what `measure` gives: a sum for each column of the weight that is scored, and the number of tokens."""
        return 1 if self._metric.needs == "nothing" else self._scored_shape[1] + 1

    @property
    def settled(self) -> bool:
        """Whether the next forward neither chooses nor measures: it depends on what it computes with alone."""
        return not self._must_choose and not self._measures

    @property
    def keeps_all(self) -> bool:
        """Whether everything stays: outside a step, and where the step's count is the whole shard."""
        return self._wanted is None

    @property
    def choice(self) -> Kept | None:
        """The choice in force; None where everything stays, and before the forward that chooses."""
        return None if self.keeps_all or self._must_choose else self._choice

    def count(self, rate: Fraction) -> int:
        """Units of this shard that stay at ``rate``, after quotas and floors. Raises as `keep_count` does."""
        size = self.neurons.units // self.place.groups
        return self.place.groups * keep_count(size, rate, multiple=self.place.multiple)

    @property
    def output_scale(self) -> float:
        """What the module's output is multiplied by: `layer_scale`, and 1 / (share kept) with ``inverse-keep``."""
        if self.config.rescale == "none" or self.choice is None:
            return self.layer_scale
        return self.layer_scale * float(1 / self.choice.keep_rate)

    # -- state for a checkpoint: tensors of this shard; `sharded_state` names those that run along the units

    def state(self) -> dict[str, Tensor]:
        """Copies of choice, visits and last sums, on the CPU.

        Names and shapes follow from the settings alone, so a checkpoint can be read back into them. The sums
        carry their metric's name, for another metric could not read them.
        """
        mask = torch.zeros(self.neurons.units, dtype=torch.uint8)
        if self._choice is not None:
            mask[self._choice.index.cpu()] = 1
        draw, count = self._choice_key or (0, 0)
        state = {
            "kept": mask,
            "visits": self.visits.to("cpu", copy=True),
            "chosen": torch.tensor([draw, count * self.place.num_shards, self._all_groups]),
            "visited_steps": torch.tensor([self.visited_steps]),
        }
        if self._metric.needs == "nothing":
            return state
        sums = torch.zeros(self.sums_width) if self._sums is None else self._sums.to("cpu", copy=True)
        return state | {self._sums_name: sums[:-1], "tokens": sums[-1:]}

    @property
    def sharded_state(self) -> frozenset[str]:
        """Names in `state` that run along the neurons, parts of the layer's whole; the others are whole."""
        along = {"kept", "visits"}
        return frozenset(along | {self._sums_name} if self._metric.needs == "activations" else along)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave, maybe cut for another TP size.

        Dropped are a choice made under other quotas and the sums of another metric. Raises ValueError where
        the state speaks of another number of units.
        """
        device, units = self._weights.column().device, self.neurons.units
        saved = state["kept"].numel()
        if saved != units:
            raise ValueError(
                f"the saved choice of {self.place.kind} {self.place.layer} must be of {units} units a shard, "
                f"as in this model, got {saved}; resume with the model and --sat-gqa of the saved run"
            )
        draw, count, groups = state["chosen"].tolist()
        self._choice, self._choice_key = None, None
        if draw and groups == self._all_groups:
            self._choice = Kept(index=state["kept"].nonzero().squeeze(1).to(device), units=units)
            self._choice_key = (draw, count // self.place.num_shards)
        self.visits = state["visits"].to(device, copy=True)
        self.visited_steps = int(state["visited_steps"])
        self._sums = None
        if self._sums_name in state and state["tokens"].item() > 0:
            self._sums = torch.cat([state[self._sums_name], state["tokens"]]).to(device)

    # -- inside

    def _key(self, rate: Fraction, draw: int) -> Key | None:
        """None where everything stays."""
        count = self.count(rate)
        return None if count == self.neurons.units else (draw, count)

    @property
    def _must_choose(self) -> bool:
        return self._wanted not in (None, self._choice_key)

    @property
    def _all_groups(self) -> int:
        return self.place.groups * self.place.num_shards

    @property
    def _sums_name(self) -> str:
        return f"{self.config.importance}_sums"

    def _choose(self, sums: Tensor, *, pick: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        assert self._wanted is not None
        self._weights.arrive()
        noise = self._take_noise(self._wanted[0], self._scored().device) if self.samples else None
        self._choice = Kept(index=pick(sums, noise), units=self.neurons.units)
        self._choice_key = self._wanted
