"""The door to transformers' models: a configuration with its defaults, a model to compare with, a GGUF file opened.

Local files only, safetensors only, no code of the model's own: nothing that is loaded here can run anything.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils import _device
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megatron_sat.checkpoint.hf_files import write_tensors
from megatron_sat.checkpoint.hf_names import TIED_HEAD

CONFIG = "config.json"
_SHARD_BYTES = 5 * 10**9
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder, every default filled in. Raises ValueError where it cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"a Hugging Face model must be a local folder with {CONFIG}, {folder} has none; fetch the model first "
            "(no hub is asked)"
        )
    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(str(folder.resolve()), **_LOCAL).to_dict()
    except Exception as error:
        raise ValueError(f"{path} must be a model that transformers knows, it cannot be read: {error}") from error
    found.pop("_name_or_path", None)  # where it lay, not what it is
    return found


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model of a folder, in evaluation mode. Raises ValueError where its weights cannot be read."""
    _prepare()
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder.resolve()), dtype=dtype, use_safetensors=True, attn_implementation="sdpa", **_LOCAL
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} must hold a model in safetensors, it cannot be loaded: {error}") from error
    return model.to(device).eval()


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantized to fp32, and its tokenizer into ``folder`` as safetensors.

    The whole model is in memory meanwhile. Raises ValueError where transformers cannot read the file.
    """
    _prepare()
    where = {"gguf_file": file.name, **_LOCAL}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent.resolve()), dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent.resolve()), **where)
    except Exception as error:
        raise ValueError(
            f"{file} must be a GGUF file that transformers reads (pip install gguf accelerate): {error}"
        ) from error
    weights = model.state_dict()  # save_pretrained refuses what was quantized once
    if model.config.tie_word_embeddings:
        weights.pop(TIED_HEAD, None)
    tensors = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
    write_tensors(folder, tensors, read=weights.__getitem__, max_shard_bytes=_SHARD_BYTES)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    write_config(folder, config=config)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_config(folder: Path, *, config: dict[str, Any]) -> None:
    """Write config.json."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _prepare() -> None:
    """Quiet transformers; let ``with torch.device(...)``, in which it builds models, see through `megatron_sat.cpu`.

    torch recognises factories (torch.arange, ...) by identity, in a set that it makes at first use. Made after
    `cpu.install`, it knows our stand-ins and not what they call; transformers then loads a model whose rotary
    frequencies are uninitialised memory, without a word. May go when `cpu` has the set made before it replaces
    anything.
    """
    disable_progress_bar()  # log.py has one
    known = _device._device_constructors()
    known.update(getattr(factory, "__wrapped__", factory) for factory in tuple(known))
