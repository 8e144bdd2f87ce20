"""An extended tokenizer of either kind, in one shape: what the proofs, the new rows and the files need of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

from megatron_sat.vocab import bytelevel, merge
from megatron_sat.vocab.battery import BATTERY
from megatron_sat.vocab.checks import (
    Proof,
    bytes_are_intact,
    every_piece_is_produced,
    forms_agree,
    nothing_is_longer,
    old_ids_are_unchanged,
    others_are_unchanged,
    ranks_are_consistent,
    texts_come_back,
)
from megatron_sat.vocab.form import Form, fast_form, sentencepiece_form
from megatron_sat.vocab.plan import Plan
from megatron_sat.vocab.source import Source

Piece = ModelProto.SentencePiece


@dataclass(frozen=True, kw_only=True)
class Extension:
    """An old tokenizer and the new one that continues it."""

    old: Form
    new: tuple[Form, ...]
    """The same new tokenizer through each library; the first is the one that `old` is compared with."""
    joining: tuple[Form, ...]
    """`new`, but made to join pieces where it would also look whole words up (Llama 3's ignore_merges)."""
    plan: Plan
    old_tokens: Mapping[str, int]
    new_tokens: Mapping[str, int]
    ranks: Mapping[str, float]
    """Of each new piece, lower is joined first."""
    old_last: float
    """The last rank of the old pieces that a new one could meet."""
    spelt: Mapping[str, bytes]
    """The bytes of each new piece."""
    subtokens: Sequence[Sequence[int]]
    """How the old tokenizer spells each new piece, without a space before it."""
    byte_ids: Sequence[int]
    """Ids of the 256 bytes where they are pieces of their own, else empty."""
    missing: Sequence[int]
    """Bytes that the old tokenizer cannot spell at all."""
    unknown: int
    files: Mapping[str, bytes]
    """tokenizer.json, and tokenizer.model where there was one."""

    @property
    def first_id(self) -> int:
        """The first new id."""
        return max(self.old_tokens.values()) + 1

    @property
    def vocab_size(self) -> int:
        """Old and new tokens; padding is not counted."""
        return self.first_id + len(self.plan.additions)

    def prove(self, texts: Sequence[str]) -> list[Proof]:
        """All proofs on these texts and the battery."""
        tried = [*BATTERY, *texts]
        joined = [addition.halves for addition in self.plan.additions if addition.halves is not None]
        used = {half for pair in joined for half in pair}
        pieces = {self.new_tokens[piece]: spelt for piece, spelt in self.spelt.items()}
        halves = {self.new_tokens[piece] for piece in self.spelt if piece in used}
        proofs = [every_piece_is_produced(form, pieces=pieces, halves=halves) for form in self.joining]
        proofs += [forms_agree(self.new[0], other, texts=tried) for other in self.new[1:]]
        for form in self.new:
            proofs.append(others_are_unchanged(self.old, form, texts=tried))
            proofs.append(texts_come_back(form, texts=tried, missing=self.missing))
            if self.byte_ids:
                proofs.append(bytes_are_intact(form, byte_ids=self.byte_ids, unknown=self.unknown, texts=tried))
        proofs.append(nothing_is_longer(self.old, self.new[0], texts=tried))
        proofs.append(old_ids_are_unchanged(self.old_tokens, self.new_tokens, add=len(self.plan.additions)))
        proofs.append(ranks_are_consistent(self.ranks, old_last=self.old_last, joined=joined))
        return proofs


def extend(source: Source, *, candidates: Sequence[str], add: int) -> Extension:
    """Extend a tokenizer by exactly `add` pieces. Raises ValueError where the candidates do not suffice."""
    if source.proto is not None:
        return _extend_sentencepiece(source.proto, candidates=candidates, add=add)
    assert source.content is not None
    return _extend_bytelevel(source.content, candidates=candidates, add=add)


def known_texts(source: Source) -> set[str]:
    """The texts that are a piece of the old tokenizer."""
    if source.proto is not None:
        return {piece.piece for piece in source.proto.pieces if piece.type == Piece.NORMAL}
    assert source.content is not None
    return bytelevel.known_texts(source.content)


def _extend_sentencepiece(proto: ModelProto, *, candidates: Sequence[str], add: int) -> Extension:
    extended, plan = merge.extend_model(proto, candidates=candidates, add=add)
    content = json.dumps(merge.to_fast_form(extended), ensure_ascii=False)
    forms = (sentencepiece_form(extended), fast_form(content))
    new_scores = {piece.piece: piece.score for piece in extended.pieces[len(proto.pieces) :]}
    bare = ModelProto.FromString(proto.SerializeToString())
    bare.normalizer_spec.add_dummy_prefix = False
    speller = SentencePieceProcessor(model_proto=bare.SerializeToString())
    old_tokens = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    return Extension(
        old=sentencepiece_form(proto, name="the old tokenizer"),
        new=forms,
        joining=forms,
        plan=plan,
        old_tokens=old_tokens,
        new_tokens={piece.piece: i for i, piece in enumerate(extended.pieces)},
        ranks={piece: -score for piece, score in new_scores.items()},
        old_last=-merge.lowest_score(proto),
        spelt={piece: piece.encode() for piece in new_scores},
        subtokens=[speller.encode(piece) for piece in new_scores],
        byte_ids=[old_tokens[f"<0x{byte:02X}>"] for byte in range(256)],
        missing=(),
        unknown=speller.unk_id(),
        files={"tokenizer.model": extended.SerializeToString(), "tokenizer.json": content.encode()},
    )


def _extend_bytelevel(old: Mapping[str, Any], *, candidates: Sequence[str], add: int) -> Extension:
    extended, plan = bytelevel.extend_fast_form(old, candidates=candidates, add=add)
    content = json.dumps(extended, ensure_ascii=False)
    joining = json.dumps(extended | {"model": extended["model"] | {"ignore_merges": False}})
    merges = bytelevel.merges_of(old)
    ranks = {pair: float(i) for i, pair in enumerate(merges)}
    new_pieces = [addition.piece for addition in plan.additions]
    rank_of = {left + right: float(i) for i, (left, right) in enumerate(bytelevel.merges_of(extended))}
    old_tokens = bytelevel.ids_of(old)
    return Extension(
        old=fast_form(json.dumps(old), name="the old tokenizer"),
        new=(fast_form(content),),
        joining=(fast_form(joining),),
        plan=plan,
        old_tokens=old_tokens,
        new_tokens=bytelevel.ids_of(extended),
        ranks={piece: rank_of[piece] for piece in new_pieces},
        old_last=len(merges) - 1,
        spelt={piece: bytelevel.to_bytes(piece) or b"" for piece in new_pieces},
        subtokens=[
            [old_tokens[part] for part in bytelevel.segment_bytes(piece, ranks=ranks)] for piece in new_pieces
        ],
        byte_ids=(),
        missing=bytelevel.missing_bytes(old),
        unknown=-1,
        files={"tokenizer.json": content.encode()},
    )
