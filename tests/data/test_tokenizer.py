"""Tokenizers against the libraries behind them, their fingerprints and their refusals."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sat.data.tokenizer import NO_TOKEN, build_tokenizer, tokenizer_of_folder
from tests.data.conftest import EXCERPT, TEXTS

LINES = [text for text in TEXTS for _ in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer as transformers saves it."""
    return save_folder(tmp_path / "hf")


def save_folder(path: Path, *, lines: list[str] = LINES, **special: str) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    return path


def train_model(path: Path, lines: list[str], **settings: int) -> Path:
    text = path.with_suffix(".txt")
    text.write_text("\n".join(line.replace("\n", " ") for line in lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    return path.with_suffix(".model")


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_text_comes_back_as_it_went_in(tokenizer, text):
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_huggingface_text_comes_back_as_it_went_in(folder, text):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model=str(folder))
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_sentencepiece_ids_are_those_of_the_library(tokenizer):
    library = sentencepiece.SentencePieceProcessor(model_file=str(EXCERPT / "tokenizer.model"))
    assert [tokenizer.tokenize(text) for text in TEXTS] == [library.encode(text) for text in TEXTS]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.eos) == (4096, 1, 2, 2)


def test_huggingface_ids_are_those_of_the_library_where_no_special_token_is_spelled(folder):
    ours = build_tokenizer("HuggingFaceTokenizer", model=str(folder))
    library = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    plain = [text for text in TEXTS if "</s>" not in text]
    assert [ours.tokenize(text) for text in plain] == [
        library.encode(text, add_special_tokens=False) for text in plain
    ]
    assert (ours.vocab_size, ours.eod) == (len(library), library.eos_token_id)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_special_token_spelled_in_a_text_is_no_special_token(kind, folder):
    model = folder if kind == "HuggingFaceTokenizer" else EXCERPT / "tokenizer.model"
    tokenizer = build_tokenizer(kind, model=str(model))
    assert not {tokenizer.eod, tokenizer.bos} & set(tokenizer.tokenize("a </s> b <s> c"))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_special_tokens_leave_nothing_in_the_text(kind, folder):
    model = folder if kind == "HuggingFaceTokenizer" else EXCERPT / "tokenizer.model"
    tokenizer = build_tokenizer(kind, model=str(model))
    ids = tokenizer.tokenize("some text")
    assert tokenizer.detokenize([tokenizer.bos, *ids, tokenizer.eod]) == "some text"


def test_megatrons_three_names_for_sentencepiece_are_one_tokenizer():
    names = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    made = [build_tokenizer(name, model=str(EXCERPT / "tokenizer.model")) for name in names]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 1


