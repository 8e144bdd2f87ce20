"""Data sets against Megatron's own builder, with the shares and splits that were asked for."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from megatron_sat.data.blend import DataConfig, Datasets, build_datasets, survey_data
from megatron_sat.data.survey import epochs_per_domain
from megatron_sat.data.tokenizer import Tokenizer
from tests.helpers.ranks import run_ranks

LENGTH = 16


@pytest.fixture
def domains(corpus) -> list[str]:
    """zh, law and en: ids of the first are below 100, of the second in the 100s, of the third in the 200s."""
    return [
        corpus(name, [[base + (7 * i + j) % 90 for j in range(20 + i % 13)] for i in range(documents)])
        for name, base, documents in (("zh", 0, 60), ("law", 100, 40), ("en", 200, 80))
    ]


def config(tmp_path: Path, **fields: Any) -> DataConfig:
    return DataConfig(
        **{"seq_length": LENGTH, "seed": 5, "data_cache_path": str(tmp_path / "cache")} | fields
    )


def in_one_rank(cfg: DataConfig, tokenizer: Tokenizer, look: Any, samples: int = 100) -> Any:
    """``look`` at the data sets, in a process with a group, and return what it says."""
    return run_ranks(lambda rank: look(build_datasets(cfg, tokenizer=tokenizer, train_samples=samples)), 1)[0]


def tokens_of(dataset: Any, count: int | None = None) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset) if count is None else count)]


def bin_tokens(prefix: str) -> list[int]:
    return np.fromfile(f"{prefix}.bin", dtype="<u2").tolist()


@pytest.mark.parametrize("weights", [(0.3, 0.7), (3, 1)])
@pytest.mark.parametrize("how", ["split", "train_data_path", "single"])
def test_the_training_blend_is_megatrons_sample_for_sample(tmp_path, domains, ids, weights, how):
    values = [str(weights[0]), domains[0], str(weights[1]), domains[1]] if how != "single" else [domains[0]]
    ours = (
        {"data_path": tuple(values), "split": "90,10"}
        if how == "split"
        else {"train_data_path": tuple(values)}
    )
    blend_of = get_blend_from_list(values)
    theirs = (
        {"blend": blend_of, "split": "90,10"}
        if how == "split"
        else {"blend_per_split": [blend_of, None, None]}
    )

    def both(rank: int) -> tuple:
        cfg = config(tmp_path, **ours)
        built = build_datasets(cfg, tokenizer=ids, train_samples=150).train
        megatrons = GPTDatasetConfig(
            random_seed=5,
            sequence_length=LENGTH,
            path_to_cache=str(tmp_path / "megatrons"),
            tokenizer=ids,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **theirs,
        )
        other = BlendedMegatronDatasetBuilder(GPTDataset, [150, 20, 0], lambda: True, megatrons).build()[0]
        return (
            tokens_of(built),
            tokens_of(other),
            built.unique_description_hash,
            other.unique_description_hash,
        )

    mine, other, my_hash, other_hash = run_ranks(both, 1)[0]
    assert len(mine) >= 150
    assert mine == other
    assert my_hash == other_hash  # a cache that Megatron-LM wrote is found


def test_a_sample_is_a_stretch_of_the_text_and_its_successors(tmp_path, domains, ids):
    sample = in_one_rank(
        config(tmp_path, train_data_path=(domains[0],)), ids, lambda d: dict(d.train[3].items())
    )
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert sample["position_ids"].tolist() == list(range(LENGTH))
    assert sample["loss_mask"].tolist() == [1.0] * LENGTH


def test_the_end_of_a_document_is_masked_on_request(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=(domains[0],), eod_mask_loss=True)
    samples = in_one_rank(cfg, ids, lambda d: [dict(d.train[i].items()) for i in range(20)])
    ends = torch.stack([sample["tokens"] for sample in samples]) == 999
    assert ends.any()
    assert torch.equal(torch.stack([sample["loss_mask"] for sample in samples]) == 0, ends)


def test_weights_are_reached_in_every_stretch(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=("1", domains[0], "3", domains[1], "4", domains[2]))
    origins = in_one_rank(
        cfg, ids, lambda d: [int(d.train[i]["dataset_id"]) for i in range(800)], samples=800
    )
    for stretch in (slice(0, 80), slice(400, 480), slice(0, 800)):
        counted = Counter(origins[stretch])
        size = len(origins[stretch])
        assert [counted[i] for i in range(3)] == pytest.approx([size / 8, size * 3 / 8, size / 2], abs=1.5)


def test_the_replay_share_is_drawn(tmp_path, domains, ids):
    zh, law, en = domains
    cfg = config(tmp_path, train_data_path=("1", zh, "1", law), replay_data_path=(en,), replay_share=0.2)
    samples = in_one_rank(cfg, ids, lambda d: tokens_of(d.train, 500), samples=500)
    english = sum(all(token >= 200 for token in sample) for sample in samples)
    assert english == pytest.approx(100, abs=1)


def test_without_weights_domains_are_drawn_by_their_tokens(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=tuple(domains))
    found = survey_data(cfg, tokenizer=ids).train
    total = sum(one.tokens for one in found)
    assert [one.share for one in found] == pytest.approx([one.tokens / total for one in found])
    # an epoch of all is an epoch of each
    epochs = epochs_per_domain(found, samples=total // LENGTH, seq_length=LENGTH)
    assert list(epochs) == ["zh", "law", "en"]
    assert list(epochs.values()) == pytest.approx([1.0] * 3, rel=0.01)


def test_epochs_are_those_that_the_data_set_goes_through(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=("1", domains[0], "1", domains[1]))
    seen = in_one_rank(cfg, ids, lambda d: Counter(itertools.chain(*tokens_of(d.train, 1000))), samples=1000)
    epochs = epochs_per_domain(survey_data(cfg, tokenizer=ids).train, samples=1000, seq_length=LENGTH)
    once = Counter(bin_tokens(domains[0]))
    times = [seen[token] / once[token] for token in once if token != 999]
    assert sum(times) / len(times) == pytest.approx(epochs["zh"], rel=0.05)


def test_validation_is_one_data_set_a_domain(tmp_path, domains, ids):
    zh, law, en = domains
    cfg = config(
        tmp_path, train_data_path=(zh,), valid_data_path=("law=" + law, "english=" + en), test_data_path=(en,)
    )

    def look(datasets: Datasets) -> tuple:
        return {name: tokens_of(one) for name, one in datasets.valid.items()}, list(datasets.test)

    valid, test = in_one_rank(cfg, ids, look)
    assert list(valid) == ["law", "english"]
    assert test == ["en"]
    assert all(100 <= token < 200 or token == 999 for sample in valid["law"] for token in sample)
    # one epoch: every token once, but for the last partial sample
    assert len(valid["law"]) == (len(bin_tokens(law)) - 1) // LENGTH
    counted = Counter(token for sample in valid["law"] for token in sample)
    assert counted <= Counter(bin_tokens(law))


def test_a_split_gives_each_domain_and_the_replay_their_own_validation(tmp_path, domains, ids):
    zh, law, en = domains
    cfg = config(
        tmp_path, data_path=("1", zh, "1", law), split="80,20", replay_data_path=(en,), replay_share=0.3
    )
    found = survey_data(cfg, tokenizer=ids)
    assert [(one.name, one.first, one.last) for one in found.train] == [
        ("zh", 0, 48),
        ("law", 0, 32),
        ("en", 0, 64),
    ]
    assert [(one.name, one.first, one.last) for one in found.valid] == [
        ("zh", 48, 60),
        ("law", 32, 40),
        ("en", 64, 80),
    ]
    assert found.test == ()
    names = in_one_rank(cfg, ids, lambda d: (list(d.valid), list(d.test)))
    assert names == (["zh", "law", "en"], [])


def test_evaluation_alone_needs_no_training_data(tmp_path, domains, ids):
    cfg = config(tmp_path, valid_data_path=(domains[0],))
    assert in_one_rank(cfg, ids, lambda d: (d.train, list(d.valid)), samples=0) == (None, ["zh"])


def test_without_a_cache_path_the_indices_lie_beside_the_data(tmp_path, domains, ids):
    in_one_rank(config(tmp_path, data_cache_path=None, train_data_path=tuple(domains)), ids, lambda d: None)
    assert list((tmp_path / "index-cache").glob("*-BlendedDataset-train-dataset_index.npy"))


def test_a_second_start_finds_the_caches(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=tuple(domains))
    first = in_one_rank(cfg, ids, lambda d: tokens_of(d.train, 50))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-*")}
    assert in_one_rank(cfg, ids, lambda d: tokens_of(d.train, 50)) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-*")} == written


def test_files_are_read_without_mapping_them_too(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=(domains[0],))
    mapped = in_one_rank(cfg, ids, lambda d: tokens_of(d.train, 20))
    assert in_one_rank(replace(cfg, mmap_bin_files=False), ids, lambda d: tokens_of(d.train, 20)) == mapped


def test_the_order_is_known_by_a_name_that_does_not_see_paths(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=(domains[0],))

    def order(**changed: Any) -> str:
        samples = changed.pop("samples", 100)
        return in_one_rank(replace(cfg, **changed), ids, lambda d: d.order, samples=samples)

    (tmp_path / "moved").mkdir()
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / "moved" / f"other{ending}").write_bytes(Path(domains[0] + ending).read_bytes())
    same = order(
        train_data_path=(str(tmp_path / "moved" / "other"),), data_cache_path=str(tmp_path / "elsewhere")
    )
    others = [order(seed=6), order(seq_length=8), order(train_data_path=(domains[1],)), order(samples=120)]
    assert same == order()
    assert len({same, *others}) == 5
