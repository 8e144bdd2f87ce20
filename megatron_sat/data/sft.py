"""Instruction data of a run: the examples of its domains, the windows they make, and for how many epochs they last.

Every rank looks at the files for itself and arrives at the same: there is nothing to write down beside them.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sat.data import sft_packing
from megatron_sat.data.blend import DataConfig, Datasets, split_spans
from megatron_sat.data.domains import Domain, parse_domains
from megatron_sat.data.index_file import Index, read_index
from megatron_sat.data.sft_encode import TOO_LONG
from megatron_sat.data.sft_packing import Window
from megatron_sat.data.sft_windows import Examples, Windows
from megatron_sat.data.side_file import CONVERSATIONS, read_side_file, side_path
from megatron_sat.data.survey import Holding, Survey, check_side
from megatron_sat.data.tokenizer import Tokenizer
from megatron_sat.log import say, warn_once

Epochs = list[list[Window]]
"""Windows in the order in which training reads them, epoch by epoch."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """How examples become windows. Each field is the ``--sft-*`` flag of its name."""

    packing: bool = True
    """Several examples a window; without it each is padded to the window's length."""
    too_long: str = "truncate"
    """What becomes of an example of more than seq_length + 1 tokens: its end is cut off (truncate), or it is left out
    (drop)."""

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ValueError(f"--sft-too-long must be one of {', '.join(TOO_LONG)}, got {self.too_long}")


@dataclass(frozen=True, kw_only=True)
class Material:
    """The examples of each split, by domain."""

    train: tuple[Examples, ...]
    valid: tuple[Examples, ...]
    test: tuple[Examples, ...]


def find_material(config: DataConfig, *, sft: SFTConfig, tokenizer: Tokenizer | None) -> Material:
    """Check every domain's files and find the examples that can be trained on; no ranks needed.

    tokenizer: the run's, which must be the data's; None: whose they are is not asked.
    Raises ValueError for what `index_file.read_index` refuses, data that hold no examples, another tokenizer's, a
    weight, and a split without an example. With ``--data-path``, a domain without one of validation or test is left
    out there with a warning.
    """
    found: dict[str, tuple[Examples, ...]] = {}
    by_split = zip(("train", "valid", "test"), split_spans(config), strict=True)
    for split, span in by_split:
        flag = "data_path" if config.data_path else f"{split}_data_path"
        domains = () if span is None else parse_domains(getattr(config, flag), flag=f"--{flag.replace('_', '-')}")
        may_lack = bool(config.data_path) and split != "train"
        opened = [
            Examples(
                domain,
                _inspect(domain, tokenizer=tokenizer),
                span=span or (0.0, 0.0),
                seq_length=config.seq_length,
                too_long=sft.too_long,
            )
            for domain in domains
        ]
        found[split] = tuple(each for each in opened if _has_some(each, split=split, may_lack=may_lack))
    return Material(**found)


def _inspect(domain: Domain, *, tokenizer: Tokenizer | None) -> Index:
    index, side = read_index(domain.prefix), read_side_file(domain.prefix)
    if side is None or side.options.get("kind") != CONVERSATIONS:
        what = "holds documents" if side is not None else f"has no {side_path(domain.prefix).name} that says so"
        raise ValueError(
            f"domain {domain.name}: fine-tuning needs instruction data, {domain.prefix} {what}; prepare records with "
            "tools/prepare_sft.py"
        )
    if domain.weight is not None:
        raise ValueError(
            f"domain {domain.name}: instruction data have no weights, an epoch is every example once, got "
            f"{domain.weight:g}; leave the weights out"
        )
    if tokenizer is not None:
        check_side(domain, side=side, index=index, tokenizer=tokenizer)
    return index


def _has_some(examples: Examples, *, split: str, may_lack: bool) -> bool:
    if len(examples):
        return True
    problem = (
        f"domain {examples.name}: {split} must hold an example that fits, its {examples.last - examples.first} do "
        "not; add records, change --split or raise --seq-length"
    )
    if not may_lack:
        raise ValueError(problem)
    warn_once(f"{problem} (left out of {split})")
    return False


def make_epochs(
    material: Material, *, config: DataConfig, sft: SFTConfig, enough: Callable[[Epochs], bool]
) -> Epochs:
    """Windows of training, one epoch after another until there are enough."""
    lengths = np.concatenate([each.lengths for each in material.train])
    epochs: Epochs = []
    while not enough(epochs):
        epochs.append(
            sft_packing.windows_of_epoch(
                len(epochs), lengths=lengths, size=config.seq_length, seed=config.seed, packed=sft.packing
            )
        )
    return epochs


