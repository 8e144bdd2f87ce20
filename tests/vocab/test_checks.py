"""Each proof holds for what was made, and fails for what is wrong on purpose."""

import dataclasses
import json
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_sat.vocab import checks, merge
from megatron_sat.vocab.battery import BATTERY
from megatron_sat.vocab.checks import Proof
from megatron_sat.vocab.extension import Extension
from megatron_sat.vocab.form import Form, fast_form, sentencepiece_form
from tests.vocab.conftest import ADD, SHIPPED


def test_all_proofs_hold(extension: Extension, held_out: list[str]) -> None:
    proofs = extension.prove(held_out)
    checks.require(proofs)
    assert len(proofs) >= 6
    assert not [proof for proof in proofs if proof.offenders]


def test_a_proof_that_fails_is_an_error_with_its_offenders() -> None:
    offenders = [f"piece {i}" for i in range(12)]
    failed = Proof(statement="every piece sings", tried_on="12 pieces", offenders=offenders)
    with pytest.raises(
        ValueError, match="nothing was written; every piece sings: 12, piece 0, piece 1, .*piece 7, \\.\\.\\."
    ):
        checks.require([Proof(statement="true", tried_on="1"), failed])


def appended(*pieces: str, score: float = 0.0) -> Form:
    """The known recipe: pieces put at the end, whatever they are joined from, all of one score."""
    proto = ModelProto.FromString(SHIPPED.read_bytes())
    for piece in pieces:
        proto.pieces.add(piece=piece, score=score, type=ModelProto.SentencePiece.NORMAL)
    return sentencepiece_form(proto)


OLD = appended()
FIRST = 4096


def test_a_piece_whose_halves_are_missing_is_found() -> None:
    pieces = {FIRST: "意大利".encode(), FIRST + 1: "越来越".encode(), FIRST + 2: "凹".encode()}
    form = appended("意大利", "越来越", "凹")
    proof = checks.every_piece_is_produced(form, pieces=pieces, halves=set())
    assert {offender[-4:-1] for offender in proof.offenders} == {"意大利", "越来越"}


def test_a_piece_that_an_old_one_with_a_space_hides_is_looked_for_elsewhere() -> None:
    """The shipped model has "▁第", so "第十" is no token of the text "第十", but it is one of "\\n第十"."""
    form = appended("第十", score=-5000)
    assert FIRST not in form.encode("第十")
    assert checks.every_piece_is_produced(form, pieces={FIRST: "第十".encode()}, halves=set()).holds


def test_a_part_of_a_character_is_found_in_a_text_that_begins_with_it() -> None:
    form = Form(name="f", encode=lambda text: [7] if text.startswith("丸") else [1], decode=str)
    assert checks.every_piece_is_produced(form, pieces={7: b"\xe4\xb8"}, halves=set()).holds
    hidden = checks.every_piece_is_produced(form, pieces={8: b"\xe4\xb8"}, halves=set())
    assert hidden.offenders == ["8 (\\xe4\\xb8)"]
    assert checks.every_piece_is_produced(form, pieces={8: b"\xe4\xb8"}, halves={8}).holds
    assert not checks.every_piece_is_produced(form, pieces={8: "丸".encode()}, halves={8}).holds


def test_a_leaked_english_piece_is_found() -> None:
    form = appended("thequick", "ck b")
    assert checks.others_are_unchanged(OLD, form, texts=BATTERY).holds
    leaked = checks.others_are_unchanged(OLD, appended("rown", "jum", score=1.0), texts=BATTERY)
    assert leaked.offenders


def test_ascii_is_tried_whatever_counts_as_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "has_chinese", lambda text: True)
    tried = checks.others_are_unchanged(OLD, OLD, texts=["English\n中文"]).tried_on
    assert tried == "7 characters"


def test_a_text_that_does_not_come_back_is_found() -> None:
    lossy = Form(name="f", encode=OLD.encode, decode=lambda ids: OLD.decode(ids).strip())
    assert checks.texts_come_back(lossy, texts=["a ", "a", "▁"], missing=()).offenders == ["'a '"]
    proof = checks.texts_come_back(lossy, texts=["a ", "a"], missing=[0x20])
    assert proof.holds and proof.tried_on == "1 texts, 1 cannot be spelt by the old one"


