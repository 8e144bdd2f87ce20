"""New merges in a byte-level BPE tokenizer.json (Llama 3, Qwen, GPT-2, SmolLM2).

Its pieces are bytes, written with GPT-2's stand-in characters, and joined by a list of pairs. New pairs go to the end
of the list. A character of three bytes needs two joins, so pieces of two bytes come in between; the first two bytes of
a Chinese character begin no others, so a text without Chinese still meets none of them.

New ids come after every old one, those of special tokens included. Where special tokens follow the pieces, they are
listed among the pieces too, as Llama 2 does: the tokenizers library would otherwise number them anew when it reads the
file.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from megatron_sat.vocab.plan import Plan, Vocabulary, plan_additions, segment


def _stand_ins() -> list[str]:
    """GPT-2's character for each of the 256 bytes: itself where it prints, else one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(0x100 + i) for i in range(256))
    return [chr(byte) if byte in printed else next(others) for byte in range(256)]


STAND_INS = _stand_ins()
_BYTES = {character: byte for byte, character in enumerate(STAND_INS)}


def to_symbols(text: str) -> str:
    """A text as the tokenizer writes it: one character a byte."""
    return "".join(STAND_INS[byte] for byte in text.encode())


def to_bytes(piece: str) -> bytes | None:
    """The bytes of a piece, or None for one that is not written so: a special token."""
    return bytes(_BYTES[character] for character in piece) if all(c in _BYTES for c in piece) else None


def to_text(piece: str) -> str | None:
    """The text of a piece, or None for a part of a character or a special token."""
    try:
        return None if (found := to_bytes(piece)) is None else found.decode()
    except UnicodeDecodeError:
        return None


def merges_of(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a tokenizer.json, in either of its spellings."""
    both = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in content["model"]["merges"])
    return [(left, right) for left, right in both]


def ids_of(content: Mapping[str, Any]) -> dict[str, int]:
    """All tokens of a tokenizer.json, special ones included."""
    return content["model"]["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def known_texts(content: Mapping[str, Any]) -> set[str]:
    """The texts that are one piece already."""
    return {text for piece in content["model"]["vocab"] if (text := to_text(piece)) is not None}


def missing_bytes(content: Mapping[str, Any]) -> list[int]:
    """Bytes without a piece: characters with one of them are silently left out of what such a tokenizer encodes.

    Some lack only what is in no UTF-8 (0xC0, 0xC1, 0xF5 to 0xFF); SmolLM2 lacks eight more.
    """
    return [byte for byte, symbol in enumerate(STAND_INS) if symbol not in content["model"]["vocab"]]


def whole_words(pieces: Iterable[str], *, content: Mapping[str, Any]) -> list[str]:
    """Of these texts the ones that normalisation leaves alone and the pre-tokenizer does not cut: others cannot be
    produced."""
    tokenizer = Tokenizer.from_str(json.dumps(content))

    def is_whole(piece: str) -> bool:
        if tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str(piece) != piece:
            return False
        return tokenizer.pre_tokenizer is None or len(tokenizer.pre_tokenizer.pre_tokenize_str(piece)) == 1

    return [piece for piece in pieces if is_whole(piece)]


def extend_fast_form(
    content: Mapping[str, Any], *, candidates: Sequence[str], add: int
) -> tuple[dict[str, Any], Plan]:
    """A copy of the tokenizer.json with exactly `add` pieces more, and how each is joined.

    candidates: texts, best first. Raises ValueError where they do not suffice.
    """
    merges = merges_of(content)
    old = ids_of(content)
    vocabulary = Vocabulary(
        known=set(old), ranks={pair: float(i) for i, pair in enumerate(merges)}, by_piece=False, first_rank=len(merges)
    )
    fit = [to_symbols(piece) for piece in whole_words(candidates, content=content)]
    spelt = [piece for piece in fit if all(symbol in old for symbol in piece)]
    plan = plan_additions(spelt, add=add, vocabulary=vocabulary)
    extended = copy.deepcopy(dict(content))
    first = max(old.values()) + 1
    model = extended["model"]
    model["vocab"] = old | {addition.piece: first + i for i, addition in enumerate(plan.additions)}
    joined = [addition.halves for addition in plan.additions if addition.halves is not None]
    model["merges"] = [list(pair) for pair in [*merges, *joined]]
    return extended, plan


def segment_bytes(piece: str, *, ranks: Mapping[tuple[str, str], float]) -> list[str]:
    """How the pairs of a tokenizer cut a piece, which need not be text."""
    return segment(piece, rank=lambda left, right: ranks.get((left, right)))
