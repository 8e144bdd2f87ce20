"""Proofs that an extended tokenizer does what it should, and to old texts what the old one did.

Each proof looks at the finished tokenizers through their own libraries and not at how they were made. A proof is a list
of offenders, empty when it holds; `require` stops on the first that is not.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_sat.vocab.characters import has_chinese
from megatron_sat.vocab.form import Form

_SHOWN = 8
"""Offenders that an error lists."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One statement, what it was tried on, and what speaks against it."""

    statement: str
    tried_on: str
    offenders: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.offenders


def require(proofs: Iterable[Proof]) -> None:
    """Raises ValueError with the offenders of every proof that does not hold."""
    failed = [proof for proof in proofs if not proof.holds]
    if failed:
        lists = [f"{proof.statement}: {len(proof.offenders)}, {_some(proof.offenders)}" for proof in failed]
        raise ValueError("the extended tokenizer must pass its proofs, nothing was written; " + "; ".join(lists))


def _some(offenders: Sequence[str]) -> str:
    return ", ".join(offenders[:_SHOWN]) + (", ..." if len(offenders) > _SHOWN else "")


_CONTEXTS = ("{}", "\n{}", "。{}。", "a{}a", "的{}的")
"""Where a piece is looked for. At the start of a text an old piece with a space ("▁第") may come before it."""


def every_piece_is_produced(form: Form, *, pieces: Mapping[int, bytes], halves: set[int]) -> Proof:
    """Each new piece is a token of some text: of its own, or, being a part of a character, of one that begins with it.

    pieces: bytes of each new id. halves: new ids that others are joined from; a part of a character all of whose
    completions are pieces themselves is one of these, and never more.
    """
    offenders = []
    for i, piece in pieces.items():
        if not any(i in form.encode(text) for text in _witnesses(piece)) and not (_is_part(piece) and i in halves):
            offenders.append(f"{i} ({piece.decode(errors='backslashreplace')})")
    parts = sum(_is_part(piece) for piece in pieces.values())
    tried_on = f"{len(pieces):,} pieces" + (f", {parts:,} of them parts of a character" if parts else "")
    return Proof(
        statement=f"{form.name}: every new piece can be produced",
        tried_on=tried_on,
        offenders=offenders,
    )


