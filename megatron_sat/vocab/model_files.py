"""A Hugging Face model's folder with more rows in its embedding and output layer: shard by shard, everything else
copied.

Memory stays near one shard and the new rows. Nothing is unpickled: the weights must be safetensors.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names that all supported families share (Llama, Mistral, Qwen)."""
_INDEX = "model.safetensors.index.json"
COPIED = ("generation_config.json",)
"""Beside weights and config.json; tokenizer files come from write.py."""

Resize = Callable[[Tensor], Tensor]
"""[old rows, h] -> [new rows, h], in the same dtype."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model. Raises ValueError where the folder is no model with safetensors."""
    file = folder / "config.json"
    if not file.is_file() or not _shards(folder):
        raise ValueError(
            f"--model must be a Hugging Face folder with config.json and *.safetensors, {folder} is not; save the "
            "model with save_pretrained first"
        )
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def check_rows(folder: Path, *, tokens: int) -> None:
    """Raises ValueError unless the embedding, and the head that is not tied to it, are there with a row for each
    token."""
    config = read_config(folder)
    found: dict[str, int] = {}
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            names = {EMBEDDING, HEAD} & set(file.keys())
            found |= {name: file.get_slice(name).get_shape()[0] for name in names}
    required = (EMBEDDING,) if config.get("tie_word_embeddings", False) else (EMBEDDING, HEAD)
    for name in required:
        if name not in found:
            raise ValueError(
                f"--model must have the weight {name}, {folder} has not; give a Llama, Mistral or Qwen model for "
                "causal language modelling"
            )
    for name, rows in found.items():
        if rows < tokens:
            raise ValueError(
                f"{name} must have a row for each of the {tokens} tokens, it has {rows}; give the tokenizer that "
                "belongs to the model"
            )


def resize_model(folder: Path, *, target: Path, rows: int, resize: Resize) -> None:
    """Write the model to `target` with `rows` rows in embedding and head, made by `resize`.

    Raises ValueError for a folder that is no model.
    """
    config = read_config(folder)
    total = 0
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            metadata = file.metadata()
        for name in (EMBEDDING, HEAD):
            if name in tensors:
                tensors[name] = resize(tensors[name]).to(tensors[name].dtype).contiguous()
                assert tensors[name].shape[0] == rows
        save_file(tensors, target / shard.name, metadata=metadata or {"format": "pt"})
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = total
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config["vocab_size"] = rows
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)


def grow(old: Tensor, *, added: Tensor, padding: Tensor, first: int, rows: int) -> Tensor:
    """Old rows up to `first`, then the added ones, then padding up to `rows`.

    old: [v, h] (rows from `first` on were padding and are lost). added: [n, h]. padding: [h]. Returns [rows, h].
    """
    filling = padding.expand(rows - first - added.shape[0], -1)
    return torch.cat([old[:first], added.to(old.dtype), filling.to(old.dtype)])
