"""The folder that an extension leaves: tokenizer files, model, report, all of them or none.

Everything is written to a hidden folder beside the output, which takes the output's name when it is complete. What an
interrupted run leaves there is removed by the next.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

from megatron_sat.vocab.extension import Extension
from megatron_sat.vocab.source import Source

_COPIED = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_LOADER = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""Load tokenizer.json as it is. transformers 5 rebuilds it for LlamaTokenizer and others, and then a text that begins
with a space loses one. For some model types (qwen2) it does so whatever this says; job.py checks what is loaded."""
_DROPPED = ("auto_map", "backend", "is_local", "local_files_only", "legacy", "sp_model_kwargs", "add_prefix_space")
"""Settings of the classes that are not used; the fast form says the same."""


@contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """A folder to write to; it becomes `output` when the block ends, and vanishes when the block fails.

    Raises ValueError where `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"--output must not exist yet, {output} does; remove it or name another")
    staging = output.with_name(f".{output.name}.unfinished")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        for file in staging.iterdir():
            _flush(file)
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tokenizer(extension: Extension, *, source: Source, target: Path) -> None:
    """tokenizer.model (SentencePiece), tokenizer.json, tokenizer_config.json, and what lay beside the old ones."""
    for name, content in extension.files.items():
        (target / name).write_bytes(content)
    config = _tokenizer_config(source)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")
    for name in _COPIED:
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copy(source.folder / name, target / name)


def _tokenizer_config(source: Source) -> dict[str, Any]:
    old: dict[str, Any] = {}
    if source.folder is not None and (file := source.folder / "tokenizer_config.json").is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in old.items() if name not in _DROPPED}
    if source.proto is not None:
        kept = special_tokens(source.proto) | {"clean_up_tokenization_spaces": False} | kept
    return kept | _LOADER


def special_tokens(proto: ModelProto) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token of a SentencePiece model, as far as it has them."""
    trainer = proto.trainer_spec
    ids = {
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "unk_token": trainer.unk_id,
        "pad_token": trainer.pad_id,
    }
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}
