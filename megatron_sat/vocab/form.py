"""One way to use a tokenizer: the library behind it, reduced to what the proofs ask of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import
from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Form:
    """Text to ids and back; special tokens spelled in a text are text."""

    name: str
    """What a reader calls it: "SentencePiece", "tokenizer.json"."""
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def sentencepiece_form(proto: ModelProto, *, name: str = "SentencePiece") -> Form:
    """A SentencePiece model as its own library uses it."""
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    return Form(name=name, encode=processor.encode, decode=lambda ids: processor.decode(list(ids)))


def fast_form(serialized: str, *, name: str = "tokenizer.json") -> Form:
    """A tokenizer.json as the tokenizers library uses it."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Form(
        name=name,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
    )
