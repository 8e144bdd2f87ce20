"""Text to token ids and back: the only door to sentencepiece and transformers.

A thin class of our own rather than megatron.core's wrappers: those differ between releases, may ask the
Hugging Face hub, and know nothing of a fingerprint. `Tokenizer` carries what `GPTDataset` asks of one
(``vocab_size``, ``eod``, ``pad``, ``unique_identifiers``) and what tells two tokenizers apart. Only local
files are read; nothing is unpickled.
"""

import difflib
import hashlib
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sat.log import warn_once

NO_TOKEN = -1
"""The id of a special token that a tokenizer has not; as ``pad`` it marks filling and is in no text."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What the data rooms, the model's builder and `GPTDataset` know of a tokenizer."""

    kind: str
    """The library behind it: "sentencepiece", "huggingface" or "null"."""
    path: str
    """Where it was read from; empty for the null tokenizer. Not part of the fingerprint."""
    vocab_size: int
    """Ids are in [0, vocab_size); padding for tensor parallelism is the model's affair."""
    eod: int
    """Ends a document."""
    bos: int
    """Begins a document where asked for, or NO_TOKEN."""
    pad: int
    """Fills up, or NO_TOKEN; never another special token's id: `GPTDataset` leaves pad out of the loss."""
    fingerprint: str
    """sha256 of what decides the ids: pieces or merges, normalisation, special ids. Not of names or dates."""
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    @property
    def eos(self) -> int:
        """`GPTDataset` compares it with ``pad``."""
        return self.eod

    @property
    def unique_identifiers(self) -> "OrderedDict[str, str]":
        """What enters the name of megatron's index caches: another tokenizer is another cache."""
        return OrderedDict(kind=self.kind, fingerprint=self.fingerprint)

    def tokenize(self, text: str) -> list[int]:
        """Ids of ``text``, without bos or eod. Special tokens spelled in the text stay text."""
        return self.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens leave nothing behind."""
        return self.decode([int(i) for i in ids])


def build_tokenizer(kind: str, *, model: str | None = None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that Megatron's ``--tokenizer-type`` and ``--tokenizer-model`` name.

    kind: a key of `KINDS`. model: a SentencePiece file or a Hugging Face folder. vocab_size: of a
    NullTokenizer.
    Raises ValueError for an unknown kind, a missing or unreadable model and one that cannot end a document.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.3) or ["HuggingFaceTokenizer"]
        raise ValueError(f"tokenizer_type must be one of {', '.join(KINDS)}, got {kind}; try {near[0]}")
    if kind == "NullTokenizer":
        return _null(vocab_size)
    if vocab_size is not None:
        warn_once(
            f"vocab_size ({vocab_size}) has no effect with {kind}, which knows its own; "
            "leave --vocab-size out"
        )
    if model is None:
        raise ValueError(f"{kind} needs --tokenizer-model, the path of a local model, got none; add it")
    if not Path(model).exists():
        raise ValueError(
            f"tokenizer_model must be a local path, {model} does not exist; fetch it (no hub is asked)"
        )
    return KINDS[kind](model)


def tokenizer_of_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder: its fast form, or a SentencePiece model where there is no other.

    Raises ValueError for a folder without a tokenizer.
    """
    sentencepiece = folder / "tokenizer.model"
    if sentencepiece.is_file() and not (folder / "tokenizer.json").is_file():
        return build_tokenizer("Llama2Tokenizer", model=str(sentencepiece))
    return build_tokenizer("HuggingFaceTokenizer", model=str(folder))


def _sentencepiece(model: str) -> Tokenizer:
    try:
        serialized = Path(model).read_bytes()
        processor = SentencePieceProcessor(model_proto=serialized)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"tokenizer_model must be a SentencePiece model, {model} is not: {error}") from error
    if not serialized:  # parses as a model without pieces
        raise ValueError(
            f"tokenizer_model must be a SentencePiece model, {model} is an empty file; fetch it again"
        )
    eod, bos, pad = processor.eos_id(), processor.bos_id(), processor.pad_id()
    _require_eod(eod, model=model, way_out="train it with eos_id=2")
    return Tokenizer(
        kind="sentencepiece",
        path=str(model),
        vocab_size=processor.get_piece_size(),
        eod=eod,
        bos=bos,
        pad=_unambiguous_pad(pad, others=(eod, bos, processor.unk_id())),
        fingerprint=_sentencepiece_fingerprint(serialized),
        encode=processor.encode,
        decode=processor.decode,
    )


