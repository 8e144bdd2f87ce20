"""One attention or MLP of a Hugging Face model whose neurons are chosen once a step.

The module's own forward computes, with linear layers that are cut for the call: a hook before it chooses and cuts, a
hook behind it makes the layers whole again. So whatever transformers does in between (rotary embeddings, norms of Q and
K, eager, SDPA or flash attention, checkpointing) is transformers' own; it takes the number of heads from the shapes.
A module is sparse in a step and in training mode; else it is transformers' module and nothing else.

Shapes are transformers', batch first: [b, s, h].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear, Module

from megatron_sat.hf.cut import Cut, CutLinear, Packs, make_cuttable, make_plain, pack
from megatron_sat.hf.neurons import SplitHeads
from megatron_sat.shards import whole_shape, whole_weight
from megatron_sat.sparsity.controller import Entry
from megatron_sat.sparsity.importance import METRICS, Needs
from megatron_sat.sparsity.neurons import Kept, Neurons
from megatron_sat.sparsity.selector import Place, SelectionConfig, Selector, Weights


@dataclass(kw_only=True)
class Moment:
    """What the model's forward under way tells its blocks."""

    real: Tensor | None = None
    """[b, s] bool, which tokens are text and not filling; None: all of them."""
    step: object | None = None
    """Stands for the step whose weights are packed; None: weights are gathered in every forward."""
    last: bool = True
    """Whether the forward's backward is the step's last one."""


