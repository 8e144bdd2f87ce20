"""What may be extended, and what is refused with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from megatron_sat.vocab.source import parts_of, read_source
from tests.vocab.conftest import SHIPPED

Piece = ModelProto.SentencePiece


def test_a_file_and_a_folder_with_it_are_the_same(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path / "tokenizer.model")
    from_file, from_folder = read_source(SHIPPED), read_source(tmp_path)
    assert from_file.proto == from_folder.proto
    assert (from_file.folder, from_folder.folder) == (None, tmp_path)


def test_special_tokens_of_the_folder_keep_their_ids(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path / "tokenizer.model")
    added = [{"id": 4097, "content": "<b>"}, {"id": 4096, "content": "<pad>"}, {"id": 1, "content": "<s>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    proto = read_source(tmp_path).proto
    assert proto is not None
    assert [(p.piece, p.type) for p in proto.pieces[4096:]] == [("<pad>", Piece.CONTROL), ("<b>", Piece.CONTROL)]


def test_special_tokens_after_a_gap_are_refused(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 5000, "content": "<pad>"}]}))
    with pytest.raises(
        ValueError, match="ids of --tokenizer must be without gaps, .* gives '<pad>' the id 5000 after 4095"
    ):
        read_source(tmp_path)


def test_llama_3s_folder_is_byte_level_though_a_file_of_that_name_lies_there(
    bytelevel_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(bytelevel_folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    source = read_source(tmp_path / "model")
    assert source.proto is None and source.content is not None


def unigram(proto: ModelProto) -> None:
    proto.trainer_spec.model_type = TrainerSpec.UNIGRAM


def without_bytes(proto: ModelProto) -> None:
    proto.trainer_spec.byte_fallback = False


def normalising(proto: ModelProto) -> None:
    proto.normalizer_spec.precompiled_charsmap = b"nfkc"


def stripping(proto: ModelProto) -> None:
    proto.normalizer_spec.remove_extra_whitespaces = True


def unescaped(proto: ModelProto) -> None:
    proto.normalizer_spec.escape_whitespaces = False


def suffixing(proto: ModelProto) -> None:
    proto.trainer_spec.treat_whitespace_as_suffix = True


def user_defined(proto: ModelProto) -> None:
    proto.pieces.add(piece="<tool>", score=0, type=Piece.USER_DEFINED)


REFUSED: list[tuple[Callable[[ModelProto], None], str]] = [
    (unigram, "be of model_type BPE"),
    (without_bytes, "have byte_fallback"),
    (normalising, "have no normalisation"),
    (stripping, "have remove_extra_whitespaces off"),
    (unescaped, "have escape_whitespaces on"),
    (suffixing, "have treat_whitespace_as_suffix off"),
    (user_defined, "have no user-defined or unused pieces"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_a_model_without_the_grounds_of_the_proofs_is_refused(
    change: Callable[[ModelProto], None], said: str, tmp_path: Path
) -> None:
    proto = ModelProto.FromString(SHIPPED.read_bytes())
    change(proto)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=f"--tokenizer must {said}.*extend a model of Llama 2's kind"):
        read_source(tmp_path / "tokenizer.model")


FAST: list[tuple[dict[str, Any], str]] = [
    ({"model": {"type": "Unigram"}}, "hold a BPE model"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "be byte-level, or lie beside its tokenizer.model"),
    ({"model": {"type": "BPE", "dropout": 0.1}}, "have no dropout"),
    ({"model": {"type": "BPE", "continuing_subword_prefix": "##"}}, "have no continuing_subword_prefix"),
    ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "have no end_of_word_suffix"),
]


@pytest.mark.parametrize(("change", "said"), FAST)
def test_a_fast_form_of_another_kind_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    level = {"type": "ByteLevel"}
    content = {"pre_tokenizer": level, "decoder": level, "model": {"type": "BPE"}} | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"--tokenizer must {said}"):
        read_source(tmp_path)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer must be a SentencePiece model or a Hugging Face folder"):
        read_source(tmp_path)


def test_members_of_a_sequence_are_found() -> None:
    inner = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
    assert [part["type"] for part in parts_of({"type": "Sequence", "pretokenizers": [inner]})] == [
        "Digits",
        "ByteLevel",
    ]
    assert parts_of(None) == []
