"""Rows for new pieces, in the input embedding and in the output layer.

A piece begins as the mean of the rows of the tokens that spelt it before: the model reads it as it read these. Other
beginnings are here to be compared (docs/vocabulary.md).

Shapes: `v` old rows, `n` new rows, `h` hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

INITS = ("subtoken-mean", "mean", "mean+noise", "multivariate", "random")
_NOISE = 0.1
"""Of mean+noise: standard deviations of the old rows, coordinate by coordinate."""
_COVARIANCE = 1e-9
"""Of multivariate: transformers' factor of the covariance, see `resize_token_embeddings`."""


@torch.no_grad()
def new_rows(
    old: Tensor,
    *,
    subtokens: Sequence[Sequence[int]],
    init: str,
    match_norms: bool,
    generator: torch.Generator,
) -> Tensor:
    """Rows for pieces that the old tokenizer spelt as `subtokens`.

    old: [v, h], without padding rows. init: one of `INITS`. match_norms: give each row the mean norm of the rows it was
    made from; a mean is shorter than what it is the mean of.
    Returns [n, h] in fp32. Raises ValueError for an unknown init.
    """
    if init not in INITS:
        raise ValueError(f"--init must be one of {', '.join(INITS)}, got {init}; try subtoken-mean")
    old = old.float()
    norms = old.norm(dim=1)
    if init == "subtoken-mean":
        rows = _subtoken_means(old, subtokens=subtokens)
        target = _subtoken_means(norms[:, None], subtokens=subtokens)  # [n, 1]
    else:
        rows = _drawn(old, count=len(subtokens), init=init, generator=generator)
        target = norms.mean()
    return rows * (target / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)) if match_norms else rows


def _subtoken_means(values: Tensor, *, subtokens: Sequence[Sequence[int]]) -> Tensor:
    """[v, .] -> [n, .]: the mean over each piece's tokens."""
    counts = torch.tensor([len(ids) for ids in subtokens])
    owner = torch.repeat_interleave(torch.arange(len(subtokens)), counts)
    flat = torch.tensor([i for ids in subtokens for i in ids], dtype=torch.int64)
    sums = values.new_zeros(len(subtokens), values.shape[1]).index_add_(0, owner, values[flat])
    return sums / counts[:, None]


def _drawn(old: Tensor, *, count: int, init: str, generator: torch.Generator) -> Tensor:
    """[n, h] from the mean and spread of the old rows."""
    mean, spread = old.mean(dim=0), old.std(dim=0)
    noise = torch.randn(count, old.shape[1], generator=generator)
    if init == "random":
        return noise * old.std()
    if init == "mean+noise":
        return mean + _NOISE * spread * noise
    if init == "multivariate":
        values, vectors = torch.linalg.eigh(torch.cov(old.T))
        return mean + (noise * (_COVARIANCE * values.clamp_min(0)).sqrt()) @ vectors.T
    return mean.expand(count, -1).clone()


@torch.no_grad()
def padding_row(old: Tensor) -> Tensor:
    """[v, h] -> [h], fp32: what padding rows are filled with, the mean of the old rows.

    Its logit is the mean of the old logits, so it is never the largest, whatever the hidden state.
    """
    return old.float().mean(dim=0)


def padded(vocab_size: int, *, multiple: int, tensor_parallel: int) -> int:
    """The rows that are stored: `vocab_size` up to a multiple of `multiple` times the tensor-parallel size."""
    unit = multiple * tensor_parallel
    if unit < 1:
        raise ValueError(
            f"--pad-to ({multiple}) and --tensor-model-parallel-size ({tensor_parallel}) must be at least 1; "
            "try 128 and 1"
        )
    return -(-vocab_size // unit) * unit
