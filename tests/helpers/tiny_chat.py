"""A tiny Llama that chats, as a folder of transformers."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data.test_sft_template import CHATML, save_folder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_chat_llama(folder: Path) -> None:
    """Fixed random weights, a tokenizer and its chat template."""
    save_folder(folder, CHATML)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, **SIZES)).save_pretrained(folder)
