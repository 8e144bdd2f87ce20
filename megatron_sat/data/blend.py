"""Which text the model sees, in which shares and in which order: from paths to data sets.

The training blend is built as Megatron's own `BlendedMegatronDatasetBuilder` would build it, index caches
included; the builder itself knows neither names nor a replay share, and blends validation. Here each domain
is a data set of its own in validation and test, so that each is reported by itself. Rank 0 checks the data
and writes the caches; the others wait for it and learn what went wrong.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_sat.data.domains import Domain, parse_domains, require_distinct
from megatron_sat.data.index_cache import building, use_prebuilt_index_helpers
from megatron_sat.data.index_file import Index
from megatron_sat.data.survey import Holding, Survey, epochs_per_domain, inspect, mix_in, take_stock
from megatron_sat.data.tokenizer import Tokenizer

LEGACY_SPLIT = "969,30,1"
"""Megatron's split where ``--data-path`` comes without ``--split``."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Named as Megatron's flags where Megatron has them. Path lists are in `domains`' syntax."""

    seq_length: int
    """Tokens of a sample."""
    seed: int
    """Decides the order of documents and samples."""
    data_path: tuple[str, ...] = ()
    """Domains that ``split`` cuts into train, valid and test."""
    split: str | None = None
    """Proportions of the three, by documents; only with data_path, LEGACY_SPLIT where not given."""
    train_data_path: tuple[str, ...] = ()
    """Domains of training, instead of data_path."""
    valid_data_path: tuple[str, ...] = ()
    """Domains of validation, each evaluated by itself."""
    test_data_path: tuple[str, ...] = ()
    """Domains of the test, each evaluated by itself."""
    replay_data_path: tuple[str, ...] = ()
    """Domains of the text that must not be forgotten."""
    replay_share: float = 0.0
    """Fraction of the training samples drawn from replay_data_path, in [0, 1)."""
    data_cache_path: str | None = None
    """Folder of the index caches; ``index-cache`` beside the first data set where None."""
    eod_mask_loss: bool = False
    """Leave the prediction that follows an end of document out of the loss."""
    mmap_bin_files: bool = True
    """Map .bin files into memory instead of reading pieces of them."""
    mid_level_dataset_surplus: float = 0.005
    """Samples of a domain indexed beyond its share, as a fraction: a blend may draw a few more."""
    num_workers: int = 2
    """Processes that read batches ahead; 0 reads in the training process."""
    index_timeout_minutes: float = 60.0
    """How long ranks wait for rank 0 to check the data and index it."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {self.seq_length}; set --seq-length")
        self._check_paths()
        self._check_replay()
        if self.split is not None:
            _check_split(self.split)
        if self.num_workers < 0:
            raise ValueError(
                f"num_workers must be at least 0, got {self.num_workers}; leave --num-workers out"
            )
        if self.mid_level_dataset_surplus < 0:
            raise ValueError(
                f"mid_level_dataset_surplus must not be negative, got {self.mid_level_dataset_surplus}; "
                "leave --mid-level-dataset-surplus out"
            )
        if self.index_timeout_minutes <= 0:
            raise ValueError(
                f"index_timeout_minutes must be positive, got {self.index_timeout_minutes}; leave it out"
            )

    def _check_paths(self) -> None:
        per_split = self.train_data_path or self.valid_data_path or self.test_data_path
        if self.data_path and per_split:
            raise ValueError(
                "--data-path excludes --train-data-path, --valid-data-path and --test-data-path, got both; "
                "keep one kind"
            )
        if not self.data_path and not per_split:
            raise ValueError(
                "data must come from --data-path or --train-data-path, got neither; name a prepared data set"
            )
        if self.split is not None and not self.data_path:
            raise ValueError(f"--split ({self.split}) cuts --data-path, which is not given; leave it out")
        training = parse_domains(self.data_path, flag="--data-path")
        training += parse_domains(self.train_data_path, flag="--train-data-path")
        training += parse_domains(self.replay_data_path, flag="--replay-data-path")
        require_distinct([domain.name for domain in training], flags="training and replay")
        parse_domains(self.valid_data_path, flag="--valid-data-path")
        parse_domains(self.test_data_path, flag="--test-data-path")

    def _check_replay(self) -> None:
        if not 0.0 <= self.replay_share < 1.0:  # refuses NaN too
            raise ValueError(
                f"replay_share must be in [0, 1), got {self.replay_share}; a fifth is --replay-share 0.2"
            )
        if self.replay_share > 0 and not self.replay_data_path:
            raise ValueError(
                f"replay_share ({self.replay_share}) needs --replay-data-path, which is not given; add it"
            )
        if self.replay_data_path and self.replay_share == 0:
            raise ValueError(
                "--replay-data-path needs a --replay-share above 0, got 0; add --replay-share 0.2"
            )
        if self.replay_data_path and not (self.data_path or self.train_data_path):
            raise ValueError(
                "--replay-data-path mixes into training text, there is none; add --train-data-path"
            )


def _check_split(split: str) -> None:
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not (
        1 <= len(parts) <= 3 and all(math.isfinite(part) and part >= 0 for part in parts) and sum(parts) > 0
    ):
        raise ValueError(f"split must be up to three proportions, got {split!r}; write --split 98,1,1")


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What `build_datasets` returns. A sample is a dict of [s] tensors, of which `batch.FIELDS` are used."""

    train: Dataset | None
    """At least as many samples as asked for; None where none were."""
    valid: Mapping[str, Dataset]
    """By domain, one epoch in a fixed order."""
    test: Mapping[str, Dataset]
    """By domain, one epoch in a fixed order."""
    survey: Survey
    order: str
    """sha256 of all that decides which training sample comes when; files count by size and not by path.
    A run that resumes under another order sees other text: longer training reshuffles."""
    epochs: Mapping[str, float]
    """By domain, how often training sees its text."""


