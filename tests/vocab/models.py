"""Tiny random Llama models in Hugging Face folders, and such folders loaded by hand."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    folder: Path, *, rows: int, tied: bool = False, shard: str = "5GB", dtype: torch.dtype = torch.float32
) -> Path:
    """Two layers, hidden 32, saved in safetensors of at most `shard` each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load_by_hand(folder: Path) -> LlamaForCausalLM:
    """The model of a folder in fp32, without transformers' own loader."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(folder))).float()
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model.eval()
