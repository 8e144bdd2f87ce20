"""What the domains hold, and whether it can be trained on: every check of data that needs the files, and the
epochs.

Nothing here needs ranks or megatron.core; a plan can ask before any training exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sat.data.domains import Domain
from megatron_sat.data.index_file import Index, id_range, read_index
from megatron_sat.data.side_file import CONVERSATIONS, SideFile, read_side_file, side_path
from megatron_sat.data.tokenizer import Tokenizer
from megatron_sat.log import warn_once


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one domain brings to one split."""

    name: str
    prefix: str
    first: int
    """First document."""
    last: int
    """One past the last document."""
    tokens: int
    share: float
    """Fraction of the split's samples, in (0, 1]; over the split's domains they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What each split holds. A split without domains is empty."""

    train: tuple[Holding, ...]
    valid: tuple[Holding, ...]
    test: tuple[Holding, ...]


def inspect(domain: Domain, *, tokenizer: Tokenizer) -> Index:
    """The domain's index, when its files are whole and its ids are this tokenizer's.

    Raises ValueError for what `read_index` refuses, another tokenizer's tokens, ids outside the vocabulary,
    and a side file that describes other files.
    """
    index = read_index(domain.prefix)
    side = read_side_file(domain.prefix)
    if side is None:
        warn_once(
            f"domain {domain.name}: {side_path(domain.prefix)} does not exist, so nothing tells which "
            "tokenizer made the data; tools/preprocess_data.py writes one"
        )
        low, high = id_range(domain.prefix, index)
    else:
        check_side(domain, side=side, index=index, tokenizer=tokenizer)
        if side.options.get("kind") == CONVERSATIONS:
            raise ValueError(
                f"domain {domain.name}: pre-training needs documents, {domain.prefix} holds instruction data; train on "
                "them with finetune_sat.py"
            )
        if not side.options.get("append_eod", False):
            warn_once(
                f"domain {domain.name} was prepared without --append-eod: its documents run into each other"
            )
        low, high = 0, side.totals.max_token_id
    if low < 0 or high >= tokenizer.vocab_size:
        raise ValueError(
            f"domain {domain.name}: token ids must be in [0, {tokenizer.vocab_size}), the vocabulary of the "
            f"tokenizer, {domain.prefix} holds {low if low < 0 else high}; prepare it again with this "
            "tokenizer"
        )
    return index


def check_side(domain: Domain, *, side: SideFile, index: Index, tokenizer: Tokenizer) -> None:
    """Raises ValueError for another tokenizer's tokens, and for a side file that describes other files."""
    if side.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"domain {domain.name}: data and training must have one tokenizer, {domain.prefix} was made with "
            f"{side.tokenizer} {side.fingerprint[:12]}, this one is {tokenizer.kind} "
            f"{tokenizer.fingerprint[:12]}; prepare the data again or give the tokenizer that made it"
        )
    found = index.tokens * index.dtype.itemsize
    if side.bin_bytes != found:
        raise ValueError(
            f"domain {domain.name}: {side_path(domain.prefix)} must describe the .bin beside it, which has "
            f"{side.bin_bytes} bytes there and {found} on disk; prepare the data again"
        )


def take_stock(
    domains: Sequence[tuple[Domain, Index]],
    *,
    span: tuple[float, float],
    split: str,
    seq_length: int,
    skip_short: bool = False,
) -> tuple[Holding, ...]:
    """What the domains bring to a split that gets the documents in ``span``, a part of [0, 1].

    split: "train", "valid" or "test", for messages. Shares follow the weights, or the tokens where there are
    none. A domain that cannot fill one sample is a ValueError, or left out with a warning where
    ``skip_short``.
    """
    holdings = []
    for domain, index in domains:
        first, last = (round(end * len(index.lengths)) for end in span)  # megatron's rounding
        tokens = int(index.lengths[first:last].sum(dtype=np.int64))
        if tokens < seq_length + 1:
            problem = (
                f"domain {domain.name}: {split} must hold one sample of seq_length + 1 = {seq_length + 1} "
                "tokens, its "
                f"{last - first} documents hold {tokens}; add text, change --split or shorten --seq-length"
            )
            if not skip_short:
                raise ValueError(problem)
            warn_once(f"{problem} (left out of {split})")
            continue
        weight = float(tokens) if domain.weight is None else domain.weight
        holdings.append(
            Holding(
                name=domain.name, prefix=domain.prefix, first=first, last=last, tokens=tokens, share=weight
            )
        )
    return _normalised(holdings, to=1.0)


def mix_in(main: Sequence[Holding], *, replay: Sequence[Holding], share: float) -> tuple[Holding, ...]:
    """Both together, ``share`` of the samples from ``replay``."""
    return _normalised(main, to=1.0 - share) + _normalised(replay, to=share)


def _normalised(holdings: Sequence[Holding], *, to: float) -> tuple[Holding, ...]:
    """Shares that add up to ``to``; by numpy, as megatron does it, so that its caches are found again."""
    weights = np.array([holding.share for holding in holdings], dtype=np.float64)
    shares = (weights / weights.sum() * to).tolist()
    return tuple(replace(holding, share=share) for holding, share in zip(holdings, shares, strict=True))


def epochs_per_domain(holdings: Sequence[Holding], *, samples: int, seq_length: int) -> dict[str, float]:
    """How often each domain's text is seen in ``samples`` samples of ``seq_length`` tokens."""
    return {holding.name: samples * holding.share * seq_length / holding.tokens for holding in holdings}
