"""What text costs a model: nats of every scored token, summed. For Megatron's models in any layout, and transformers'.

The softmax runs over the ids that text can have. Rows of the embedding beyond them are padding, of Megatron's or of
the model's own: they are left out, in both kinds of model alike. Logits stay where they are: each TP rank reduces its
part of the vocabulary to two numbers a token, and only these travel. Legend: `b` windows, `s` tokens, `v` rows, `p` TP
size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_sat.distributed import Layout
from megatron_sat.evaluate.windows import UNSCORED, Batch

Scorer = Callable[[Sequence[Batch]], float]
"""Nats of all scored tokens of the batches; 0 on a rank that does not have the head, or whose TP neighbour tells."""
_ELEMENTS = 1 << 26
"""Logits that are cast to fp32 at a time: 256 MiB."""


def megatron_scorer(chunks: Sequence[nn.Module], *, layout: Layout, vocab_size: int) -> Scorer:
    """Scores with our model, dense and in evaluation mode; collective among the ranks of one replica.

    chunks: of this rank; no interleaving, no context parallelism. vocab_size: ids that text can have.
    """
    device = next(chunks[0].parameters()).device

    @torch.no_grad()
    def score(batches: Sequence[Batch]) -> float:
        waiting = iter(batches)

        def step(_: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
            batch = next(waiting)
            tokens, labels = batch.tokens.to(device), batch.labels.to(device)
            positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)

            def sum_up(logits: Tensor, non_loss_data: bool = True) -> Tensor:
                first = layout.tp_rank * logits.shape[-1]
                values = nats(logits, labels, first_row=first, vocab_size=vocab_size, tp_group=layout.tp_group)
                return _sum(values, labels)

            return chunk(tokens, positions, None), sum_up

        rows, length = batches[0].tokens.shape
        sums = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(()) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return sum(value.item() for value in sums) if layout.tp_rank == 0 else 0.0

    return score


def hugging_face_scorer(model: nn.Module, *, vocab_size: int) -> Scorer:
    """Scores with one of transformers' causal models in evaluation mode. vocab_size: ids that text can have."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(batches: Sequence[Batch]) -> float:
        total = 0.0
        for batch in batches:
            labels = batch.labels.to(device)
            logits = model(batch.tokens.to(device), use_cache=False).logits  # [b, s, v]
            total += _sum(nats(logits, labels, first_row=0, vocab_size=vocab_size, tp_group=None), labels).item()
        return total

    return score


def nats(
    logits: Tensor, labels: Tensor, *, first_row: int, vocab_size: int, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Negative logarithm of each label's probability among the first ``vocab_size`` rows, in fp32; collective over TP.

    logits: [b, s, v/p], this rank's rows from ``first_row`` on; labels: [b, s]. tp_group: None where logits have all
    rows. Returns [b, s], the same on every TP rank, meaningless where a label is UNSCORED.
    """
    rows = max(0, min(logits.shape[-1], vocab_size - first_row))  # v'/p: those that are no padding
    weights, chosen = _reduce(logits.flatten(0, 1)[:, :rows], labels.flatten() - first_row)  # 2 x [b * s]
    if tp_group is not None:
        most = weights.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=tp_group)
        both = torch.stack([torch.exp(weights - most), chosen])  # [2, b * s]
        dist.all_reduce(both, group=tp_group)
        weights, chosen = torch.log(both[0]) + most, both[1]
    return (weights - chosen).view_as(labels)


def _reduce(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of exponentials, and the logit in the row asked for, 0 where it is another rank's.

    logits: [n, v'], rows: [n]. Returns two [n] in fp32.
    """
    count = logits.shape[-1]
    weights = torch.full(rows.shape, -torch.inf, device=logits.device)
    chosen = torch.zeros(rows.shape, device=logits.device)
    here = (rows >= 0) & (rows < count)
    tokens = max(1, _ELEMENTS // max(1, count))
    for begin in range(0, len(rows) if count else 0, tokens):
        part = slice(begin, begin + tokens)
        exact = logits[part].float()
        weights[part] = exact.logsumexp(-1)
        chosen[part] = exact.gather(-1, rows[part, None].clamp(0, count - 1))[:, 0]
    return weights, torch.where(here, chosen, 0.0)


def _sum(values: Tensor, labels: Tensor) -> Tensor:
    """Of the scored tokens, in fp64: a scalar."""
    return torch.where(labels == UNSCORED, 0.0, values).double().sum()