class _SeenError(Exception):
    """A look has seen what it wanted: what would follow need not be computed."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.activations = activations


def _stop_at(activations: Tensor) -> None:
    raise _SeenError(activations)


class SparseBlock:
    """The hooks of one attention or MLP, its selector, and the layers it cuts."""

    def __init__(
        self,
        module: Module,
        *,
        columns: Sequence[Linear],
        row: Linear,
        neurons: Neurons,
        rows_of_each: Callable[[Tensor], Sequence[Tensor]],
        place: Place,
        config: SelectionConfig,
        moment: Moment,
    ) -> None:
        """columns: q, k, v or gate, up; row: o or down: the layers that the module's forward calls.

        rows_of_each: for each of ``columns`` its rows, counted from 0, that belong to given units alone.
        """
        self.module, self._neurons, self._rows_of_each, self._moment = module, neurons, rows_of_each, moment
        self._columns = [make_cuttable(layer) for layer in columns]
        self._row = make_cuttable(row)
        self._shared = config.dp_selection == "shared"
        self._cuts: tuple[Kept, list[tuple[CutLinear, Tensor, int]]] | None = None
        self._packs: list[Packs] = []
        self._packed_for: object | None = None
        self.selector: Selector | None = Selector(
            neurons, place=place, config=config, weights=self._weights(config), add_ranks=self._add_ranks
        )
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            # also where the forward ends early, as recomputation does when it has what it wants
            module.register_forward_hook(self._behind, always_call=True),
        ]

    def remove(self) -> None:
        """Take everything off the module; it is transformers' again."""
        for hook in self._hooks:
            hook.remove()
        for layer in [*self._columns, self._row]:
            make_plain(layer)

    @property
    def layers(self) -> list[CutLinear]:
        """q, k, v, o or gate, up, down."""
        return [*self._columns, self._row]

    @property
    def in_place(self) -> bool:
        """Whether the module still has its layers, and not what wraps or replaced them."""
        children = [id(child) for child in self.module.children()]
        return all(id(layer) in children for layer in self.layers)

    def entries(self, index: Tensor) -> list[Entry]:
        """Parameter entries of the units ``index`` alone: rows of the first layers, columns of the last."""
        rows = self._rows_of_each(index)
        found: list[Entry] = []
        for layer, of_layer in zip(self._columns, rows, strict=True):
            if of_layer.numel():
                found += [(parameter, 0, of_layer) for parameter in layer.parameters()]
        weight: Any = self._row.weight
        return [*found, (weight, 1, self._neurons.columns(index))]

    def drop_packs(self) -> bool:
        """After a step: let the packed weights go. Whether gradients were waiting in one of them."""
        waiting = any(packs.waiting for packs in self._packs)
        self._packs, self._packed_for = [], None
        return waiting

    # -- around the module's forward

    def _before(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.selector is not None
        kept = None
        if module.training:
            kept = self.selector.choice if self.selector.settled else self._choose(args, kwargs)
        self._cut(kept)

    def _behind(self, module: Module, args: tuple[Any, ...], output: Any) -> None:
        self._cut(None)

    @torch.no_grad()  # a tensor saved for a backward here would be missing in recomputation, which finds it chosen
    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept | None:
        assert self.selector is not None
        tokens: Tensor = args[0] if args else kwargs["hidden_states"]
        return self.selector.kept(
            self._text_of(tokens), lambda: self._text_of(self._dense_activations(args, kwargs))
        )

    def _text_of(self, tokens: Tensor) -> Tensor:
        """[b, s, w] with zeros for filling, which then adds nothing to a sum; `_add_ranks` corrects the count."""
        real = self._moment.real
        if real is None:
            return tokens
        if real.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must have an entry for each token of a sparse step, {tuple(tokens.shape[:2])}, got "
                f"{tuple(real.shape)}; train without a cache of keys and values, or leave the mask out"
            )
        return tokens.masked_fill(~real[..., None], 0)

    def _dense_activations(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """[b, s, k]: the last layer's input when every neuron takes part."""
        if "past_key_values" in kwargs:
            kwargs = kwargs | {"past_key_values": None}  # a look leaves nothing in a cache
        self._cut(None)
        self._row.observe = _stop_at
        try:
            with torch.no_grad(), self._without_dropout():
                self.module.forward(*args, **kwargs)
        except _SeenError as seen:
            return seen.activations
        finally:
            self._row.observe = None
        raise AssertionError("an attention or MLP runs its last linear layer")

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Evaluation mode for a while: had a look drawn random numbers, recomputation would draw others."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    # -- the layers

    def _cut(self, kept: Kept | None) -> None:
        """Cut the layers to what is kept (None: make them whole), and tell the attention how many heads share a key."""
        neurons = self._neurons
        if isinstance(neurons, SplitHeads) and not neurons.whole_groups:
            heads = neurons.units if kept is None else kept.count
            self.module.num_key_value_groups = heads // neurons.groups  # type: ignore[assignment]
        for layer in self.layers:
            layer.cut = None
        if kept is None:
            return
        assert self.selector is not None
        if self._cuts is None or self._cuts[0] is not kept:  # once a choice, not for every micro-batch
            self._cuts = kept, self._layers_to_cut(kept)
            self._packed_for = None
        cuts, moment = self._cuts[1], self._moment
        if moment.step is not None and self._packed_for is not moment.step:
            self._packs = [pack(layer, index, dim=dim) for layer, index, dim in cuts]
            self._packed_for = moment.step
        packs = self._packs if moment.step is not None else [None] * len(cuts)
        for (layer, index, dim), packed in zip(cuts, packs, strict=True):
            scale = self.selector.output_scale if dim == 1 else 1.0
            layer.cut = Cut(index=index, dim=dim, scale=scale, packs=packed, last=moment.last)

    def _layers_to_cut(self, kept: Kept) -> list[tuple[CutLinear, Tensor, int]]:
        rows = self._rows_of_each(kept.index)
        cut = [(layer, mine, 0) for layer, mine in zip(self._columns, rows, strict=True) if mine.numel()]
        return [*cut, (self._row, self._neurons.columns(kept.index), 1)]

    # -- what the selector asks for

    def _weights(self, config: SelectionConfig) -> Weights:
        """Stand-ins of the right shape; the values, put together from several layers, only where they are scored."""
        columns, row = [layer.weight for layer in self._columns], self._row.weight
        rows, width = sum(whole_shape(weight)[0] for weight in columns), whole_shape(row)
        hidden = whole_shape(columns[0])[1]
        by_columns = METRICS[config.importance].needs == "activations"

        def whole(_: Tensor) -> Tensor:
            return whole_weight(row) if by_columns else torch.cat([whole_weight(weight) for weight in columns])

        return Weights(
            column=lambda: columns[0].detach().new_empty(()).expand(rows, hidden),
            row=lambda: row.detach().new_empty(()).expand(width),
            whole=whole,
        )

    def _add_ranks(self, sums: Tensor, needs: Needs) -> Tensor:
        """Sums of this rank's tokens, then, where replicas choose alike, of all ranks'."""
        if needs == "nothing":
            return sums
        if self._moment.real is not None:
            sums[-1] = self._moment.real.sum()
        if self._shared and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return sums