def _is_part(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return True
    return False


def _witnesses(piece: bytes) -> Iterator[str]:
    """Texts in which the piece may stand."""
    if not _is_part(piece):
        yield from (context.format(piece.decode()) for context in _CONTEXTS)
        return
    for missing in (1, 2):
        for rest in itertools.product(range(0x80, 0xC0), repeat=missing):
            whole = piece + bytes(rest)
            if not _is_part(whole):
                yield from (context.format(whole.decode()) for context in _CONTEXTS[:2])


def texts_come_back(form: Form, *, texts: Sequence[str], missing: Collection[int]) -> Proof:
    """Encoding and decoding is the identity. "▁" itself, which SentencePiece writes for a space, is left out.

    missing: bytes that the old vocabulary cannot spell; texts with them are left out and counted.
    """
    tried = [text for text in texts if "▁" not in text and not (missing and set(missing) & set(text.encode()))]
    left_out = f", {len(texts) - len(tried):,} cannot be spelt by the old one" if missing else ""
    return Proof(
        statement=f"{form.name}: every text comes back exactly",
        tried_on=f"{len(tried):,} texts{left_out}",
        offenders=[repr(text[:40]) for text in tried if form.decode(form.encode(text)) != text],
    )


def forms_agree(first: Form, second: Form, *, texts: Sequence[str]) -> Proof:
    """Both give the same ids."""
    return Proof(
        statement=f"{first.name} and {second.name} give the same ids",
        tried_on=f"{len(texts):,} texts",
        offenders=[repr(text[:40]) for text in texts if first.encode(text) != second.encode(text)],
    )


def others_are_unchanged(old: Form, new: Form, *, texts: Sequence[str]) -> Proof:
    """Lines without Chinese have the ids they had."""
    parts = [part for text in texts for part in dict.fromkeys((text, *text.split("\n")))]
    lines = [part for part in parts if part.isascii() or not has_chinese(part)]
    return Proof(
        statement=f"{new.name}: English, code and every other text are segmented as before",
        tried_on=f"{sum(map(len, lines)):,} characters",
        offenders=[repr(line[:40]) for line in lines if old.encode(line) != new.encode(line)],
    )


def nothing_is_longer(old: Form, new: Form, *, texts: Sequence[str]) -> Proof:
    """No text needs more tokens than before."""
    return Proof(
        statement=f"{new.name}: no text needs more tokens than before",
        tried_on=f"{len(texts):,} texts",
        offenders=[repr(text[:40]) for text in texts if len(new.encode(text)) > len(old.encode(text))],
    )


def old_ids_are_unchanged(old: Mapping[str, int], new: Mapping[str, int], *, add: int) -> Proof:
    """Every old token has its id; the new ones are exactly `add`, numbered on without a gap."""
    offenders = [f"{token!r}: {i} -> {new.get(token)}" for token, i in old.items() if new.get(token) != i]
    added = sorted(i for token, i in new.items() if token not in old)
    first = max(old.values()) + 1
    if added != list(range(first, first + add)):
        offenders.append(f"new ids are not {first} to {first + add - 1}, {len(added)} were added")
    return Proof(
        statement=f"old ids are unchanged and exactly {add:,} are new",
        tried_on=f"{len(old):,} tokens",
        offenders=offenders,
    )


_RARE = tuple(map(chr, (0xE000, 0x1F9FF, 0x13000, 0x1B170, 0x10FFFD)))
"""Characters that no vocabulary has a piece for: private use, hieroglyphs, an emoji of few."""


def bytes_are_intact(form: Form, *, byte_ids: Sequence[int], unknown: int, texts: Sequence[str]) -> Proof:
    """What has no piece is spelt in the old tokens of its bytes, and nothing becomes the unknown token.

    byte_ids: of each of the 256 bytes.
    """
    offenders = []
    for character in _RARE:
        spelling = [byte_ids[byte] for byte in character.encode()]
        if form.encode(f"\n{character}")[-len(spelling) :] != spelling:
            offenders.append(repr(character))
    offenders += [repr(text[:40]) for text in texts if unknown in form.encode(text)]
    return Proof(
        statement=f"{form.name}: bytes spell what has no piece",
        tried_on=f"{len(_RARE)} characters, {len(texts):,} texts",
        offenders=offenders,
    )


def ranks_are_consistent(ranks: Mapping[str, float], *, old_last: float, joined: Sequence[tuple[str, str]]) -> Proof:
    """New pieces rank behind all old ones, no two alike, each behind the halves it is joined from.

    ranks: of each new piece, lower first. joined: the halves of those that have any, in the order of `ranks`.
    """
    order = list(ranks.values())
    offenders = [f"{piece!r} ranks {rank}" for piece, rank in ranks.items() if rank <= old_last]
    offenders += [f"rank {second} after {first}" for first, second in itertools.pairwise(order) if second <= first]
    for left, right in joined:
        whole = ranks.get(left + right)
        late = [h for h in (left, right) if h in ranks and (whole is None or ranks[h] >= whole)]
        offenders += [f"{left + right!r} before its half {half!r}" for half in late]
    return Proof(
        statement="new ranks come after all old ones and after their halves",
        tried_on=f"{len(ranks):,} pieces",
        offenders=offenders,
    )


@dataclass(frozen=True, kw_only=True)
class Fertility:
    """How many tokens a character needs."""

    domain: str
    characters: int
    before: float
    """Tokens a character with the old tokenizer."""
    after: float


def fertilities(old: Form, new: Form, *, domains: Mapping[str, Sequence[str]]) -> list[Fertility]:
    """Tokens a character before and after, for each domain that has text."""
    found = []
    for domain, texts in domains.items():
        characters = sum(map(len, texts))
        if characters:
            before, after = (sum(len(form.encode(text)) for text in texts) / characters for form in (old, new))
            found.append(Fertility(domain=domain, characters=characters, before=before, after=after))
    return found
