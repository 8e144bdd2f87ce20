"""Windows of examples: what stands where, every example once an epoch, the same whoever asks; refusals."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sat.data.batch import BOUNDS, FIELDS, EvaluationBatches, bounds_of, build_train_iterator, padded_to
from megatron_sat.data.blend import DataConfig, Datasets
from megatron_sat.data.domains import parse_domains
from megatron_sat.data.prepare import prepare_lines
from megatron_sat.data.sft import SFTConfig, build_windows, epochs_seen, updates_of_epochs
from megatron_sat.data.sft_encode import ChatOptions, chat_job
from megatron_sat.data.sft_template import build_template
from megatron_sat.data.survey import inspect
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sat.data.whereabouts import Whereabouts, whereabouts
from megatron_sat.training.reading import Reader

EOD = 999
SIZE = 12


@pytest.fixture
def examples(tmp_path: Path, jsonl: Callable[..., str], ids: Tokenizer) -> Callable[..., str]:
    """Prepares (prompt, response) pairs of ids and returns the prefix."""

    def make(name: str, pairs: list[tuple[str, str]]) -> str:
        path = jsonl([{"prompt": prompt, "response": response} for prompt, response in pairs], name=f"{name}.jsonl")
        job = chat_job(ChatOptions(), template=build_template("plain", tokenizer=ids))
        prepare_lines([path], output_prefix=str(tmp_path / name), tokenizer=ids, job=job, workers=1)
        return str(tmp_path / name)

    return make


PAIRS = [("1 2 3", "4 5"), ("6", "7 8"), ("9", "10"), ("11 12", "13 14 15 16"), ("17", "18")]
"""Of 5, 3, 2, 6 and 2 positions."""


def configured(**paths: object) -> DataConfig:
    return DataConfig(seq_length=SIZE, seed=3, **paths)


def build(ids: Tokenizer, *, samples: int = 4, sft: SFTConfig | None = None, **paths: object) -> Datasets:
    config = configured(**paths)
    return build_windows(config, sft=sft or SFTConfig(), tokenizer=ids, train_samples=samples)


def taken_apart(sample: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Of each example of a window: the ids read and the last predicted, and which predictions are learnt."""
    found = []
    for number in range(1, int(sample["segments"].max()) + 1):
        here = sample["segments"] == number
        tokens, labels, mask = (sample[name][here].tolist() for name in ("tokens", "labels", "loss_mask"))
        assert tokens[1:] == labels[:-1]
        assert sample["position_ids"][here].tolist() == list(range(len(tokens)))
        found.append(([*tokens, labels[-1]], [label for label, m in zip(labels, mask, strict=True) if m]))
    return found


