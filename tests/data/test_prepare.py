"""Text to .bin/.idx/.json: whole, the same whatever workers and interruptions, or an error with a line."""

import dataclasses
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sat.data import prepare as prepare_module
from megatron_sat.data.draft import draft_folder, read_progress
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.side_file import SideFile
from megatron_sat.data.tokenizer import Tokenizer
from tests.data.conftest import EXCERPT, TEXTS
from tests.data.test_jsonl import pack

OPTIONS = TextOptions(append_eod=True)


def run(inputs: list[str], prefix: Path, tokenizer: Tokenizer, **kw: object) -> SideFile:
    arguments = {"options": OPTIONS, "workers": 1} | kw
    return prepare(inputs, output_prefix=str(prefix), tokenizer=tokenizer, **arguments)


def contents(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx", ".json")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_comes_back_through_megatrons_reader(tmp_path, tokenizer, jsonl):
    side = run([jsonl(TEXTS)], tmp_path / "out", tokenizer)
    opened = IndexedDataset(str(tmp_path / "out"))
    assert [tokenizer.detokenize(opened[i]) for i in range(len(opened))] == TEXTS
    assert all(opened[i][-1] == tokenizer.eod for i in range(len(opened)))
    assert side.totals.documents == len(TEXTS)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_any_compression_gives_the_same_tokens(tmp_path, tokenizer, jsonl, suffix):
    plain = Path(jsonl(TEXTS))
    packed = tmp_path / f"packed.jsonl{suffix}"
    packed.write_bytes(pack(plain.read_bytes(), suffix))
    run([str(plain)], tmp_path / "plain", tokenizer)
    run([str(packed)], tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out")[".bin"] == contents(tmp_path / "plain")[".bin"]


def test_one_worker_and_three_write_the_same_bytes(tmp_path, tokenizer):
    shards = [str(EXCERPT / "zh" / f"{domain}.dev.jsonl.xz") for domain in ("poetry", "literature")]
    for workers in (1, 3):
        run(shards, tmp_path / str(workers), tokenizer, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_the_side_file_says_whose_tokens_these_are_and_of_what(tmp_path, tokenizer, jsonl):
    path = jsonl([*TEXTS, {"text": "unwanted", "lang": "xx"}])
    side = run(
        [path], tmp_path / "out", tokenizer, options=TextOptions(append_eod=True, drop={"lang": ["xx"]})
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(side)))
    assert (side.fingerprint, side.vocab_size, side.eod) == (tokenizer.fingerprint, 4096, 2)
    assert side.sources[0].sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert (side.totals.documents, side.totals.filtered) == (len(TEXTS), 1)
    assert side.bin_bytes == (tmp_path / "out.bin").stat().st_size == 2 * side.totals.tokens


@pytest.mark.parametrize("interval", [1, 7, 300])
@pytest.mark.parametrize("lines", [1, 5, 256])
def test_a_run_stopped_after_any_commit_and_continued_equals_an_uninterrupted_one(
    tmp_path, ids, jsonl, monkeypatch, interval, lines
):
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", lines)
    shards = [jsonl([f"{i} {i + 1}" for i in range(40)], name=f"{shard}.jsonl") for shard in "abc"]
    run(shards, tmp_path / "whole", ids)

    stop_at = [f"{i}" for i in (5, 33)]
    for text in stop_at:

        def encode(given: str, text: str = text) -> list[int]:
            if given.startswith(f"{text} ") and read_progress(str(tmp_path / "out")) is not None:
                raise KeyboardInterrupt
            return ids.encode(given)

        stopping = dataclasses.replace(ids, encode=encode)
        try:
            run(shards, tmp_path / "out", stopping, commit_interval=interval)
        except KeyboardInterrupt:
            assert not (tmp_path / "out.bin").exists()
    run(shards, tmp_path / "out", ids, commit_interval=interval)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not draft_folder(str(tmp_path / "out")).exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_no_data_set_and_the_next_one_continues(
    tmp_path, ids, jsonl, monkeypatch, workers
):
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 4)
    shards = [jsonl([f"{i}" for i in range(300)], name=f"{shard}.jsonl") for shard in "ab"]
    slow = dataclasses.replace(ids, encode=lambda text: time.sleep(0.02) or ids.encode(text))
    pid = os.fork()
    if pid == 0:
        try:
            run(shards, tmp_path / "out", slow, commit_interval=10, workers=workers)
        finally:
            os._exit(1)
    done = 0
    while done < 50:
        time.sleep(0.02)
        done = (read_progress(str(tmp_path / "out")) or {"totals": {"documents": 0}})["totals"]["documents"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "out.unfinished"]
    fresh = dataclasses.replace(ids, encode=lambda text: encoded.append(text) or ids.encode(text))
    encoded: list[str] = []
    run(shards, tmp_path / "out", fresh)
    run(shards, tmp_path / "whole", ids)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(encoded) <= 600 - done


def test_a_run_that_fails_leaves_no_data_set(tmp_path, ids, jsonl):
    path = jsonl(["1", "2", {"nothing": 1}, "3"])
    with pytest.raises(ValueError, match="in.jsonl:3"):
        run([path], tmp_path / "out", ids, workers=2)
    assert names(tmp_path) == ["in.jsonl", "out.unfinished"]


def test_a_malformed_line_is_named_by_file_and_line(tmp_path, ids, jsonl, monkeypatch):
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 2)
    good = jsonl(["1"] * 3, name="good.jsonl")
    bad = jsonl(["1", "2", "3", {"nothing": 1}, "5"], name="bad.jsonl")
    with pytest.raises(
        ValueError,
        match=r"bad.jsonl:4 must be a JSON object with a text, got no field 'text'.*--skip-malformed",
    ):
        run([good, bad], tmp_path / "out", ids)