def updates_of_epochs(config: DataConfig, *, sft: SFTConfig, epochs: int, global_batch_size: int) -> int:
    """How many whole updates so many epochs are. Raises ValueError where they are none, and as `find_material`."""
    material = find_material(config, sft=sft, tokenizer=None)
    windows = make_epochs(material, config=config, sft=sft, enough=lambda made: len(made) == epochs)
    samples = sum(map(len, windows))
    if samples < global_batch_size:
        raise ValueError(
            f"--train-epochs ({epochs}) must hold one update of --global-batch-size ({global_batch_size}) samples, got "
            f"{samples}; train for more epochs or lower the batch"
        )
    return samples // global_batch_size


def count_epochs(config: DataConfig, *, sft: SFTConfig, tokenizer: Tokenizer, train_samples: int) -> dict[str, float]:
    """By domain, how often ``train_samples`` samples are its examples. See `find_material`."""
    material = find_material(config, sft=sft, tokenizer=tokenizer)
    return _epochs(material, config=config, sft=sft, samples=train_samples)[1]


def _epochs(
    material: Material, *, config: DataConfig, sft: SFTConfig, samples: int
) -> tuple[Epochs, dict[str, float]]:
    """As many epochs as hold so many samples, and by domain how many of them those are."""
    made = make_epochs(material, config=config, sft=sft, enough=lambda e: sum(map(len, e)) >= samples)
    return made, dict.fromkeys((each.name for each in material.train), epochs_seen(made, samples=samples))


def epochs_seen(epochs: Epochs, *, samples: int) -> float:
    """How many epochs the first ``samples`` windows are."""
    seen = 0.0
    for windows in epochs:
        part = min(samples, len(windows))
        seen += part / len(windows)
        samples -= part
    return seen


def build_windows(config: DataConfig, *, sft: SFTConfig, tokenizer: Tokenizer, train_samples: int) -> Datasets:
    """The data sets of every split, the same on each rank; says what came of long examples. See `find_material`."""
    material = find_material(config, sft=sft, tokenizer=tokenizer)

    def windows(domains: tuple[Examples, ...], which: list[Window]) -> Windows:
        return Windows(domains, which, seq_length=config.seq_length, filling=tokenizer.eod)

    def once(domains: tuple[Examples, ...]) -> dict[str, Windows]:
        return {
            each.name: windows(
                (each,),
                sft_packing.windows_in_order(lengths=each.lengths, size=config.seq_length, packed=sft.packing),
            )
            for each in domains
        }

    train: Windows | None = None
    epochs: dict[str, float] = {}
    if material.train and train_samples > 0:
        made, epochs = _epochs(material, config=config, sft=sft, samples=train_samples)
        train = windows(material.train, [window for epoch in made for window in epoch])
        say(_introduce(material, epoch=made[0], seq_length=config.seq_length))
    return Datasets(
        train=train,
        valid=once(material.valid),
        test=once(material.test),
        survey=Survey(train=_holdings(material.train), valid=_holdings(material.valid), test=_holdings(material.test)),
        order=_order(material, config=config, sft=sft),
        epochs=epochs,
    )


def _introduce(material: Material, *, epoch: list[Window], seq_length: int) -> str:
    """What an epoch is, in one line."""
    examples = sum(map(len, material.train))
    positions = sum(int(each.lengths.sum()) for each in material.train)
    truncated, left_out = (sum(getattr(each, what) for each in material.train) for what in ("truncated", "too_long"))
    return (
        f"an epoch is {examples:,} examples in {len(epoch):,} windows of {seq_length}, "
        f"{positions / (len(epoch) * seq_length):.1%} of them filled; {truncated:,} examples truncated, {left_out:,} "
        "left out for their length"
    )


def _holdings(domains: tuple[Examples, ...]) -> tuple[Holding, ...]:
    tokens = math.fsum(each.tokens for each in domains)
    return tuple(
        Holding(
            name=each.name,
            prefix=each.prefix,
            first=each.first,
            last=each.last,
            tokens=each.tokens,
            share=each.tokens / tokens,
        )
        for each in domains
    )


def _order(material: Material, *, config: DataConfig, sft: SFTConfig) -> str:
    domains = [(each.first, each.last, each.tokens) for each in material.train]
    decides = (config.seed, config.seq_length, sft.packing, sft.too_long, domains)
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
