"""New pieces in a SentencePiece model, and the same model as a tokenizer.json."""

import json

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_sat.vocab import merge
from megatron_sat.vocab.extension import Extension
from megatron_sat.vocab.form import fast_form, sentencepiece_form
from megatron_sat.vocab.plan import segment
from tests.vocab.conftest import ADD, SHIPPED

Piece = ModelProto.SentencePiece


@pytest.fixture(scope="module")
def old() -> ModelProto:
    return ModelProto.FromString(SHIPPED.read_bytes())


@pytest.fixture(scope="module")
def new(sentencepiece_extension: Extension) -> ModelProto:
    return ModelProto.FromString(sentencepiece_extension.files["tokenizer.model"])


def test_old_pieces_stay_as_they_are_and_new_ones_follow_with_lower_scores(old: ModelProto, new: ModelProto) -> None:
    assert list(new.pieces)[: len(old.pieces)] == list(old.pieces)
    scores = [piece.score for piece in new.pieces[len(old.pieces) :]]
    assert len(scores) == ADD
    assert scores == sorted(set(scores), reverse=True)
    assert scores[0] < min(piece.score for piece in old.pieces)
    assert new.normalizer_spec == old.normalizer_spec


def test_the_literal_segmentation_is_sentencepieces(new: ModelProto, held_out: list[str]) -> None:
    """The twin: what plan.py reckons with is what the library does."""
    ranks = {piece.piece: -piece.score for piece in new.pieces if piece.type == Piece.NORMAL}
    processor = SentencePieceProcessor(model_proto=new.SerializeToString())
    for text in (line[:60] for doc in held_out[:40] for line in doc.split("\n")[:3]):
        literal = segment("▁" + text.replace(" ", "▁"), rank=lambda left, right: ranks.get(left + right))
        ids = [new_id for part in literal for new_id in spelling(part, new=processor)]
        assert processor.encode(text) == (ids if text else [])


def spelling(part: str, *, new: SentencePieceProcessor) -> list[int]:
    found = new.piece_to_id(part)
    return [found] if found != new.unk_id() else [new.piece_to_id(f"<0x{byte:02X}>") for byte in part.encode()]


def with_runs_of_spaces(old: ModelProto) -> ModelProto:
    """As Llama 2: runs of 2 to 14 and of 16 spaces, all of one score far below the others."""
    proto = ModelProto.FromString(old.SerializeToString())
    have = {piece.piece for piece in proto.pieces}
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11):
        if "▁" * length not in have:
            proto.pieces.add(piece="▁" * length, score=-1e9, type=Piece.NORMAL)
    return proto


def test_runs_of_spaces_of_equal_score_are_the_same_in_both_forms(old: ModelProto) -> None:
    proto = with_runs_of_spaces(old)
    ours, fast = sentencepiece_form(proto), fast_form(json.dumps(merge.to_fast_form(proto)))
    texts = [f"{head}{' ' * n}{tail}" for n in range(120) for head in ("", "a", "中") for tail in ("", "b", "\n  x")]
    assert [text for text in texts if ours.encode(text) != fast.encode(text)] == []


def test_another_order_of_these_runs_is_seen(old: ModelProto) -> None:
    proto = with_runs_of_spaces(old)
    content = merge.to_fast_form(proto)
    content["model"]["merges"].sort(key=lambda pair: len(pair[0]) if set(pair[0]) == {"▁"} else 0)
    ours, fast = sentencepiece_form(proto), fast_form(json.dumps(content))
    assert any(ours.encode(f"a{' ' * n}b") != fast.encode(f"a{' ' * n}b") for n in range(120))


def test_new_scores_stay_exact_where_old_runs_of_spaces_lie_at_minus_1e9(old: ModelProto) -> None:
    proto = with_runs_of_spaces(old)
    new, plan = merge.extend_model(proto, candidates=["凹凸", "囧囧"], add=5)
    assert merge.lowest_score(proto) == merge.lowest_score(old)
    assert len({piece.score for piece in new.pieces[len(proto.pieces) :]}) == len(plan.additions) == 5


def test_a_model_without_dummy_prefix_has_a_form_without_it(new: ModelProto, held_out: list[str]) -> None:
    bare = ModelProto.FromString(new.SerializeToString())
    bare.normalizer_spec.add_dummy_prefix = False
    bare.trainer_spec.bos_id = -1
    content = merge.to_fast_form(bare)
    ours, fast = sentencepiece_form(bare), fast_form(json.dumps(content))
    assert content["post_processor"] is None
    for text in [*held_out[:20], " a", "a", ""]:
        assert fast.encode(text) == ours.encode(text)
        assert fast.decode(fast.encode(text)) == text


def test_each_piece_has_the_pair_that_it_is_joined_from() -> None:
    ranks = {"bc": 0.0, "ab": 1.0, "abc": 2.0, "xyz": 3.0}
    assert merge.halves_of("abc", ranks=ranks) == ("a", "bc")
    assert merge.halves_of("xyz", ranks=ranks) is None