def test_malformed_lines_are_counted_when_skipped(tmp_path, ids, jsonl):
    path = jsonl(["1", {"nothing": 1}, "3"])
    side = run([path], tmp_path / "out", ids, options=TextOptions(skip_malformed=True))
    assert (side.totals.documents, side.totals.malformed) == (2, 1)


def test_input_without_a_document_is_refused_with_the_reasons(tmp_path, ids, jsonl):
    path = jsonl([{"nothing": 1}, {"text": "1", "lang": "en"}, {"text": "", "lang": "zh"}])
    options = TextOptions(skip_malformed=True, keep={"lang": ["zh"]})
    with pytest.raises(
        ValueError, match=r"got none \(1 lines malformed, 1 records filtered, 1 without text\)"
    ):
        run([path], tmp_path / "out", ids, options=options)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="must get at least one document"):
        run([str(tmp_path / "empty.jsonl")], tmp_path / "out", ids)
    assert names(tmp_path) == ["empty.jsonl", "in.jsonl"]


def test_what_is_already_prepared_is_left_alone(tmp_path, ids, jsonl):
    path = jsonl(["1", "2"])
    first = run([path], tmp_path / "out", ids)
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert run([path], tmp_path / "out", ids) == first
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["input", "options", "tokenizer", "no side file", "shorter .bin"])
def test_another_data_set_is_replaced_only_on_request(tmp_path, ids, tokenizer, jsonl, change):
    path = jsonl(["1", "2"])
    run([path], tmp_path / "out", ids)
    changed: dict[str, object] = {}
    if change == "input":
        jsonl(["3"])
    elif change == "options":
        changed["options"] = TextOptions()
    elif change == "no side file":
        (tmp_path / "out.json").unlink()
    elif change == "shorter .bin":
        os.truncate(tmp_path / "out.bin", 2)
    chosen = tokenizer if change == "tokenizer" else ids
    with pytest.raises(ValueError, match=r"output_prefix must be free, .*out.bin exists .*--overwrite"):
        run([path], tmp_path / "out", chosen, **changed)
    run([path], tmp_path / "out", chosen, overwrite=True, **changed)
    run([path], tmp_path / "fresh", chosen, **changed)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_folder_of_a_run_killed_at_its_very_end_is_cleared(tmp_path, ids, jsonl):
    path = jsonl(["1", "2"])
    run([path], tmp_path / "out", ids)
    draft_folder(str(tmp_path / "out")).mkdir()
    run([path], tmp_path / "out", ids)
    assert names(tmp_path) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("name", ["workers", "log_interval", "commit_interval"])
def test_numbers_below_one_are_refused(tmp_path, ids, jsonl, name):
    with pytest.raises(
        ValueError, match=f"{name} must be at least 1, got 0; leave --{name.replace('_', '-')} out"
    ):
        run([jsonl(["1"])], tmp_path / "out", ids, **{name: 0})


def test_progress_is_said_at_the_interval(tmp_path, ids, jsonl, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(prepare_module, "say", said.append)
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 10)
    run([jsonl(["1"] * 50)], tmp_path / "out", ids, log_interval=20)
    assert [line.split(",")[0] for line in said] == ["20 documents", "40 documents"]


def test_the_progress_bar_reaches_the_size_of_the_input(tmp_path, ids, jsonl, monkeypatch):
    told: dict[str, list[int]] = {}

    class Bar:
        def __init__(self, total: int, description: str) -> None:
            told.setdefault(description.split()[0], [total])

        def __enter__(self):
            return told[next(reversed(told))].append

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(prepare_module, "progress", Bar)
    shards = [jsonl(["1"] * 700, name=f"{shard}.jsonl") for shard in "ab"]
    run(shards, tmp_path / "out", ids)
    assert {name: sum(steps) for name, (_, *steps) in told.items()} == {
        name: total for name, (total, *_) in told.items()
    }
