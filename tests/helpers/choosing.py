"""Selectors over small modules without Megatron: 16 gated channels or 8 query groups of 2 heads, or part."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.sparsity.controller import Entry
from megatron_sat.sparsity.importance import METRICS, Needs
from megatron_sat.sparsity.neurons import Channels, Heads, Kept, Neurons
from megatron_sat.sparsity.place import Place, Weights
from megatron_sat.sparsity.selector import SelectionConfig, Selector

WIDTH, CHANNELS, GROUPS, PER_GROUP, HEAD_DIM = 6, 16, 8, 2, 2
HALF = Fraction(1, 2)


def random(*shape: int, seed: int) -> Tensor:
    """[shape] standard normal, the same for the same seed."""
    # crc32: torch's generator gives neighbouring seeds alike first numbers
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(str(seed).encode())))


def tokens_of(number: int) -> Tensor:
    """[3, 2, WIDTH]: the ``number``-th micro-batch, its columns with means of their own."""
    return random(3, 2, WIDTH, seed=100 + number) + random(WIDTH, seed=200 + number)


class SmallModule:
    """What a controller asks of a sparse module, and a record of what its selector asked for."""

    def __init__(
        self,
        kind: Literal["attention", "mlp"] = "mlp",
        *,
        layer: int = 3,
        shard: int = 0,
        num_shards: int = 1,
        multiple: int = 1,
        others: Tensor | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        """The ``shard``-th of ``num_shards`` equal parts. others: what ranks with other tokens would measure.

        settings: of SelectionConfig; here with 4 selection groups and a temperature at which noise and scores
        both matter, unless they say otherwise.
        """
        self.config = SelectionConfig(**{"selection_groups": 4, "temperature": 1.0} | settings)
        cut = CHANNELS // num_shards if kind == "mlp" else GROUPS // num_shards
        head_columns = PER_GROUP * HEAD_DIM
        columns = cut if kind == "mlp" else cut * head_columns
        part = slice(shard * columns, (shard + 1) * columns)
        if kind == "mlp":
            both = random(2, CHANNELS, WIDTH, seed=1)[:, part]
            whole_columns, fused = CHANNELS, both.reshape(-1, WIDTH)
        else:
            whole_columns = GROUPS * head_columns
            fused = random(GROUPS, (PER_GROUP + 2) * HEAD_DIM, WIDTH, seed=2).chunk(num_shards)[shard]
        self.column = Parameter(fused.reshape(-1, WIDTH).to(device, copy=True))
        self.row = Parameter(random(WIDTH, whole_columns, seed=3)[:, part].to(device, copy=True))
        self._inner = random(WIDTH, whole_columns, seed=4)[:, part].to(device)
        self._others = others
        self.asked: list[Needs] = []
        """What sums were added over ranks, in order."""
        self.dense_forwards = 0
        self.arrivals = 0
        """How often the weights were waited for."""
        self.late: Tensor | None = None
        """What the column weight becomes when it is waited for."""
        self.selector: Selector | None = Selector(
            self._neurons(kind, cut),
            place=Place(
                kind=kind,
                layer=layer,
                shard=shard,
                num_shards=num_shards,
                groups=self._groups(kind, cut, num_shards),
                multiple=multiple,
            ),
            config=self.config,
            weights=Weights(column=lambda: self.column, row=lambda: self.row, arrive=self._arrive),
            add_ranks=self._add_ranks,
        )

    def _neurons(self, kind: str, cut: int) -> Neurons:
        if kind == "mlp":
            return Channels(units=cut, gated=True, score_source=self.config.swiglu_score)
        whole = self.config.gqa == "group"
        return Heads(groups=cut, heads_per_group=PER_GROUP, head_dim=HEAD_DIM, whole_groups=whole)

    def _groups(self, kind: str, cut: int, num_shards: int) -> int:
        """Heads that leave singly have a quota in every query group."""
        if kind == "attention" and self.config.gqa == "head":
            return cut
        return self.config.selection_groups // num_shards

    def _arrive(self) -> None:
        self.arrivals += 1
        if self.late is not None:
            self.column.data.copy_(self.late)

    def _add_ranks(self, sums: Tensor, needs: Needs) -> Tensor:
        self.asked.append(needs)
        if self._others is None:
            return sums
        return sums + METRICS[self.config.importance].sums(self._seen(self._others, needs))

    def _seen(self, tokens: Tensor, needs: Needs) -> Tensor:
        return self.activations(tokens) if needs == "activations" else tokens

    def activations(self, tokens: Tensor) -> Tensor:
        """[.., columns] what a dense forward would hand to the row-parallel weight."""
        return tokens @ self._inner

    def forward(self, tokens: Tensor) -> list[int] | None:
        """One micro-batch: what it computes, None for everything."""
        kept = self.kept(tokens)
        return None if kept is None else kept.index.tolist()

    def kept(self, tokens: Tensor) -> Kept | None:
        """As `forward`, left on the module's device."""

        def dense_forward() -> Tensor:
            self.dense_forwards += 1
            assert not torch.is_grad_enabled()
            return self.activations(tokens)

        return self.chooser.kept(tokens, dense_forward)

    @property
    def chooser(self) -> Selector:
        """The selector, which is there."""
        assert self.selector is not None
        return self.selector

    def entries(self, index: Tensor) -> list[Entry]:
        """As the sparse layers name them."""
        neurons = self.chooser.neurons
        return [(self.column, 0, neurons.rows(index)), (self.row, 1, neurons.columns(index))]


@contextmanager
def in_step(
    module: SmallModule,
    step: int,
    *,
    rate: Fraction = HALF,
    next_rate: Fraction | None = None,
    interval: int = 1,
) -> Iterator[Selector]:
    """What the controller does to one selector around ``step``."""
    selector = module.chooser

    def first_of(t: int) -> int:
        return t - (t - 1) % interval

    following = rate if next_rate is None else next_rate
    selector.begin_step(rate=rate, draw=first_of(step), next_rate=following, next_draw=first_of(step + 1))
    yield selector
    selector.count_visits()
    selector.end_step()


def choose(module: SmallModule, step: int = 1, *, number: int = 1, **changes: Any) -> list[int] | None:
    """What ``module`` keeps in ``step`` when its only micro-batch is the ``number``-th.

    changes: of `in_step`.
    """
    with in_step(module, step, **changes):
        return module.forward(tokens_of(number))


def choose_over(
    num_shards: int, *args: Any, step: int = 1, rate: Fraction = HALF, **settings: Any
) -> list[int]:
    """The choices of all shards of one layer, numbered through the layer. settings: of `SmallModule`."""
    chosen = []
    for shard in range(num_shards):
        module = SmallModule(*args, shard=shard, num_shards=num_shards, **settings)
        index = choose(module, step, rate=rate)
        assert index is not None
        chosen += [unit + shard * module.chooser.neurons.units for unit in index]
    return chosen
