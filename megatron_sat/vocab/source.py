"""What is extended: a SentencePiece BPE model or a byte-level tokenizer.json, read and judged.

A tokenizer that cannot be extended with the proofs of checks.py is refused here, with the reason: a unigram model has
no ranks to continue, normalisation cannot be undone, a vocabulary without bytes cannot spell everything.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

Piece = ModelProto.SentencePiece


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of `proto` and `content` is there."""

    path: Path
    proto: ModelProto | None
    """A SentencePiece model, with the Hugging Face folder's own special tokens as CONTROL pieces at their ids."""
    content: dict[str, Any] | None
    """A tokenizer.json of the byte-level kind."""

    @property
    def folder(self) -> Path | None:
        """The Hugging Face folder, where it is one."""
        return self.path if self.path.is_dir() else None


def read_source(path: str | Path) -> Source:
    """Read a SentencePiece file or a Hugging Face folder (tokenizer.model if it has one, else tokenizer.json).

    Raises ValueError for what is neither, or cannot be extended.
    """
    path = Path(path)
    file = path / "tokenizer.model" if path.is_dir() else path
    proto = _read_proto(file) if file.is_file() else None
    if proto is not None and proto.pieces:
        _refuse_model(proto, file=file)
        if path.is_dir():
            _take_special_tokens(proto, folder=path)
        return Source(path=path, proto=proto, content=None)
    file = path / "tokenizer.json"
    if not path.is_dir() or not file.is_file():
        raise ValueError(
            f"--tokenizer must be a SentencePiece model or a Hugging Face folder with tokenizer.model or "
            f"tokenizer.json, got {path}; check the path"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    _refuse_fast_form(content, file=file)
    return Source(path=path, proto=None, content=content)


def _read_proto(file: Path) -> ModelProto | None:
    try:
        return ModelProto.FromString(file.read_bytes())
    except DecodeError:  # Llama 3 ships a tiktoken file of this name
        return None


def _refuse_model(proto: ModelProto, *, file: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    types = {piece.type for piece in proto.pieces}
    rules = (
        (trainer.model_type == TrainerSpec.BPE, "be of model_type BPE, whose ranks can be continued"),
        (trainer.byte_fallback and Piece.BYTE in types, "have byte_fallback, so that every text has a spelling"),
        (not normalizer.precompiled_charsmap, "have no normalisation (identity), so that text comes back"),
        (not normalizer.remove_extra_whitespaces, "have remove_extra_whitespaces off, so that text comes back"),
        (normalizer.escape_whitespaces, "have escape_whitespaces on, as Llama 2 has"),
        (not trainer.treat_whitespace_as_suffix, "have treat_whitespace_as_suffix off, as Llama 2 has"),
        (not types & {Piece.USER_DEFINED, Piece.UNUSED}, "have no user-defined or unused pieces, which are not joined"),
    )
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"--tokenizer must {rule}, {file} is otherwise; extend a model of Llama 2's kind")


def _take_special_tokens(proto: ModelProto, *, folder: Path) -> None:
    """Append the tokens that the folder's tokenizer.json has beyond the model, so that new ids come after them."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
    for token in sorted(added, key=lambda token: token["id"]):
        if token["id"] < len(proto.pieces):
            continue
        if token["id"] > len(proto.pieces):
            raise ValueError(
                f"ids of --tokenizer must be without gaps, {file} gives {token['content']!r} the id {token['id']} "
                f"after {len(proto.pieces) - 1}; renumber its added tokens"
            )
        proto.pieces.add(piece=token["content"], score=0.0, type=Piece.CONTROL)


def _refuse_fast_form(content: dict[str, Any], *, file: Path) -> None:
    model = content["model"]
    levels = [part["type"] for key in ("pre_tokenizer", "decoder") for part in parts_of(content.get(key))]
    rules = (
        (model.get("type") == "BPE", "hold a BPE model, whose ranks can be continued"),
        (levels.count("ByteLevel") >= 2, "be byte-level, or lie beside its tokenizer.model"),
        (not model.get("dropout"), "have no dropout, so that a text has one spelling"),
        (not model.get("continuing_subword_prefix"), "have no continuing_subword_prefix"),
        (not model.get("end_of_word_suffix"), "have no end_of_word_suffix"),
    )
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"--tokenizer must {rule}, {file} is otherwise; extend one of Llama 3's or Qwen's kind")


def parts_of(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The members of a sequence in a tokenizer.json, or the one member, or none."""
    if part is None:
        return []
    members = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders")
    return [inner for member in members for inner in parts_of(member)] if members else [part]