def _sentencepiece_fingerprint(serialized: bytes) -> str:
    """Pieces, normalisation, and of the trainer's settings those that act at encoding: no file names."""
    proto = ModelProto.FromString(serialized)
    digest = hashlib.sha256(b"sentencepiece")
    for piece in proto.pieces:
        digest.update(repr((piece.piece, piece.score, piece.type)).encode())
    trainer = proto.trainer_spec
    settings = (trainer.model_type, trainer.byte_fallback, trainer.treat_whitespace_as_suffix)
    special = (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    digest.update(repr((settings, special)).encode())
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        flags = (spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces)
        digest.update(repr((flags, spec.precompiled_charsmap)).encode())
    return digest.hexdigest()


def _huggingface(model: str) -> Tokenizer:
    if not Path(model).is_dir():
        raise ValueError(
            f"tokenizer_model must be a Hugging Face folder, {model} is a file; give the folder it lies in"
        )
    sentencepiece = Path(model) / "tokenizer.model"
    if sentencepiece.is_file() and not (Path(model) / "tokenizer.json").is_file():
        # transformers would make the fast form itself: for Mistral's models without the space before a text
        raise ValueError(
            f"tokenizer_model must hold a tokenizer.json, {model} holds a SentencePiece model alone; use "
            f"--tokenizer-type Llama2Tokenizer --tokenizer-model {sentencepiece}"
        )
    try:
        loaded = _open(str(Path(model).resolve()))
    except Exception as error:
        # the library raises bare Exception, OSError, ValueError, KeyError: each is about this folder
        raise ValueError(
            f"tokenizer_model must be a Hugging Face tokenizer, {model} cannot be read: {error}"
        ) from error
    if not loaded.is_fast:
        raise ValueError(
            f"tokenizer_model must hold a tokenizer.json, {model} is a {type(loaded).__name__} in Python; "
            "convert it with the tokenizers library"
        )
    eod, bos, pad = (_id(i) for i in (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id))
    _require_eod(eod, model=model, way_out='name an "eos_token" in its tokenizer_config.json')
    backend = loaded.backend_tokenizer
    backend.encode_special_tokens = True  # "</s>" in a document is text, as it is for SentencePiece
    others = tuple(
        i
        for token, i in zip(loaded.all_special_tokens, loaded.all_special_ids, strict=True)
        if token != loaded.pad_token
    )
    return Tokenizer(
        kind="huggingface",
        path=str(model),
        vocab_size=len(loaded),
        eod=eod,
        bos=bos,
        pad=_unambiguous_pad(pad, others=(*others, eod, bos)),
        fingerprint=_huggingface_fingerprint(backend.to_str(), special=(eod, bos)),
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
    )


def transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """A fresh tokenizer of transformers from the folder of a "huggingface" one, in which special tokens that a text
    spells are special: for chat templates, which write them."""
    return _open(str(Path(tokenizer.path).resolve()))


def _open(folder: str) -> Any:
    """What AutoTokenizer gives; for Mistral's models also where mistral-common lacks packages of its own."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, **local)
    except ImportError:
        # transformers 5 imports MistralCommonBackend for these models wherever mistral-common is installed, also where
        # tiktoken, which that imports, is not (pip install --no-deps); without mistral-common it takes the class below
        if importlib.util.find_spec("mistral_common") is None:
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder, **local)


def _huggingface_fingerprint(serialized: str, *, special: tuple[int, ...]) -> str:
    """The whole tokenizer.json but for padding, truncation and post-processing, which we do not use."""
    content = json.loads(serialized)
    for unused in ("padding", "truncation", "post_processor"):
        content.pop(unused, None)
    canonical = json.dumps([content, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(b"huggingface" + canonical.encode()).hexdigest()


def _null(vocab_size: int | None) -> Tokenizer:
    """Numbers in the text are the ids and the last id ends a document: for benchmarks without text."""
    if vocab_size is None or vocab_size < 2:
        raise ValueError(
            f"vocab_size of a NullTokenizer must be at least 2, got {vocab_size}; set --vocab-size"
        )

    def encode(text: str) -> list[int]:
        ids = text.split()
        if not all(i.isascii() and i.isdigit() and int(i) < vocab_size for i in ids):
            raise ValueError(
                f"text of a NullTokenizer must be ids below {vocab_size}, got {text[:40]!r}; check the field"
            )
        return [int(i) for i in ids]

    return Tokenizer(
        kind="null",
        path="",
        vocab_size=vocab_size,
        eod=vocab_size - 1,
        bos=NO_TOKEN,
        pad=NO_TOKEN,
        fingerprint=hashlib.sha256(f"null {vocab_size}".encode()).hexdigest(),
        encode=encode,
        decode=lambda ids: " ".join(str(i) for i in ids if i != vocab_size - 1),
    )


KINDS: dict[str, Callable[..., Tokenizer]] = {
    "SentencePieceTokenizer": _sentencepiece,
    "GPTSentencePieceTokenizer": _sentencepiece,
    "Llama2Tokenizer": _sentencepiece,
    "HuggingFaceTokenizer": _huggingface,
    "NullTokenizer": _null,
}
"""Megatron's ``--tokenizer-type``. As in megatron-core 0.19 the three SentencePiece names mean one thing."""


def _id(value: int | None) -> int:
    return NO_TOKEN if value is None else value


def _require_eod(eod: int, *, model: str, way_out: str) -> None:
    if eod == NO_TOKEN:
        raise ValueError(f"a tokenizer must have a token that ends a document, {model} has none; {way_out}")


def _unambiguous_pad(pad: int, *, others: tuple[int, ...]) -> int:
    return NO_TOKEN if pad in others else pad
