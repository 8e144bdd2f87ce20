"""Candidates from text and from ready models."""

import io
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from megatron_sat.vocab.candidates import read_candidates, train_candidates
from megatron_sat.vocab.characters import is_fit

TEXTS = ["中国人民，abc中国 人民中国x", "中国的人民 1年", "鼹"]


def train(tmp_path: Path, texts: list[str], **options: object) -> Path:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2} | options
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    path = tmp_path / "ready.model"
    path.write_bytes(model.getvalue())
    return path


def test_characters_come_first_by_how_common_they_are_then_pieces_by_rank() -> None:
    found = train_candidates(lambda: TEXTS, add=12, known={"的", "人民"}, coverage=1.0)
    assert found[:4] == ["中", "国", "人", "民"]
    assert set(found[4:7]) == {"年", "，", "鼹"}
    assert found[7] == "中国"
    assert "人民" not in found and "的" not in found


def test_rare_characters_are_in_no_candidate() -> None:
    found = train_candidates(lambda: TEXTS, add=12, known=(), coverage=0.8)
    assert "中国" in found
    assert not [piece for piece in found if "鼹" in piece]


def test_every_candidate_is_fit_and_there_are_enough(chinese: list[str]) -> None:
    found = train_candidates(lambda: chinese, add=4000, known={"中", "中国", "国"}, coverage=0.99)
    assert len(found) == len(set(found)) >= 4000
    assert all(is_fit(piece) for piece in found)


@pytest.mark.parametrize("coverage", [0.0, 1.1])
def test_a_coverage_that_is_no_share_is_refused(coverage: float) -> None:
    with pytest.raises(ValueError, match="--character-coverage must be in \\(0, 1\\], got .*; try 0.9995"):
        train_candidates(lambda: TEXTS, add=1, known=(), coverage=coverage)


def test_text_without_chinese_is_refused() -> None:
    with pytest.raises(ValueError, match="--text must have Chinese characters, got none"):
        train_candidates(lambda: ["English alone"], add=1, known=(), coverage=1.0)


def test_more_characters_than_additions_are_refused() -> None:
    with pytest.raises(ValueError, match="--add \\(3\\) must have room for the 8 characters that cover 100.00%"):
        train_candidates(lambda: TEXTS, add=3, known=(), coverage=1.0)


def test_text_of_single_characters_has_no_pieces() -> None:
    assert train_candidates(lambda: ["中 国"], add=5, known=(), coverage=1.0) == ["中", "国"]


def test_a_ready_model_gives_its_fit_pieces_without_the_space(tmp_path: Path) -> None:
    path = train(tmp_path, ["中国 人民 中国 人民 of the 2中"] * 3)
    found = read_candidates(path)
    assert {"中国", "人民"} <= set(found)
    assert all(is_fit(piece) for piece in found)
    lengths = [len(piece) > 1 for piece in found]
    assert lengths == sorted(lengths)


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path, ["中国人民 中国的人民"] * 20, model_type="unigram", vocab_size=12)
    with pytest.raises(
        ValueError, match="must be of model_type BPE, whose ranks can be continued, .* is UNIGRAM; train it"
    ):
        read_candidates(path)


@pytest.mark.parametrize("name", ["missing.model", "broken.model"])
def test_what_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(ValueError, match="--sentencepiece-model must be a SentencePiece model"):
        read_candidates(tmp_path / name)