def survey_data(config: DataConfig, *, tokenizer: Tokenizer) -> Survey:
    """Check every domain's files and say what each split holds; no ranks needed.

    Raises ValueError for whatever `survey.inspect` and `survey.take_stock` refuse. With ``--data-path``,
    domains too small for a sample of validation or test are left out there with a warning.
    """
    replay = _inspect_all(config.replay_data_path, flag="--replay-data-path", tokenizer=tokenizer)
    if config.data_path:
        train = _inspect_all(config.data_path, flag="--data-path", tokenizer=tokenizer)
        valid = test = train + replay
    else:
        train = _inspect_all(config.train_data_path, flag="--train-data-path", tokenizer=tokenizer)
        valid = _inspect_all(config.valid_data_path, flag="--valid-data-path", tokenizer=tokenizer)
        test = _inspect_all(config.test_data_path, flag="--test-data-path", tokenizer=tokenizer)
    spans = split_spans(config)
    length, cut = config.seq_length, bool(config.data_path)
    held: dict[str, tuple[Holding, ...]] = {}
    for split, span, domains in zip(("train", "valid", "test"), spans, (train, valid, test), strict=True):
        if span is None or not domains:
            held[split] = ()
            continue
        short_is_fine = cut and split != "train"
        held[split] = take_stock(domains, span=span, split=split, seq_length=length, skip_short=short_is_fine)
    if replay and held["train"]:
        assert spans[0] is not None, "documents are held for training"
        replayed = take_stock(replay, span=spans[0], split="train", seq_length=length)
        held["train"] = mix_in(held["train"], replay=replayed, share=config.replay_share)
    return Survey(**held)


def split_spans(config: DataConfig) -> list[tuple[float, float] | None]:
    """Which part of a domain's documents training, validation and test each get; None: nothing."""
    if not config.data_path:
        return [(0.0, 1.0)] * 3
    spans: list[tuple[float, float] | None] = convert_split_vector_to_split_matrix(
        parse_and_normalize_split(config.split or LEGACY_SPLIT)
    )
    return spans


def _inspect_all(values: Sequence[str], *, flag: str, tokenizer: Tokenizer) -> list[tuple[Domain, Index]]:
    return [(domain, inspect(domain, tokenizer=tokenizer)) for domain in parse_domains(values, flag=flag)]


