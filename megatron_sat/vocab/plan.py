"""Which pieces to add so that each can be produced: byte pair encoding, literally, and the plan made with it.

Byte pair encoding joins the two neighbours of best rank until none are left that may be joined. So a piece can be
produced only where its two halves are, at the moment when its own rank comes up, whole and side by side. A piece that
is merely appended to a vocabulary may therefore never appear. Here each new piece ranks behind everything that was
there before, and is accepted only when the text of the piece alone is cut in exactly two by what is there already:
these are its halves. Where it is cut in more, the pieces in between are added as well. Later additions rank behind and
so never disturb what was accepted.

Pieces are strings of symbols: characters for SentencePiece, GPT-2's stand-ins for bytes for byte-level tokenizers.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

Rank = Callable[[str, str], float | None]
"""(left, right) to how early the two are joined, lower first; None: never."""
Key = str | tuple[str, str]


def segment(symbols: Iterable[str], *, rank: Rank) -> list[str]:
    """Join neighbours until nothing can be joined: best rank first, leftmost first among equals.

    The slow, obvious form of what sentencepiece and tokenizers do with a heap.
    """
    found = list(symbols)
    ranks = [rank(left, right) for left, right in itertools.pairwise(found)]
    while True:
        best = min((r for r in ranks if r is not None), default=None)
        if best is None:
            return found
        at = ranks.index(best)
        found[at : at + 2] = [found[at] + found[at + 1]]
        del ranks[at]
        for i in (at - 1, at):
            if 0 <= i < len(ranks):
                ranks[i] = rank(found[i], found[i + 1])


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One new piece."""

    piece: str
    halves: tuple[str, str] | None
    """What it is joined from; None for a single symbol, which needs no joining."""
    wanted: bool
    """False: not a candidate itself, added because another piece is joined from it."""


@dataclass(kw_only=True)
class Vocabulary:
    """What can be joined now: the old vocabulary, and whatever was added since.

    by_piece: sentencepiece joins any two neighbours that make a piece; tokenizers only the pairs in its list.
    """

    known: Collection[str]
    """The old pieces."""
    ranks: dict[Key, float]
    """Old ranks, of pieces or of pairs; all below `first_rank`."""
    by_piece: bool
    first_rank: float
    additions: list[Addition] = field(default_factory=list)
    _new: set[str] = field(default_factory=set)

    def rank(self, left: str, right: str) -> float | None:
        """How early two neighbours are joined."""
        return self.ranks.get(self.key(left, right))

    def key(self, left: str, right: str) -> Key:
        """What the rank of two neighbours is found by."""
        return left + right if self.by_piece else (left, right)

    def __contains__(self, piece: str) -> bool:
        return piece in self.known or piece in self._new

    def add(self, piece: str, *, halves: tuple[str, str] | None, wanted: bool) -> None:
        """Append a piece behind all others."""
        if halves is not None:
            self.ranks[self.key(*halves)] = self.first_rank + len(self.additions)
        self.additions.append(Addition(piece=piece, halves=halves, wanted=wanted))
        self._new.add(piece)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is added, in order, and what was not."""

    additions: list[Addition]
    dropped: list[str]
    """Candidates that were passed over: for lack of room for the pieces they are joined from."""

    @property
    def between(self) -> list[str]:
        """Pieces that no candidate asked for, added so that another can be joined."""
        return [addition.piece for addition in self.additions if not addition.wanted]


def plan_additions(candidates: Sequence[str], *, add: int, vocabulary: Vocabulary) -> Plan:
    """Accept candidates in order until exactly `add` pieces are new; `vocabulary` grows with them.

    Raises ValueError where the candidates do not suffice.
    """
    dropped = []
    for piece in candidates:
        room = add - len(vocabulary.additions)
        if not room:
            break
        if piece in vocabulary:
            continue
        steps = _steps(piece, vocabulary=vocabulary)
        if steps is None or len(steps) > room:
            dropped.append(piece)
            continue
        for new, halves in steps:
            vocabulary.add(new, halves=halves, wanted=new == piece)
    if len(vocabulary.additions) < add:
        raise ValueError(
            f"--add ({add}) needs as many new pieces, the text or model yields {len(vocabulary.additions)}; give more "
            "text or lower --add"
        )
    return Plan(additions=vocabulary.additions, dropped=dropped)


def _steps(piece: str, *, vocabulary: Vocabulary) -> list[tuple[str, tuple[str, str] | None]] | None:
    """What has to be added for `piece` to be produced, itself last; None where an old piece stands in the way."""
    steps: list[tuple[str, tuple[str, str] | None]] = []
    if vocabulary.by_piece:  # a character is a piece or it is spelt in bytes, which are never joined
        steps += [(character, None) for character in dict.fromkeys(piece) if character not in vocabulary]
        if len(piece) == 1:
            return steps
    planned: dict[Key, float] = {}

    def rank(left: str, right: str) -> float | None:
        return planned.get(vocabulary.key(left, right), vocabulary.rank(left, right))

    parts = segment(piece, rank=rank)
    while len(parts) > 1:
        halves = (parts[0], parts[1])
        joined = "".join(halves)
        if joined in vocabulary:  # listed, but never joined: its id has another meaning, or none
            return None
        steps.append((joined, halves))
        planned[vocabulary.key(*halves)] = math.inf
        parts = segment(parts, rank=rank)  # what ranks last resumes where the others ended
    return steps