def expected(pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    found = []
    for prompt, response in pairs:
        asked, answered = ([int(i) for i in text.split()] for text in (prompt, response))
        found.append(([*asked, *answered, EOD], [*answered, EOD]))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_is_every_example_once_with_loss_on_its_response(ids, examples, packing):
    prefix = examples("a", PAIRS)
    built = build(ids, samples=20, sft=SFTConfig(packing=packing), train_data_path=(prefix,))
    windows = [taken_apart(built.train[i]) for i in range(len(built.train))]
    per_epoch = 2 if packing else 5
    assert len(windows) == 20
    for first in range(0, 20, per_epoch):
        epoch = [example for window in windows[first : first + per_epoch] for example in window]
        assert sorted(epoch) == sorted(expected(PAIRS))
    assert windows[:per_epoch] != windows[per_epoch : 2 * per_epoch]
    assert built.epochs == {"a": 20 / per_epoch}


def test_what_is_padded_is_no_example_and_has_no_loss(ids, examples):
    built = build(ids, sft=SFTConfig(packing=False), train_data_path=(examples("a", PAIRS),))
    for sample in (built.train[i] for i in range(len(built.train))):
        padded = sample["segments"] == 0
        assert padded.any() and not padded[0]
        assert not sample["loss_mask"][padded].any()
        assert set(sample["tokens"][padded].tolist()) == {EOD}
        assert {name: len(sample[name]) for name in FIELDS} == dict.fromkeys(FIELDS, SIZE)


LONG = ("1 2 3", " ".join(map(str, range(4, 20))))
NEVER_ANSWERED = (" ".join(map(str, range(1, 14))), "14")


@pytest.mark.parametrize(
    ("too_long", "there", "counts"),
    [("truncate", [list(range(1, SIZE + 2)), [6, 7, 8, EOD]], (1, 1)), ("drop", [[6, 7, 8, EOD]], (0, 2))],
)
def test_an_example_longer_than_a_window_is_cut_or_left_out(ids, examples, capsys, too_long, there, counts):
    prefix = examples("a", [LONG, ("6", "7 8"), NEVER_ANSWERED])
    built = build(ids, samples=1, sft=SFTConfig(too_long=too_long), train_data_path=(prefix,))
    found = [each for i in range(len(built.train)) for each in taken_apart(built.train[i])]
    assert sorted(read for read, _ in found) == sorted(there)
    assert f"{counts[0]} examples truncated, {counts[1]} left out for their length" in capsys.readouterr().out


def test_domains_are_mixed_example_by_example_and_told_apart_again(ids, examples):
    first, second = examples("a", PAIRS[:3]), examples("b", PAIRS[3:])
    built = build(ids, samples=2, train_data_path=(first, f"two={second}"))
    assert [(h.name, h.tokens) for h in built.survey.train] == [("a", 13), ("two", 10)]
    assert sum(h.share for h in built.survey.train) == pytest.approx(1)
    known = dict(zip([(first, 0), (first, 1), (first, 2), (second, 0), (second, 1)], expected(PAIRS), strict=True))
    for number in range(len(built.train)):
        named = [(place.prefix, d) for place in whereabouts(built.train, number) for d in place.documents]
        assert sorted(known[each] for each in named) == sorted(taken_apart(built.train[number]))
    assert any(len(whereabouts(built.train, number)) == 2 for number in range(len(built.train)))
    with pytest.raises(IndexError, match="sample 2 of 2"):
        whereabouts(built.train, 2)


def test_a_split_is_cut_by_examples_and_evaluated_as_they_come(ids, examples):
    prefix = examples("a", PAIRS)
    built = build(ids, samples=1, data_path=(prefix,), split="60,40,0")
    assert [(h.first, h.last) for h in (*built.survey.train, *built.survey.valid)] == [(0, 3), (3, 5)]
    (valid,) = built.valid.values()
    assert [each for i in range(len(valid)) for each in taken_apart(valid[i])] == expected(PAIRS[3:])
    assert built.test == {}
    assert whereabouts(valid, 0) == (Whereabouts(prefix=prefix, documents=(3, 4)),)


def test_a_split_without_an_example_is_left_out_of_the_evaluation_alone(ids, examples):
    pairs = [*PAIRS[:4], NEVER_ANSWERED]
    with pytest.warns(UserWarning, match="valid must hold an example that fits, its 1 do not.*left out of valid"):
        built = build(ids, samples=1, data_path=(examples("a", pairs),), split="80,20,0")
    assert built.valid == {}


def read_all(dataset, *, rank: int, dp: int, consumed: int = 0) -> list[dict]:
    how = {"dp_rank": rank, "dp_size": dp, "consumed_samples": consumed, "micro_batch_size": 2, "num_workers": 0}
    return list(build_train_iterator(dataset, device=torch.device("cpu"), **how))


def test_replicas_share_the_windows_and_a_resumed_run_reads_on(ids, examples):
    built = build(ids, samples=16, train_data_path=(examples("a", PAIRS),))
    alone = read_all(built.train, rank=0, dp=1)
    dealt = itertools.chain(*zip(*(read_all(built.train, rank=rank, dp=2) for rank in range(2)), strict=True))
    resumed = read_all(built.train, rank=0, dp=1, consumed=6)
    for one, other in [*zip(alone, dealt, strict=True), *zip(alone[3:], resumed, strict=True)]:
        assert all(torch.equal(one[name], other[name]) for name in (*FIELDS, BOUNDS))


def test_longer_training_reads_the_same_windows_first(ids, examples):
    prefix = examples("a", PAIRS)
    short, long = (build(ids, samples=samples, train_data_path=(prefix,)) for samples in (3, 9))
    assert short.order == long.order
    assert [taken_apart(short.train[i]) for i in range(3)] == [taken_apart(long.train[i]) for i in range(3)]
    other = build(ids, samples=3, sft=SFTConfig(packing=False), train_data_path=(prefix,))
    assert other.order != short.order


def test_bounds_name_every_stretch_of_one_example():
    segments = torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1], [1, 2, 2, 2]], dtype=torch.int32)
    assert bounds_of(segments).tolist() == [[0, 2, 3, 4, 8, 9, 12], [1, 1, 0, 1, 1, 1, 0]]


