"""Nats of a token: the softmax over the tokenizer's rows, whole or cut over TP ranks, against torch's own."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sat.evaluate import perplexity
from megatron_sat.evaluate.perplexity import nats
from megatron_sat.evaluate.windows import UNSCORED
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import FP32_SUMS

ROWS = 16


def _example(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    logits = 5.0 * torch.randn(2, 5, ROWS, generator=made)
    logits[..., vocab_size:] += 20.0  # padding would take everything if it counted
    labels = torch.randint(vocab_size, (2, 5), generator=made)
    labels[0, 0] = vocab_size - 1
    labels[1, 3] = UNSCORED
    return logits, labels


def _on_ranks(rank: int, ranks: int, vocab_size: int) -> torch.Tensor:
    logits, labels = _example(vocab_size)
    part = ROWS // ranks
    first = rank * part
    return nats(
        logits[..., first : first + part], labels, first_row=first, vocab_size=vocab_size, tp_group=dist.group.WORLD
    )


@pytest.mark.parametrize(("ranks", "vocab_size"), [(1, 16), (1, 11), (2, 16), (2, 11), (4, 7)])
def test_nats_are_those_of_the_rows_that_text_has(ranks, vocab_size):
    """With 4 ranks of 4 rows and 7 ids, two ranks have padding alone."""
    logits, labels = _example(vocab_size)
    expected = F.cross_entropy(
        logits[..., :vocab_size].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=UNSCORED
    ).view_as(labels)
    for found in run_ranks(_on_ranks, ranks, ranks, vocab_size):
        scored = labels != UNSCORED
        torch.testing.assert_close(found[scored], expected[scored], **FP32_SUMS)


def test_padding_rows_would_be_seen():
    logits, labels = _example(11)
    counted = nats(logits, labels, first_row=0, vocab_size=ROWS, tp_group=None)
    left_out = nats(logits, labels, first_row=0, vocab_size=11, tp_group=None)
    assert (counted - left_out)[labels != UNSCORED].min() > 1.0


def test_logits_are_reduced_in_parts(monkeypatch):
    logits, labels = _example(11)
    whole = nats(logits, labels, first_row=0, vocab_size=11, tp_group=None)
    monkeypatch.setattr(perplexity, "_ELEMENTS", 33)
    assert torch.equal(nats(logits, labels, first_row=0, vocab_size=11, tp_group=None), whole)


def test_half_precision_is_summed_in_fp32():
    logits, labels = _example(ROWS)
    found = nats(logits.bfloat16(), labels, first_row=0, vocab_size=ROWS, tp_group=None)
    exact = nats(logits.bfloat16().float(), labels, first_row=0, vocab_size=ROWS, tp_group=None)
    assert found.dtype == torch.float32 and torch.equal(found, exact)
