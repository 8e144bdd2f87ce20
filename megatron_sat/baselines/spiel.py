"""SpIEL-AG (Ansell et al., 2024): a few single weights of each matrix train, and which ones they are evolves.

All of a model is frozen. Each of its linear layers has k active entries with a change φ (`SparseLinear.delta`), the
only thing that is trained and has moments. Every S steps, beginning with the first, gradients are accumulated over γ
steps, of k candidates: those of the largest |dW| in the first backward of these steps. Then the p k smallest |φ| leave,
back to what they were pre-trained to, and as many candidates of the largest |Σ g| come, from φ = 0, with moments from
the accumulated gradients; who would leave and come stays as it is. p is 1 the first time, for the entries at the start
are random, and .2 (1 - t/T) after step t of T then. From its authors' code where the paper leaves it open.

Where it lies: the layer's weight is W + φ at any time, written entry by entry after each update, and `base` has what
the active entries of W were. So a forward is the dense layer's and nothing is added up in it; the gradient of a weight
lives until its entries are taken from it, one matrix at a time; what goes is restored bit for bit; and `merge` has
nothing to do but to let go. In a checkpoint delta, indices, base and candidates stand beside the weights.

Ours: a sample is the gradient of a step, unclipped, where the authors take each micro-batch's; the entries at the start
are one at random of each of k equal stretches of a matrix. Shapes: `k` active entries of a matrix of n, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from megatron_sat.baselines.spiel_adam import SpielAdamW
from megatron_sat.sparsity.selection import generator_of

INTERVAL, ACCUMULATE, REPLACED = 20, 5, Fraction(1, 5)
"""S, γ and the share that the second replacement would replace at step 0: of its authors."""
WEIGHT_DECAYS = (1.0, 3.0, 10.0, 30.0)
"""λ, as its authors tried them; their script has the last."""
LEARNING_RATE = 1e-5
"""Of their script; they tried 3e-6 to 1e-4."""


@dataclass(frozen=True, kw_only=True)
class SpielConfig:
    """What trains, and how it changes. Field names are the flags ``--spiel-*``."""

    rank: int
    """r: as many entries are active as LoRA of this rank would train, r times the sum of all layers' widths."""
    interval: int = INTERVAL
    """S, steps from one accumulation to the next."""
    accumulate: int = ACCUMULATE
    """γ, steps of an accumulation, at most S."""
    replaced: Fraction = REPLACED
    """Share of the active entries that would be replaced at step 0, in [0, 1]; it falls to 0 at the last step."""
    steps: int
    """T, of the whole run."""
    seed: int
    """Of the entries that are active at the start."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"--spiel-rank must be at least 1, got {self.rank}; its authors try 8 to 64")
        if not 1 <= self.accumulate <= self.interval:
            raise ValueError(
                f"--spiel-accumulate must be between 1 and --spiel-interval ({self.interval}), got {self.accumulate}; "
                f"its authors use {ACCUMULATE} of {INTERVAL}"
            )
        if not 0 <= self.replaced <= 1:
            raise ValueError(f"--spiel-replaced must be in [0, 1], got {self.replaced}; its authors use {REPLACED}")
        if self.steps <= self.accumulate:
            raise ValueError(
                f"a run with SpIEL must be longer than its first accumulation (--spiel-accumulate {self.accumulate}), "
                f"got {self.steps} steps: only entries at random would train; train longer, or accumulate over less"
            )

    def share(self, step: int) -> Fraction:
        """p: what a replacement after ``step`` (from 1) replaces of the active entries; exact."""
        return Fraction(1) if step == self.accumulate else self.replaced * (1 - Fraction(step, self.steps))


class SparseLinear(Module):
    """A frozen linear layer of which k entries train. Parameters: weight (W + φ), bias, delta (φ, fp32 [k])."""

    indices: Tensor
    """int [k], where in the flattened weight each entry of delta lies. Distinct."""
    base: Tensor
    """[k], W there, as pre-trained."""
    candidates: Tensor
    """int [k], where gradients are accumulated."""
    sums: Tensor
    """fp32 [k], the sum over steps of the candidates' gradients."""
    squares: Tensor
    """fp32 [k], that of their squares."""

    def __init__(
        self, linear: Linear, *, count: int, generator: torch.Generator, group: dist.ProcessGroup | None
    ) -> None:
        """The layer's own weight and bias, frozen from here on. count: k. group: the replicas; None: there is one."""
        super().__init__()
        self.linear_type, self.in_features, self.out_features = type(linear), linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        size, device = self.weight.numel(), self.weight.device
        places = _one_of_each_stretch(size, count=count, generator=generator)
        places = places.to(torch.int32 if size < 2**31 else torch.int64).to(device)
        self.delta = Parameter(torch.zeros(count, device=device))
        self.register_buffer("indices", places)
        self.register_buffer("base", self._flat[places.long()].clone())
        self.register_buffer("candidates", places.clone())
        self.register_buffer("sums", torch.zeros(count, device=device))
        self.register_buffer("squares", torch.zeros(count, device=device))
        self._group, self._watching, self._choosing = group, False, False
        self._of_step: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] to [.., out]."""
        weight: Tensor = _Taken.apply(self.delta, self) if torch.is_grad_enabled() else self.weight
        return F.linear(x, weight, self.bias)

    def begin_step(self, *, watch: bool, anew: bool) -> None:
        """watch: gradients of candidates are accumulated in this step. anew: and it is the first of those."""
        self._watching, self._choosing, self._of_step = watch, anew, None
        if anew:
            self.sums.zero_()
            self.squares.zero_()

    @torch.no_grad()
    def take(self, gradient: Tensor) -> Tensor:
        """The active entries [k] of a weight's gradient [out, in], which is not kept; also those of candidates."""
        flat = gradient.flatten()
        if self._watching:
            if self._choosing:
                self.candidates.copy_(flat.abs().topk(len(self.candidates), sorted=False).indices)
                if self._group is not None:  # the first replica's, for all
                    dist.broadcast(self.candidates, src=dist.get_global_rank(self._group, 0), group=self._group)
                self._choosing = False
            found = flat.index_select(0, self.candidates).float()
            self._of_step = found if self._of_step is None else self._of_step.add_(found)
        return flat.index_select(0, self.indices).to(self.delta.dtype)

    @torch.no_grad()
    def write(self) -> None:
        """After delta has changed: the weight's active entries are W + φ, in the weight's dtype."""
        self._flat[self.indices.long()] = (self.base + self.delta).to(self.weight.dtype)

    @torch.no_grad()
    def add_up(self) -> None:
        """After a step that was watched: its gradient, the mean over replicas as DDP's, is one sample."""
        assert self._of_step is not None
        if self._group is not None:
            dist.all_reduce(self._of_step, group=self._group)
            self._of_step /= self._group.size()
        self.sums += self._of_step
        self.squares.addcmul_(self._of_step, self._of_step)
        self._of_step = None

    @torch.no_grad()
    def replace(self, count: int) -> tuple[Tensor, Tensor]:
        """Let the ``count`` smallest |φ| go and as many candidates come, who does both stays.

        Returns int64 [c], c <= count, twice: which entries of delta are others now, and which candidates they are.
        """
        order = self.delta.abs().argsort(stable=True)
        leaving, staying = order[:count], order[count:]
        free = ~torch.isin(self.candidates, self.indices[staying])
        ranked = torch.where(free, self.sums.abs(), -1.0).argsort(descending=True, stable=True)
        best = ranked[: min(count, int(free.sum()))]
        new = best[~torch.isin(self.candidates[best], self.indices[leaving])]
        slots = leaving[~torch.isin(self.indices[leaving], self.candidates[best])][: len(new)]
        self._flat[self.indices[slots].long()] = self.base[slots]
        self.indices[slots] = self.candidates[new]
        self.base[slots] = self._flat[self.candidates[new].long()]
        self.delta[slots] = 0
        return slots, new

    def plain(self) -> Linear:
        """A linear layer with this one's weight and bias, which can be trained as a whole again."""
        linear = self.linear_type(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight.requires_grad_(True), self.bias
        if self.bias is not None:
            self.bias.requires_grad_(True)
        return linear.train(self.training)

    @property
    def _flat(self) -> Tensor:
        return self.weight.detach().view(-1)


class _Taken(torch.autograd.Function):
    """The layer's weight, whose gradient goes to delta: W + φ as a function of φ."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, layer: SparseLinear) -> Tensor:
        ctx.layer = layer
        return layer.weight.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.take(gradients[0]), None


class Spiel:
    """Takes a model through the steps of SpIEL-AG; makes it a plain one again."""

    def __init__(
        self, model: Module, *, names: Sequence[str], config: SpielConfig, group: dist.ProcessGroup | None = None
    ) -> None:
        """Freeze all of ``model``, and make its linear layers of these names sparse, in place.

        names: last part of a layer's name. group: the replicas that train together, with the same batches a step.
        Raises ValueError for a model without such layers, with weights in shards, or smaller than the budget.
        """
        found = {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in names}
        linears = {name: layer for name, layer in found.items() if isinstance(layer, Linear)}
        if not linears or len(linears) < len(found):
            raise ValueError(
                f"a model for SpIEL must have linear layers {', '.join(names)}, and torch's own, it has "
                f"{', '.join(found) or 'none'}; give a plain Llama, Mistral or Qwen model"
            )
        if any(hasattr(layer.weight, "ds_shape") for layer in linears.values()):
            raise ValueError("SpIEL needs whole weights, ZeRO-3 has left them in shards; use DDP")
        self.model, self.config = model.requires_grad_(False), config
        self.layers: dict[str, SparseLinear] = {}
        for (name, linear), count in zip(linears.items(), budget(list(linears.values()), config.rank), strict=True):
            generator = generator_of(f"{config.seed}/{name}")
            layer = SparseLinear(linear, count=count, generator=generator, group=group)
            self.layers[name] = layer.train(linear.training)
            model.set_submodule(name, layer)
        self._step = 0
        self._optimizer: SpielAdamW | None = None

    def optimizer(self, *, lr: float, weight_decay: float) -> SpielAdamW:
        """The one that trains; it must be this one, whose moments come and go with the entries."""
        deltas = [layer.delta for layer in self.layers.values()]
        self._optimizer = SpielAdamW(deltas, lr=lr, weight_decay=weight_decay)
        return self._optimizer

    def begin_step(self, step: int) -> None:
        """Before the forward of ``step``, from 1; a resumed run begins with the one after its checkpoint's."""
        self._step = step
        at = (step - 1) % self.config.interval
        for layer in self.layers.values():
            layer.begin_step(watch=at < self.config.accumulate, anew=at == 0)

    def end_step(self) -> None:
        """After its update: the weights follow, and entries come and go."""
        at = (self._step - 1) % self.config.interval
        for layer in self.layers.values():
            layer.write()
            if at < self.config.accumulate:
                layer.add_up()
        if at == self.config.accumulate - 1:
            self._replace(self.config.share(self._step))

    def merge(self) -> Module:
        """The model with plain layers again, and what was learned in their weights. This object is of no use then."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.plain())
        return self.model.requires_grad_(True)

    def _replace(self, share: Fraction) -> None:
        optimizer, samples = self._optimizer, self.config.accumulate
        assert optimizer is not None
        for layer in self.layers.values():
            slots, new = layer.replace(int(len(layer.delta) * share))
            mean, square = layer.sums[new] / samples, layer.squares[new] / samples
            optimizer.plant(layer.delta, where=slots, mean=mean, square=square, age=samples)


def budget(linears: Sequence[Linear], rank: int) -> list[int]:
    """k of each layer: what LoRA of ``rank`` has to train in all of them, shared out by size, rounded down.

    Raises ValueError where that is nothing for a layer, or more than it has.
    """
    sizes = [layer.weight.numel() for layer in linears]
    whole = rank * sum(sum(layer.weight.shape) for layer in linears)
    counts = [whole * size // sum(sizes) for size in sizes]
    if min(counts) < 1 or whole > sum(sizes):
        raise ValueError(
            f"--spiel-rank must leave each layer between one entry and all of them, {rank} gives {whole} of "
            f"{sum(sizes)} in {len(sizes)} layers; try {max(1, sum(sizes) // (2 * whole) * rank)}"
        )
    return counts


def _one_of_each_stretch(size: int, *, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count], ascending: an entry at random of each of ``count`` equal stretches of ``size``."""
    edges = torch.arange(count + 1) * size // count
    length = edges[1:] - edges[:-1]
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return edges[:-1] + (drawn * length).long().clamp(max=length - 1)
