"""New pieces in a SentencePiece BPE model, and the same model as a tokenizer.json.

sentencepiece joins the neighbours whose joint piece has the highest score, leftmost first among equals. New pieces get
scores below all old ones, one apart, in the order in which plan.py accepted them.

The tokenizer.json lists for each piece the one pair that it is really joined from. That is enough: as long as no join
crosses the border of a piece, what happens inside is what happens with its text alone, so each piece has one pair
wherever it occurs; and a pair that is never met can do no harm by being left out.
"""

from collections.abc import Sequence
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

from megatron_sat.vocab.plan import Plan, Vocabulary, plan_additions, segment

Piece = ModelProto.SentencePiece
SPACE = "▁"


def extend_model(proto: ModelProto, *, candidates: Sequence[str], add: int) -> tuple[ModelProto, Plan]:
    """A copy of the model with exactly `add` pieces more, and how each is joined.

    Raises ValueError where the candidates do not suffice.
    """
    lowest = lowest_score(proto)
    vocabulary = Vocabulary(
        known={piece.piece for piece in proto.pieces},
        ranks={piece.piece: -piece.score for piece in proto.pieces if piece.type == Piece.NORMAL},
        by_piece=True,
        first_rank=1 - lowest,
    )
    plan = plan_additions(candidates, add=add, vocabulary=vocabulary)
    extended = ModelProto.FromString(proto.SerializeToString())
    for order, addition in enumerate(plan.additions):
        extended.pieces.add(piece=addition.piece, score=lowest - 1 - order, type=Piece.NORMAL)
    extended.trainer_spec.vocab_size = len(extended.pieces)
    return extended, plan


def lowest_score(proto: ModelProto) -> float:
    """The lowest score that a new piece could meet, a whole number.

    Runs of spaces, which Llama 2 scores -1e9, share no character with a new piece: the order between them is idle, and
    at -1e9 fp32 could not tell one score from the next.
    """
    scores = (piece.score for piece in proto.pieces if piece.type == Piece.NORMAL and piece.piece.strip(SPACE))
    return float(min(scores) // 1)


def to_fast_form(proto: ModelProto) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids."""
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    special = [(i, p.piece) for i, p in enumerate(proto.pieces) if p.type in (Piece.UNKNOWN, Piece.CONTROL)]
    dummy = proto.normalizer_spec.add_dummy_prefix
    bos = next((piece for i, piece in special if i == proto.trainer_spec.bos_id), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for i, piece in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": ([{"type": "Prepend", "prepend": SPACE}] if dummy else [])
            + [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None if bos is None else _begin_with(bos, token_id=vocabulary[bos]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ]
            + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy else []),
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(p.piece for p in proto.pieces if p.type == Piece.UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in pairs(proto)],
        },
    }


def _begin_with(bos: str, *, token_id: int) -> dict[str, Any]:
    """The post-processor that puts bos before a text, as Llama's does."""
    special, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, *second],
        "special_tokens": {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}},
    }


def pairs(proto: ModelProto) -> list[tuple[str, str]]:
    """The pair that each piece of several characters is joined from, best first; a piece that is never produced has
    none.

    Pieces of equal score (Llama 2's runs of spaces) are joined from the left as far as they go before the next one
    begins, which in a list of pairs is: the longer left half first.
    """
    ranks = {piece.piece: -piece.score for piece in proto.pieces if piece.type == Piece.NORMAL}
    found: list[tuple[float, int, tuple[str, str]]] = []
    for piece, score in ranks.items():
        if len(piece) > 1 and (halves := halves_of(piece, ranks=ranks)) is not None:
            found.append((score, -len(halves[0]), halves))
    return [halves for *_, halves in sorted(found, key=lambda item: item[:2])]


def halves_of(piece: str, *, ranks: dict[str, float]) -> tuple[str, str] | None:
    """What the text of a piece is cut in just before it is whole, or None where it never becomes whole."""
    last: list[str] = []

    def rank(left: str, right: str) -> float | None:
        if (found := ranks.get(left + right)) is not None and left + right == piece:
            last[:] = [left, right]
        return found

    return (last[0], last[1]) if segment(piece, rank=rank) == [piece] else None