def test_sentencepiece_fingerprint_does_not_see_file_names_or_the_trainers_paths(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = train_model(tmp_path / "one", LINES)
    second = train_model(tmp_path / "elsewhere" / "two", LINES)
    assert first.read_bytes() != second.read_bytes()  # the trainer writes its paths into the model
    assert _fingerprint(first) == _fingerprint(second)


@pytest.mark.parametrize(
    "lines, settings",
    [(LINES[3:], {}), (LINES, {"eos_id": 1, "bos_id": 2}), (LINES, {"add_dummy_prefix": False})],
    ids=["pieces", "special ids", "normalisation"],
)
def test_sentencepiece_fingerprint_sees_what_changes_ids(tmp_path, lines, settings):
    assert _fingerprint(train_model(tmp_path / "a", LINES)) != _fingerprint(
        train_model(tmp_path / "b", lines, **settings)
    )


def test_huggingface_fingerprint_does_not_see_place_order_or_padding(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    content = json.loads((moved / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    (moved / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=3))
    assert _fingerprint(folder) == _fingerprint(moved)


def test_huggingface_fingerprint_sees_another_merge_and_another_eos(folder, tmp_path):
    other_merges = save_folder(tmp_path / "merges", lines=LINES[3:])
    other_eos = save_folder(tmp_path / "eos", eos_token="<unk>")
    assert len({_fingerprint(path) for path in (folder, other_merges, other_eos)}) == 3


def test_a_pad_that_is_another_special_token_is_no_pad(tmp_path, tokenizer):
    shared = save_folder(tmp_path / "shared", pad_token="</s>")
    own = save_folder(tmp_path / "own", pad_token="<pad>")
    assert build_tokenizer("HuggingFaceTokenizer", model=str(shared)).pad == NO_TOKEN
    assert build_tokenizer("HuggingFaceTokenizer", model=str(own)).pad not in (NO_TOKEN, 0, 1, 2)
    assert tokenizer.pad == NO_TOKEN


def test_index_caches_of_two_tokenizers_have_two_names(tokenizer, ids):
    assert tokenizer.unique_identifiers != ids.unique_identifiers


def test_null_tokenizer_reads_ids_and_ends_documents_with_the_last_one(ids):
    assert (ids.tokenize("3 1 998"), ids.eod, ids.vocab_size) == ([3, 1, 998], 999, 1000)
    assert ids.detokenize([3, 1, 998, 999]) == "3 1 998"


@pytest.mark.parametrize("text", ["three", "1 1000", "-1", "²"])
def test_null_tokenizer_refuses_what_is_no_id(ids, text):
    with pytest.raises(ValueError, match="text of a NullTokenizer must be ids below 1000"):
        ids.tokenize(text)


def test_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="got LLama2Tokeniser; try Llama2Tokenizer"):
        build_tokenizer("LLama2Tokeniser", model="x")


def test_missing_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="SentencePieceTokenizer needs --tokenizer-model"):
        build_tokenizer("SentencePieceTokenizer")
    with pytest.raises(ValueError, match="must be a local path, .*nowhere does not exist"):
        build_tokenizer("HuggingFaceTokenizer", model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content, reason", [(b"junk" * 20, "is not: "), (b"", "is an empty file")])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content, reason):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"must be a SentencePiece model, .*{reason}"):
        build_tokenizer("Llama2Tokenizer", model=str(tmp_path / "x.model"))


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="must be a Hugging Face tokenizer, .* cannot be read"):
        build_tokenizer("HuggingFaceTokenizer", model=str(tmp_path))
    with pytest.raises(ValueError, match=r"must be a Hugging Face folder, .* is a file; give the folder"):
        build_tokenizer("HuggingFaceTokenizer", model=str(tmp_path / "tokenizer.json"))


def test_a_models_folder_gives_its_fast_tokenizer_or_else_the_sentencepiece_model(folder, tmp_path):
    shutil.copyfile(EXCERPT / "tokenizer.model", tmp_path / "tokenizer.model")
    assert tokenizer_of_folder(tmp_path).kind == "sentencepiece"
    shutil.copyfile(Path(folder) / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(Path(folder) / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    assert tokenizer_of_folder(tmp_path).fingerprint == tokenizer_of_folder(Path(folder)).fingerprint


@pytest.mark.parametrize("broken", [False, True])
def test_a_mistral_folder_is_read_also_where_mistral_common_lacks_packages(folder, broken, monkeypatch):
    """As transformers reads it where mistral-common is not installed."""
    expected = build_tokenizer("HuggingFaceTokenizer", model=str(folder))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    if broken:

        def without_tiktoken(*_, **__):
            raise ModuleNotFoundError("No module named 'tiktoken'")

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_tiktoken)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "mistral_common" or None)
    assert build_tokenizer("HuggingFaceTokenizer", model=str(folder)).fingerprint == expected.fingerprint


def test_another_package_that_is_missing_is_named(folder, monkeypatch):
    def without_jieba(*_, **__):
        raise ModuleNotFoundError("No module named 'jieba'")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_jieba)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="cannot be read: No module named 'jieba'"):
        build_tokenizer("HuggingFaceTokenizer", model=str(folder))


def test_a_folder_with_a_sentencepiece_model_alone_is_refused(tmp_path):
    shutil.copyfile(EXCERPT / "tokenizer.model", tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"holds a SentencePiece model alone; use --tokenizer-type Llama2Tokenizer"):
        build_tokenizer("HuggingFaceTokenizer", model=str(tmp_path))


def test_a_tokenizer_written_in_python_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ValueError, match=r"must hold a tokenizer.json, .* is a ByT5Tokenizer in Python"):
        build_tokenizer("HuggingFaceTokenizer", model=str(tmp_path))


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='must have a token that ends a document, .*name an "eos_token"'):
        build_tokenizer("HuggingFaceTokenizer", model=str(folder))
    with pytest.raises(ValueError, match="must have a token that ends a document, .*eos_id=2"):
        _fingerprint(train_model(tmp_path / "endless", LINES, eos_id=-1))


def test_null_tokenizer_needs_a_vocabulary_size():
    with pytest.raises(ValueError, match="vocab_size of a NullTokenizer must be at least 2, got None"):
        build_tokenizer("NullTokenizer")


def test_a_vocabulary_size_without_effect_is_said():
    with pytest.warns(UserWarning, match="vocab_size .77. has no effect with Llama2Tokenizer"):
        build_tokenizer("Llama2Tokenizer", model=str(EXCERPT / "tokenizer.model"), vocab_size=77)


def _fingerprint(model: Path) -> str:
    kind = "HuggingFaceTokenizer" if model.is_dir() else "SentencePieceTokenizer"
    return build_tokenizer(kind, model=str(model)).fingerprint