def build_datasets(config: DataConfig, *, tokenizer: Tokenizer, train_samples: int) -> Datasets:
    """The data sets of every split, the same on each rank; all ranks of the default group call it together.

    train_samples: what training will draw in all, from its first step; 0 builds no training data.
    Raises ValueError on every rank for data that cannot be used, RuntimeError when rank 0 does not answer in
    time or its caches cannot be seen from here.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "build_datasets needs the default process group, there is none; call distributed.join first"
        )
    use_prebuilt_index_helpers()
    if dist.get_rank() == 0:
        return _build_first(config, tokenizer=tokenizer, train_samples=train_samples)
    surveyed = _wait_for_first(config)
    try:
        return _build(config, tokenizer=tokenizer, survey=surveyed, train_samples=train_samples)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} must see the index caches that rank 0 wrote, {error.filename} is not "
            "there; point --data-cache-path to a folder that all nodes share"
        ) from error


def _waiting_room(config: DataConfig) -> dist.ProcessGroup:
    """A gloo group with a time-out of its own: indexing may take longer than any collective of training."""
    timeout = timedelta(minutes=config.index_timeout_minutes)
    room = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(room, dist.ProcessGroup), "every rank is in a group made without a list of ranks"
    return room


def _build_first(config: DataConfig, *, tokenizer: Tokenizer, train_samples: int) -> Datasets:
    """On rank 0: check, build, write the caches, and tell the others how it went."""
    room = _waiting_room(config)
    outcome: Survey | Exception
    try:
        outcome = survey_data(config, tokenizer=tokenizer)
        with building(_cache_folder(config, survey=outcome)):
            built = _build(config, tokenizer=tokenizer, survey=outcome, train_samples=train_samples)
    except OSError as error:
        outcome = ValueError(
            f"data must be readable and their index caches writable, {error.filename} is not: "
            f"{error.strerror}; check it or set --data-cache-path"
        )
        outcome.__cause__ = error
    except Exception as error:  # noqa: BLE001  whatever it is, it is raised below, on every rank
        outcome = error
    dist.broadcast_object_list([outcome], src=0, group=room)
    if isinstance(outcome, Exception):
        raise outcome
    return built


def _wait_for_first(config: DataConfig) -> Survey:
    """On other ranks: what rank 0 found, or the error it raised."""
    answer: list[Survey | Exception | None] = [None]
    try:
        dist.broadcast_object_list(answer, src=0, group=_waiting_room(config))
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} waits at most {config.index_timeout_minutes:g} minutes for rank 0 to "
            f"index the data, no answer came ({error}); look at rank 0's log or raise --index-timeout-minutes"
        ) from error
    outcome = answer[0]
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    return outcome


def _build(config: DataConfig, *, tokenizer: Tokenizer, survey: Survey, train_samples: int) -> Datasets:
    gpt_config = _gpt_config(config, tokenizer=tokenizer, survey=survey)
    files = {
        holding.prefix: GPTDataset.build_low_level_dataset(holding.prefix, gpt_config)
        for holding in (*survey.train, *survey.valid, *survey.test)
    }

    def cut(holding: Holding, samples: int | None, split: Split) -> GPTDataset:
        documents = np.arange(holding.first, holding.last, dtype=np.int32)
        return GPTDataset(files[holding.prefix], holding.prefix, documents, samples, split, gpt_config)

    train: Dataset | None = None
    if survey.train and train_samples > 0:
        wanted = [math.ceil(train_samples * holding.share) for holding in survey.train]
        if len(wanted) == 1:
            train = cut(survey.train[0], wanted[0], Split.train)
        else:
            margin = 1 + config.mid_level_dataset_surplus
            parts = [
                cut(holding, math.ceil(n * margin), Split.train)
                for holding, n in zip(survey.train, wanted, strict=True)
            ]
            train = BlendedDataset(
                parts, [holding.share for holding in survey.train], sum(wanted), gpt_config
            )
    return Datasets(
        train=train,
        valid={holding.name: cut(holding, None, Split.valid) for holding in survey.valid},
        test={holding.name: cut(holding, None, Split.test) for holding in survey.test},
        survey=survey,
        order=_order(config, survey=survey, train_samples=train_samples),
        epochs=epochs_per_domain(survey.train, samples=train_samples, seq_length=config.seq_length),
    )


def _gpt_config(config: DataConfig, *, tokenizer: Tokenizer, survey: Survey) -> GPTDatasetConfig:
    blends = [
        ([holding.prefix for holding in holdings], [holding.share for holding in holdings])
        if holdings
        else None
        for holdings in (survey.train, survey.valid, survey.test)
    ]
    cut = bool(config.data_path)
    return GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=blends[0] if cut else None,
        blend_per_split=None if cut else blends,
        split=(config.split or LEGACY_SPLIT) if cut else None,
        path_to_cache=str(_cache_folder(config, survey=survey)),
        mmap_bin_files=config.mmap_bin_files,
        tokenizer=tokenizer,
        mid_level_dataset_surplus=config.mid_level_dataset_surplus,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )


def _cache_folder(config: DataConfig, *, survey: Survey) -> Path:
    first = (*survey.train, *survey.valid, *survey.test)[0]
    return Path(config.data_cache_path or Path(first.prefix).parent / "index-cache")


def _order(config: DataConfig, *, survey: Survey, train_samples: int) -> str:
    domains = [(holding.first, holding.last, holding.tokens, holding.share) for holding in survey.train]
    decides = (config.seed, config.seq_length, config.mid_level_dataset_surplus, train_samples, domains)
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
