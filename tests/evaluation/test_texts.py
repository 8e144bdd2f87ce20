"""Documents of a domain: jsonl and prepared data give the same, limits hold whole documents, mistakes are named."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sat.data.encode import TextOptions
from megatron_sat.data.index_file import bin_path, idx_path, write_index
from megatron_sat.data.prepare import prepare
from megatron_sat.data.side_file import side_path
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sat.evaluation.texts import Limits, Texts, parse_data, read_texts
from tests.checkpoint.families import SENTENCEPIECE

TEXTS = ["the first one", "", "天地玄黃，宇宙洪荒。", "x", "  spaces 　 and\n\nlines\n"]
NUMBERS = build_tokenizer("NullTokenizer", vocab_size=100)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("Llama2Tokenizer", model=str(SENTENCEPIECE))


def write(path: Path, texts: list[str], *, key: str = "text") -> str:
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts) + "\n"
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def make(source: str, prefix: Path, *, tokenizer: Tokenizer, **options: bool) -> str:
    chosen = TextOptions(**options)
    prepare([source], output_prefix=str(prefix), tokenizer=tokenizer, options=chosen, workers=1)
    return str(prefix)


def read(*paths: str, tokenizer: Tokenizer, key: str = "text", **limits: int) -> Texts:
    return read_texts({"zh/poetry": paths}, tokenizer=tokenizer, key=key, limits=Limits(**limits))["zh/poetry"]


def plain(texts: Texts) -> tuple[list[list[int]], int, int]:
    return [ids.tolist() for ids in texts.documents], texts.characters, texts.bytes


def test_a_document_is_its_ids_and_the_length_of_its_text(tmp_path, tokenizer):
    found = read(write(tmp_path / "a.jsonl.gz", TEXTS), tokenizer=tokenizer)
    there = [text for text in TEXTS if text]
    expected = [tokenizer.tokenize(text) for text in there]
    assert plain(found) == (expected, len("".join(there)), len("".join(there).encode()))
    assert found.tokens == sum(map(len, expected))


@pytest.mark.parametrize(
    "options", [{}, {"append_eod": True}, {"append_eod": True, "prepend_bos": True}], ids=["bare", "eod", "bos"]
)
@pytest.mark.parametrize("side_file", [True, False])
def test_prepared_data_gives_what_its_jsonl_gives(tmp_path, tokenizer, options, side_file):
    source = write(tmp_path / "a.jsonl", TEXTS)
    prefix = make(source, tmp_path / "a_text_document", tokenizer=tokenizer, **options)
    if not side_file:
        side_path(prefix).unlink()
    if side_file or _comes_back(tokenizer):
        assert plain(read(prefix, tokenizer=tokenizer)) == plain(read(source, tokenizer=tokenizer))
    assert plain(read(prefix, tokenizer=tokenizer, documents=2)) == plain(
        read(source, tokenizer=tokenizer, documents=2)
    )


def _comes_back(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.detokenize(tokenizer.tokenize(text)) == text for text in TEXTS)


def test_the_side_file_counts_where_decoding_would_not_give_the_text_back(tmp_path):
    """Numbers with two spaces between them come back with one."""
    source = write(tmp_path / "a.jsonl", ["1  2", "3"])
    prefix = make(source, tmp_path / "a", tokenizer=NUMBERS, append_eod=True)
    assert read(prefix, tokenizer=NUMBERS).characters == read(source, tokenizer=NUMBERS).characters == 5
    side_path(prefix).unlink()
    assert read(prefix, tokenizer=NUMBERS).characters == 4


def test_an_end_of_document_inside_a_document_ends_it(tmp_path):
    ids = np.array([1, 2, 99, 99, 3], dtype="<u2")
    ids.tofile(bin_path(str(tmp_path / "a")))
    write_index(idx_path(str(tmp_path / "a")), np.array([5]), dtype=ids.dtype)
    assert plain(read(str(tmp_path / "a"), tokenizer=NUMBERS)) == ([[1, 2], [3]], 4, 4)


def test_paths_and_globs_of_a_domain_add_up(tmp_path):
    for name, text in (("a1", "1 2"), ("a2", "3"), ("b", "4")):
        write(tmp_path / f"{name}.jsonl", [text])
    prefix = make(str(tmp_path / "b.jsonl"), tmp_path / "b", tokenizer=NUMBERS)
    found = read(f"{tmp_path}/a*.jsonl", prefix, tokenizer=NUMBERS)
    assert plain(found) == ([[1, 2], [3], [4]], 5, 5)


@pytest.mark.parametrize(
    ("limits", "count"),
    [({"documents": 2}, 2), ({"characters": 1}, 1), ({"characters": 3}, 1), ({"characters": 4}, 2), ({}, 3)],
)
def test_limits_hold_whole_documents_of_all_paths_of_a_domain(tmp_path, limits, count):
    paths = [write(tmp_path / "a.jsonl", ["1 2"]), write(tmp_path / "b.jsonl", ["3", "4"])]
    assert len(read(*paths, tokenizer=NUMBERS, **limits).documents) == count


def test_a_field_of_another_name_is_read(tmp_path):
    assert read(write(tmp_path / "a.jsonl", ["1"], key="body"), tokenizer=NUMBERS, key="body").tokens == 1


# -- what cannot be read


def test_a_domain_without_text_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(ValueError, match=r"must have a document with text, zh/poetry has none in .*a\.jsonl; leave it"):
        read(path, tokenizer=NUMBERS)


def test_a_domain_of_nothing_but_tokens_without_text_is_named(tmp_path):
    silent = replace(NUMBERS, decode=lambda ids: "")
    prefix = make(write(tmp_path / "a.jsonl", ["1"]), tmp_path / "a", tokenizer=silent)
    side_path(prefix).unlink()
    with pytest.raises(ValueError, match="must have a document with text, zh/poetry has none"):
        read(prefix, tokenizer=silent)


def test_a_missing_file_is_named_with_its_domain(tmp_path):
    said = r"--data must name existing files, .*nothing matches none; .*\(domain zh/poetry; nor is .*nothing\.idx\)"
    with pytest.raises(ValueError, match=said):
        read(str(tmp_path / "nothing"), tokenizer=NUMBERS)


def test_half_a_prepared_data_set_is_refused(tmp_path):
    prefix = make(write(tmp_path / "a.jsonl", ["1"]), tmp_path / "a", tokenizer=NUMBERS)
    bin_path(prefix).unlink()
    with pytest.raises(ValueError, match=r"a\.bin does not exist, though a\.idx is there"):
        read(prefix, tokenizer=NUMBERS)


def test_a_line_without_text_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", ["1"])
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1 must be a JSON object with text in 'body', it has no field 'body'"
    ):
        read(path, tokenizer=NUMBERS, key="body")


def test_data_of_another_tokenizer_are_refused(tmp_path):
    other = build_tokenizer("NullTokenizer", vocab_size=50)
    prefix = make(write(tmp_path / "a.jsonl", ["1 40"]), tmp_path / "a", tokenizer=other)
    with pytest.raises(ValueError, match=r"must be of the model's tokenizer \(.*\), .* of zh/poetry is of another"):
        read(prefix, tokenizer=NUMBERS)


def test_ids_beyond_the_tokenizer_are_refused_where_nobody_says_whose_they_are(tmp_path):
    prefix = make(write(tmp_path / "a.jsonl", ["1 40"]), tmp_path / "a", tokenizer=NUMBERS)
    side_path(prefix).unlink()
    few = build_tokenizer("NullTokenizer", vocab_size=40)
    with pytest.raises(ValueError, match=r"must have ids below the tokenizer's 40, .* of zh/poetry has 40; prepare it"):
        read(prefix, tokenizer=few)


@pytest.mark.parametrize("limits", [{"documents": 0}, {"characters": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match=r"--max-(documents|characters) must be at least 1, got 0; leave it out"):
        Limits(**limits)


def test_data_are_named():
    data = parse_data(["zh/poetry=a.jsonl", "en=b", "zh/poetry=c=d"])
    assert data == {"zh/poetry": ["a.jsonl", "c=d"], "en": ["b"]}


@pytest.mark.parametrize("value", ["a.jsonl", "=a", "a=", "/zh=a", "zh/=a", "a b=c"])
def test_data_without_a_name_or_a_path_are_refused(value):
    with pytest.raises(ValueError, match="--data must be NAME=PATH, got"):
        parse_data([value])


def test_a_path_named_twice_is_refused():
    with pytest.raises(ValueError, match="must name a path once a domain, b is named twice for a; drop one"):
        parse_data(["a=b", "a=b"])