def test_forms_that_differ_are_found() -> None:
    other = Form(name="g", encode=lambda text: OLD.encode(text.strip()), decode=OLD.decode)
    assert checks.forms_agree(OLD, other, texts=["a", " a"]).offenders == ["' a'"]


def test_a_text_that_got_longer_is_found() -> None:
    longer = Form(name="g", encode=lambda text: [*OLD.encode(text), 0], decode=OLD.decode)
    assert len(checks.nothing_is_longer(OLD, longer, texts=["a", "b"]).offenders) == 2


def test_moved_ids_gaps_and_miscounts_are_found() -> None:
    old = {"a": 0, "b": 1}
    assert checks.old_ids_are_unchanged(old, old | {"c": 2}, add=1).holds
    for new in ({"a": 1, "b": 0, "c": 2}, old | {"c": 3}, old | {"c": 2, "d": 3}, {"a": 0, "c": 2}):
        assert not checks.old_ids_are_unchanged(old, new, add=1).holds


def test_lost_bytes_and_unknown_tokens_are_found() -> None:
    ids = list(range(3, 259))
    assert checks.bytes_are_intact(OLD, byte_ids=ids, unknown=0, texts=BATTERY).holds
    assert len(checks.bytes_are_intact(OLD, byte_ids=ids[::-1], unknown=0, texts=[]).offenders) == 5
    unsure = Form(name="f", encode=lambda text: [0, *OLD.encode(text)], decode=OLD.decode)
    assert checks.bytes_are_intact(unsure, byte_ids=ids, unknown=0, texts=["a"]).offenders == ["'a'"]


def test_ranks_out_of_order_are_found() -> None:
    joined = [("a", "b"), ("ab", "c")]
    assert checks.ranks_are_consistent({"ab": 5, "abc": 6}, old_last=4, joined=joined).holds
    for ranks, old_last in (({"ab": 5, "abc": 6}, 5), ({"ab": 5, "abc": 5}, 4), ({"abc": 5, "ab": 6}, 4)):
        assert not checks.ranks_are_consistent(ranks, old_last=old_last, joined=joined).holds


def test_fertility_is_tokens_a_character(extension: Extension, held_out: list[str]) -> None:
    chinese, english = ([text for text in held_out if ("的" in text) is has] for has in (True, False))
    zh, en = checks.fertilities(extension.old, extension.new[0], domains={"zh": chinese, "en": english, "none": [""]})
    assert zh.before == sum(len(extension.old.encode(text)) for text in chinese) / sum(map(len, chinese))
    assert zh.after < 0.97 * zh.before
    assert en.characters == sum(map(len, english))


def test_exactly_so_many_pieces_are_new(extension: Extension) -> None:
    assert len(extension.plan.additions) == len(extension.subtokens) == len(extension.spelt) == ADD
    assert extension.vocab_size == extension.first_id + ADD == len(extension.new_tokens)


def test_the_old_spelling_of_a_new_piece_has_no_space_before_it(extension: Extension) -> None:
    for ids, spelt in list(zip(extension.subtokens, extension.spelt.values(), strict=True))[::10]:
        if len(spelt) % 3 == 0:
            text = extension.old.decode(extension.old.encode(spelt.decode(errors="replace"))[:0] + list(ids))
            assert "▁" not in text and not text.startswith(" ")
            assert len(ids) <= len(spelt)


def test_a_fast_form_without_its_last_pairs_fails(sentencepiece_extension: Extension, held_out: list[str]) -> None:
    """The negative control of the whole: a damaged tokenizer.json."""
    content: dict[str, Any] = json.loads(sentencepiece_extension.files["tokenizer.json"])
    content["model"]["merges"] = content["model"]["merges"][:-100]
    from_pairs = merge.pairs(ModelProto.FromString(sentencepiece_extension.files["tokenizer.model"]))
    assert len(from_pairs) == len(content["model"]["merges"]) + 100
    damaged = dataclasses.replace(
        sentencepiece_extension,
        new=(sentencepiece_extension.new[0], fast_form(json.dumps(content))),
        joining=(fast_form(json.dumps(content)),),
    )
    failed = [proof.statement for proof in damaged.prove(held_out) if not proof.holds]
    assert failed == [
        "tokenizer.json: every new piece can be produced",
        "SentencePiece and tokenizer.json give the same ids",
    ]
