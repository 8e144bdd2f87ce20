"""LoRA and (IA)³, the parameter-efficient baselines of supervised fine-tuning: the door to peft.

Both are attached to all seven linear layers of a Llama-like transformers model, as the paper's baselines are. What each
computes, and what its test writes out again:

- LoRA (Hu et al., 2022): W x + (α/r) B A dropout(x), A [r, in] random, B [out, r] zero at the start.
- (IA)³ (Liu et al., 2022): l ⊙ (W x), l [out] ones at the start; in the MLP's last layer W (l ⊙ x), as its authors
  scale what lies between the two layers of an MLP.

Everything else is frozen. `merged` gives back a plain model with the change in its weights.
"""

import importlib
from types import ModuleType
from typing import Any

from torch.nn import Module

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a layer."""
SCALED_BEFORE = ("down_proj",)
"""Those whose input (IA)³ scales, and not the output."""
LORA_ALPHA = 16
"""α; what is added is multiplied by α / r."""
LORA_DROPOUT = 0.1
"""Hu et al., where their repository fine-tunes GPT-2 (``examples/NLG``)."""
LORA_RANKS = (8, 16, 32, 64)
"""r, as the paper tried them."""
LORA_LEARNING_RATE = 2e-4
"""Hu et al., as above."""
IA3_LEARNING_RATE = 3e-3
"""Liu et al., ``configs/ia3.json`` of their repository T-Few."""


def library() -> ModuleType:
    """The package. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"LoRA and (IA)3 need the package peft, which cannot be imported ({error}); "
            "pip install 'megatron-sat[hf]', or train with another method"
        ) from error


def with_lora(model: Module, *, rank: int, alpha: int = LORA_ALPHA, dropout: float = LORA_DROPOUT) -> Any:
    """The model with LoRA of ``rank`` on all seven linear layers; only A and B of each can be trained.

    The model itself is changed and wrapped. Raises ValueError for a rank below 1, and where it has no such layers.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, got {rank}; the paper tries 8 to 64")
    peft = library()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_present(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def with_ia3(model: Module) -> Any:
    """The model with (IA)³ on all seven linear layers; only the vectors can be trained.

    The model itself is changed and wrapped. Raises ValueError where it has no such layers.
    """
    peft = library()
    config = peft.IA3Config(
        target_modules=_present(model), feedforward_modules=list(SCALED_BEFORE), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def merged(model: Any) -> Module:
    """A plain model again, with what was learned in its weights: it computes the same, and needs no peft."""
    plain: Module = model.merge_and_unload()
    return plain


def _present(model: Module) -> list[str]:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in LINEAR if name not in names]
    if missing:
        raise ValueError(
            f"a model for LoRA or (IA)3 must have the linear layers {', '.join(LINEAR)}, it has no "
            f"{', '.join(missing)}; give a Llama, Mistral or Qwen model"
        )
    return list(LINEAR)
