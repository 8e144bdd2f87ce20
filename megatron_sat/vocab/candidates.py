"""Candidates for new pieces, best first: trained on text with sentencepiece's BPE trainer, or read from its model.

Characters come first, by how often they occur: each of them saves two or three bytes. Then pieces of several
characters in the order in which byte pair encoding found them.
"""

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from megatron_sat.vocab.characters import chinese_characters, han_runs, is_fit

MAX_LENGTH = 16
"""Characters of the longest piece; sentencepiece's own default."""
_MAX_RUN = 1024
"""Characters of a run that the trainer is handed at once: some poems know no punctuation."""

Documents = Callable[[], Iterable[str]]
"""The texts, from the start each time it is called."""


def train_candidates(documents: Documents, *, add: int, known: Collection[str], coverage: float) -> list[str]:
    """Characters and pieces of the texts that are not in `known`, enough for `add` additions where the text has them.

    coverage: the part of the Chinese text, in (0, 1], whose characters get a piece.
    Raises ValueError for a coverage out of range, and where the characters alone are more than `add`.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"--character-coverage must be in (0, 1], got {coverage}; try 0.9995")
    counts: Counter[str] = Counter()
    for text in documents():
        counts.update(chinese_characters(text))
    if not counts:
        raise ValueError("--text must have Chinese characters, got none in it; check the files and the field")
    covered = _covered(counts, coverage=coverage)
    new = [character for character in covered if character not in known]
    if len(new) > add:
        raise ValueError(
            f"--add ({add}) must have room for the {len(new)} characters that cover {coverage:.2%} of the Chinese text "
            "and are not in the vocabulary yet; raise --add or lower --character-coverage"
        )
    wanted = add - len(new) + sum(len(piece) > 1 and is_fit(piece) for piece in known)
    return new + [piece for piece in _train(documents, covered=set(covered), wanted=wanted) if piece not in known]


def _covered(counts: Counter[str], *, coverage: float) -> list[str]:
    """The commonest characters that make up `coverage` of all."""
    total, seen, covered = counts.total(), 0, []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen >= coverage * total:
            break
        covered.append(character)
        seen += count
    return covered


def _train(documents: Documents, *, covered: set[str], wanted: int) -> list[str]:
    """At most `wanted` pieces of several covered characters, in the order in which the trainer joined them."""

    def runs() -> Iterator[str]:
        for text in documents():
            for run in han_runs(text):
                yield from _cut(run, covered=covered)

    alphabet: set[str] = set()
    for run in runs():
        alphabet.update(run)
    if wanted < 1 or len(alphabet) < 2:
        return []
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=runs(),
        model_writer=model,
        model_type="bpe",
        vocab_size=len(alphabet) + wanted + 2,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=MAX_LENGTH,
        max_sentence_length=4 * _MAX_RUN,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return _pieces_of(ModelProto.FromString(model.getvalue()))[:wanted]


def _cut(run: str, *, covered: set[str]) -> Iterator[str]:
    """A run without the characters that are not covered, in parts of at least two characters."""
    together = "".join(character if character in covered else " " for character in run)
    for part in together.split():
        for start in range(0, len(part), _MAX_RUN):
            if len(piece := part[start : start + _MAX_RUN]) > 1:
                yield piece


def read_candidates(model: str | Path) -> list[str]:
    """The pieces of a ready SentencePiece BPE model that may be added: characters first, then by rank.

    A leading "▁" is taken off. Raises ValueError for another kind of model.
    """
    path = Path(model)
    try:
        proto = ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"--sentencepiece-model must be a SentencePiece model, {path} is not: {error}") from error
    if proto.trainer_spec.model_type != TrainerSpec.BPE or not proto.pieces:
        kind = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
        raise ValueError(
            f"--sentencepiece-model must be of model_type BPE, whose ranks can be continued, {path} is {kind}; train "
            "it with model_type=bpe or leave the flag out"
        )
    pieces = [piece.piece for piece in proto.pieces if piece.type == ModelProto.SentencePiece.NORMAL]
    fit = [bare for bare in dict.fromkeys(piece.removeprefix("▁") for piece in pieces) if is_fit(bare)]
    return sorted(fit, key=lambda piece: len(piece) > 1)  # stable: by rank within each kind


def _pieces_of(proto: ModelProto) -> list[str]:
    return [piece.piece for piece in proto.pieces if len(piece.piece) > 1 and is_fit(piece.piece)]

