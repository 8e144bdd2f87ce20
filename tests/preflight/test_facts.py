"""What is compared between ranks, and how odd ones are named."""

import re
from pathlib import Path
from typing import Any

import pytest

import megatron_sat
from megatron_sat.preflight.facts import CLOCK_TOLERANCE_SECONDS, clocks_apart, differences, facts_of, where
from tests.helpers.command_line import run

HOSTS = ["a", "a", "b", "b"]


def test_ranks_are_said_in_spans_with_their_hosts() -> None:
    hosts = [f"n{rank // 8}" for rank in range(32)]
    assert where([3, 8, 9, 10, 31], hosts=hosts) == "ranks 3, 8-10, 31 (n0, n1, n3)"
    assert where([5], hosts=hosts) == "rank 5 (n0)"


def test_ranks_that_are_alike_have_no_differences() -> None:
    assert differences([{"torch": "2.14"}] * 4, hosts=HOSTS) == []


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("torch", "use one installation on all hosts, of one kind"),
        ("--lr", "give every host the same command line and files of settings"),
        ("data corpus/zh", "let all hosts see the same files"),
    ],
)
def test_odd_ranks_are_named_with_the_way_out(name: str, way_out: str) -> None:
    facts = [{name: "one"}, {name: "two"}, {name: "one"}, {name: "three"}]
    (line,) = differences(facts, hosts=HOSTS)
    odd = "two on rank 1 (a), three on rank 3 (b)"
    assert line == f"{name} must be the same on all ranks, it is one on most and {odd}; {way_out}"


def test_of_equal_camps_that_of_rank_0_is_right() -> None:
    (line,) = differences([{"torch": "1"}, {"torch": "1"}, {"torch": "2"}, {}], hosts=HOSTS)
    assert "it is 1 on most and 2 on rank 2 (b), nothing on rank 3 (b)" in line
    (line,) = differences([{"torch": "2"}, {"torch": "2"}, {"torch": "1"}, {"torch": "1"}], hosts=HOSTS)
    assert "it is 2 on most and 1 on ranks 2-3 (b)" in line


def test_clocks_may_differ_a_little() -> None:
    assert clocks_apart([0.0, 5.0, CLOCK_TOLERANCE_SECONDS, 1.0], hosts=HOSTS) == []
    (line,) = clocks_apart([1000.0, 1001.0, 1000.0, 900.0], hosts=HOSTS)
    assert line == "clocks must agree within 30 s, rank 3 (b) is off by up to -100 s; set them by NTP"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    prefix = tmp_path / "zh"
    for ending in ("bin", "idx", "json"):
        prefix.with_suffix(f".{ending}").write_bytes(b"x" * 300_000)
    return str(prefix)


def facts_with(prefix: str, more: str = "") -> dict[str, str]:
    return facts_of(run(f"--train-data-path {prefix} {more}", without="--data-path --split"), cuda=False)


def test_versions_source_settings_and_files_are_compared(corpus: str) -> None:
    found = facts_with(corpus, "--tensorboard-dir /only/rank/0")
    assert found["--lr"] == "0.0003"
    assert "--tensorboard-dir" not in found
    assert re.fullmatch(rf"{re.escape(megatron_sat.__version__)} \([0-9a-f]{{12}}\)", found["megatron_sat"])
    assert {"python", "torch", "megatron-core", f"data {corpus}"} <= set(found)
    assert found == facts_with(corpus, "--tensorboard-dir /other")


def test_another_file_is_another_fingerprint(corpus: str) -> None:
    before = facts_with(corpus)[f"data {corpus}"]
    for ending, at in (("bin", 0), ("idx", 299_999), ("json", 7)):
        path = Path(f"{corpus}.{ending}")
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + b"y" + whole[at + 1 :])
        assert facts_with(corpus)[f"data {corpus}"] != before
        path.write_bytes(whole)
    assert facts_with(corpus)[f"data {corpus}"] == before
    Path(f"{corpus}.bin").write_bytes(b"x" * 300_001)
    assert facts_with(corpus)[f"data {corpus}"] != before


def test_a_missing_file_is_a_fact(tmp_path: Path) -> None:
    found = facts_with(str(tmp_path / "none"), f"--load {tmp_path}")
    assert found[f"data {tmp_path}/none"] == "missing"
    (name,) = [name for name in found if name.startswith("checkpoint")]
    assert found[name] == "missing"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    assert facts_with(str(tmp_path / "none"), f"--load {tmp_path}")[name] == "40"


def test_the_tokenizer_is_compared_by_file_or_folder(tmp_path: Path) -> None:
    def fact(model: Path) -> Any:
        more = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {model}"
        config = run(more, without="--tokenizer-type --vocab-size")
        return facts_of(config, cuda=False)[f"tokenizer {model}"]

    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "weights.bin").write_text("1")
    folder, file = fact(tmp_path), fact(tmp_path / "tokenizer.json")
    assert folder == file
    (tmp_path / "weights.bin").write_text("2")
    assert fact(tmp_path) == folder
    (tmp_path / "tokenizer.json").write_text("[]")
    assert fact(tmp_path) != folder
