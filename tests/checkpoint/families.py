"""Tiny random Hugging Face models of every family that can be imported, each in a folder with a real tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from megatron_sat.checkpoint.parity import SAMPLE

VOCAB = 300
"""Not a multiple of anything that a vocabulary is padded to."""
SENTENCEPIECE = Path(__file__).parents[2] / "examples" / "data" / "tokenizer.model"
"""The Mistral's tokenizer: the one family here that comes without a tokenizer.json."""
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE | {"num_key_value_heads": 8}),
    "llama-biased": lambda: LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "llama-3": lambda: LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3),
    "llama-linear": lambda: LlamaConfig(**_SHAPE, rope_parameters=_LINEAR),
    "tinyllama": lambda: LlamaConfig(**_SHAPE),
    "smollm2": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHAPE | {"vocab_size": 4096}, sliding_window=None, head_dim=16),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen2-tied": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCAB` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([SAMPLE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def model_of(config: Any) -> torch.nn.Module:
    """A model with transformers' own random weights."""
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@torch.no_grad()
def write_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Save a model with random weights, norms and biases among them, and its tokenizer. Returns the folder."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) * (0.5 if "embed" in name or "lm_head" in name else 0.1)
        parameter.copy_(1.0 + noise if "norm" in name else noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if family == "mistral":
        shutil.copyfile(SENTENCEPIECE, folder / "tokenizer.model")
    else:
        tokenizer().save_pretrained(folder)
    return folder
