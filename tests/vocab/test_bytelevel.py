"""New merges in byte-level tokenizers."""

import copy
import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from megatron_sat.vocab import bytelevel
from megatron_sat.vocab.extension import Extension
from megatron_sat.vocab.form import fast_form
from megatron_sat.vocab.source import Source
from tests.vocab.conftest import ADD


@pytest.fixture(scope="module")
def old(bytelevel_source: Source) -> dict[str, Any]:
    assert bytelevel_source.content is not None
    return bytelevel_source.content


@pytest.fixture(scope="module")
def new(bytelevel_extension: Extension) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytelevel_extension.files["tokenizer.json"])
    return found


def test_the_stand_ins_are_those_of_the_tokenizers_library() -> None:
    assert sorted(bytelevel.STAND_INS) == sorted(ByteLevel.alphabet())
    assert bytelevel.to_symbols(" a\n中") == "ĠaĊä¸Ń"
    assert bytelevel.to_text("ĠaĊä¸Ń") == " a\n中"
    assert bytelevel.to_text("ä¸") is None and bytelevel.to_bytes("ä¸") == b"\xe4\xb8"
    assert bytelevel.to_bytes("<｜x｜>") is None and bytelevel.to_text("中") is None


def test_old_merges_come_first_and_old_ids_stay(old: dict[str, Any], new: dict[str, Any]) -> None:
    merges = bytelevel.merges_of(old)
    assert bytelevel.merges_of(new)[: len(merges)] == merges
    assert len(bytelevel.merges_of(new)) == len(merges) + ADD
    assert bytelevel.ids_of(old).items() <= bytelevel.ids_of(new).items()
    assert min(new["model"]["vocab"][p] for p in new["model"]["vocab"] if p not in bytelevel.ids_of(old)) == 702


def test_special_tokens_keep_their_ids_when_the_file_is_read_again(new: dict[str, Any]) -> None:
    """They lie between old and new pieces; unlisted among the pieces they would be numbered anew."""
    assert Tokenizer.from_str(json.dumps(new)).token_to_id("<|end_of_text|>") == 701
    unlisted = copy.deepcopy(new)
    for token in unlisted["added_tokens"]:
        del unlisted["model"]["vocab"][token["content"]]
    assert Tokenizer.from_str(json.dumps(unlisted)).token_to_id("<|end_of_text|>") != 701


def test_characters_are_joined_by_way_of_their_first_bytes(bytelevel_extension: Extension) -> None:
    between = [bytelevel.to_bytes(piece) for piece in bytelevel_extension.plan.between]
    parts = [piece for piece in between if piece is not None and len(piece) == 2]
    assert parts
    assert all(0xE2 < piece[0] < 0xF0 and 0x7F < piece[1] < 0xC0 for piece in parts)


def test_pairs_written_as_one_string_are_read(old: dict[str, Any]) -> None:
    """tokenizer.json of tokenizers before 0.20."""
    former = copy.deepcopy(old)
    former["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    assert bytelevel.merges_of(former) == bytelevel.merges_of(old)


def test_what_the_pre_tokenizer_cuts_or_normalisation_changes_is_no_candidate(old: dict[str, Any]) -> None:
    pieces = ["中国", "二〇", "，", "\uf900"]
    plain = bytelevel.whole_words(pieces, content=old)
    assert plain == ["中国", "，", "\uf900"], "〇 is a number for GPT-2's pattern"
    composed = old | {"normalizer": {"type": "NFC"}}
    assert bytelevel.whole_words(pieces, content=composed) == ["中国", "，"]
    assert bytelevel.whole_words(pieces, content=old | {"pre_tokenizer": None}) == pieces


def test_pieces_with_a_byte_that_the_old_one_lacks_are_passed_over(old: dict[str, Any]) -> None:
    """SmolLM2 lacks some."""
    poor = copy.deepcopy(old)
    symbol = bytelevel.STAND_INS["中".encode()[-1]]
    del poor["model"]["vocab"][symbol]
    poor["model"]["vocab"]["zzz"] = 9999
    assert bytelevel.missing_bytes(poor) == ["中".encode()[-1]]
    _, plan = bytelevel.extend_fast_form(poor, candidates=["中", "国"], add=2)
    assert [bytelevel.to_text(addition.piece) for addition in plan.additions][-1] == "国"


def test_the_literal_segmentation_is_that_of_the_library(new: dict[str, Any], held_out: list[str]) -> None:
    plain = new | {"model": new["model"] | {"ignore_merges": False}}
    form = fast_form(json.dumps(plain))
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    ranks = {pair: float(i) for i, pair in enumerate(bytelevel.merges_of(new))}
    for text in held_out[::5]:
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text[:200])]
        parts = [part for word in words for part in bytelevel.segment_bytes(word, ranks=ranks)]
        assert form.encode(text[:200]) == [new["model"]["vocab"][part] for part in parts]