def test_an_evaluation_counts_every_response_once(ids, examples):
    built = build(ids, samples=1, train_data_path=(examples("a", PAIRS),), valid_data_path=(examples("v", PAIRS),))
    how = {"micro_batch_size": 2, "max_samples": None, "num_workers": 0, "device": torch.device("cpu")}
    ranks = [EvaluationBatches(built.valid["v"], dp_rank=rank, dp_size=2, **how) for rank in range(2)]
    counted = sum(float(batch["loss_mask"].sum()) for each in ranks for batch in each)
    assert counted == sum(len(learnt) for _, learnt in expected(PAIRS))


def test_padding_is_cut_where_all_samples_of_a_micro_batch_have_it(ids, examples):
    built = build(ids, samples=6, sft=SFTConfig(packing=False), train_data_path=(examples("a", PAIRS),))
    how = {"dp_rank": 0, "dp_size": 1, "consumed_samples": 0, "micro_batch_size": 2, "num_workers": 0}
    how["device"] = torch.device("cpu")
    whole, cut = (list(build_train_iterator(built.train, **how, grain=grain)) for grain in (None, 4))
    reader = Reader(layout=None, device=how["device"], micro_batch_size=2, grain=4)
    for number, (padded, short) in enumerate(zip(whole, cut, strict=True)):
        longest = max(len(read) - 1 for i in (0, 1) for read, _ in taken_apart(built.train[2 * number + i]))
        size = {1: 4, 2: 8}[-(-longest // 4)]
        assert all(torch.equal(short[name], padded[name][:, :size]) for name in FIELDS)
        assert int(short[BOUNDS][1].sum()) == 2
        samples = range(2 * number, 2 * number + 2)
        assert reader.positions(built.train, samples=samples, seq_length=SIZE) == 2 * size
    assert {batch["tokens"].size(1) for batch in cut} == {4, 8}
    assert padded_to(np.array([9]), grain=8, size=SIZE) == [SIZE]
    assert replace(reader, grain=None).positions(built.train, samples=range(4), seq_length=SIZE) == 4 * SIZE


def test_epochs_become_whole_updates(examples):
    config = configured(train_data_path=(examples("a", PAIRS),))
    for packing, epochs, batch, updates in [(True, 3, 2, 3), (True, 3, 4, 1), (False, 3, 4, 3), (False, 1, 5, 1)]:
        sft = SFTConfig(packing=packing)
        assert updates_of_epochs(config, sft=sft, epochs=epochs, global_batch_size=batch) == updates
    with pytest.raises(ValueError, match=r"--train-epochs \(1\) must hold one update of --global-batch-size \(3\)"):
        updates_of_epochs(config, sft=SFTConfig(), epochs=1, global_batch_size=3)
    windows = [np.arange(1)] * 4
    assert [epochs_seen([windows, windows], samples=n) for n in (2, 4, 7)] == [0.5, 1.0, 1.75]


def test_what_is_no_instruction_data_is_refused(ids, examples, corpus, tmp_path):
    text, prefix = corpus("text", [[1, 2, 3]]), examples("a", PAIRS)
    with pytest.raises(ValueError, match="fine-tuning needs instruction data, .*text holds documents; prepare records"):
        build(ids, train_data_path=(text,))
    with pytest.raises(ValueError, match="domain a: pre-training needs documents, .* holds instruction data; train on"):
        inspect(parse_domains([prefix], flag="--data-path")[0], tokenizer=ids)
    with pytest.raises(ValueError, match="instruction data have no weights, .* got 0.5; leave the weights out"):
        build(ids, train_data_path=("0.5", prefix))
    with pytest.raises(ValueError, match="data and training must have one tokenizer"):
        build(build_tokenizer("NullTokenizer", vocab_size=1001), train_data_path=(prefix,))
    with pytest.raises(ValueError, match="train must hold an example that fits, its 1 do not; add records"):
        build(ids, train_data_path=(examples("b", [NEVER_ANSWERED]),))
    with pytest.raises(ValueError, match="--sft-too-long must be one of truncate, drop, got cut"):
        SFTConfig(too_long="cut")
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="fine-tuning needs instruction data, .*a has no a.json that says so"):
        build(ids, train_data_path=(prefix,))
