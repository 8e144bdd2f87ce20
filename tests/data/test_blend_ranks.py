"""Ranks that build one blend see the same samples, and each learns what went wrong or for whom it waits."""

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.data import blend
from megatron_sat.data.blend import DataConfig, build_datasets
from megatron_sat.data.tokenizer import Tokenizer
from tests.helpers.ranks import run_ranks


@pytest.fixture
def domains(corpus) -> list[str]:
    return [
        corpus(name, [[base + i] * 30 for i in range(40)])
        for name, base in (("zh", 0), ("law", 100), ("en", 200))
    ]


def config(tmp_path: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"seq_length": 16, "seed": 5, "data_cache_path": str(tmp_path / "cache")} | fields)


def tokens_of(dataset: Any) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


def test_all_ranks_see_the_same_samples(tmp_path, domains, ids):
    cfg = config(tmp_path, train_data_path=("1", domains[0], "2", domains[1]), valid_data_path=(domains[2],))

    def look(rank: int) -> tuple:
        built = build_datasets(cfg, tokenizer=ids, train_samples=60)
        return tokens_of(built.train), tokens_of(built.valid["en"]), built.order, built.survey

    first, second = run_ranks(look, 2)
    assert first == second


def outcome(rank: int, cfg: DataConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    try:
        build_datasets(cfg, tokenizer=tokenizer, train_samples=10)
    except Exception as error:  # noqa: BLE001  the test looks at whatever it is
        return type(error).__name__, str(error)
    return "none", ""


def test_every_rank_learns_what_rank_0_found_wrong(tmp_path, ids):
    cfg = config(tmp_path, train_data_path=(str(tmp_path / "nowhere"),))
    answers = run_ranks(outcome, 2, cfg, ids)
    assert answers[0] == answers[1]
    assert answers[0][0] == "ValueError"
    assert "nowhere.bin does not exist" in answers[0][1]


def test_every_rank_learns_of_an_error_of_another_kind(tmp_path, domains, ids, monkeypatch):
    def fail(*args: object, **kw: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(blend, "survey_data", fail)
    cfg = config(tmp_path, train_data_path=(domains[0],))
    assert run_ranks(outcome, 2, cfg, ids) == [("ZeroDivisionError", "a bug")] * 2


def test_a_cache_that_cannot_be_written_is_said_on_every_rank(tmp_path, domains, ids):
    (tmp_path / "cache").write_text("a file is in the way")
    cfg = config(tmp_path, train_data_path=(domains[0],))
    for kind, text in run_ranks(outcome, 2, cfg, ids):
        assert kind == "ValueError"
        assert f"their index caches writable, {tmp_path}/cache is not: File exists" in text
        assert "check it or set --data-cache-path" in text


def test_a_rank_that_waits_too_long_says_for_whom(tmp_path, domains, ids, monkeypatch):
    def slow(*args: object, **kw: object) -> None:
        time.sleep(1.5)
        raise ValueError("late")

    monkeypatch.setattr(blend, "survey_data", slow)
    cfg = config(tmp_path, train_data_path=(domains[0],), index_timeout_minutes=0.01)

    def waiter(rank: int) -> tuple[str, str]:
        return outcome(rank, cfg, ids)

    kind, text = run_ranks(waiter, 2)[1]
    assert kind == "RuntimeError"
    assert text.startswith("rank 1 waits at most 0.01 minutes for rank 0 to index the data, no answer came")
    assert text.endswith("look at rank 0's log or raise --index-timeout-minutes")


def test_a_rank_that_does_not_see_the_cache_says_so(tmp_path, domains, ids):
    def elsewhere(rank: int) -> tuple[str, str]:
        cfg = config(tmp_path, train_data_path=(domains[0],), data_cache_path=str(tmp_path / f"node{rank}"))
        return outcome(rank, cfg, ids)

    assert run_ranks(elsewhere, 2)[0] == ("none", "")
    kind, text = run_ranks(elsewhere, 2)[1]
    assert kind == "RuntimeError"
    assert "rank 1 must see the index caches that rank 0 wrote, " in text
    assert "--data-cache-path to a folder that all nodes share" in text


def test_without_a_process_group_the_call_is_refused(tmp_path, domains, ids):
    with pytest.raises(RuntimeError, match="build_datasets needs the default process group, there is none"):
        build_datasets(config(tmp_path, train_data_path=(domains[0],)), tokenizer=ids, train_samples=1)
