"""Model chunks: where they begin and end, their type and device, and where each field of `Embedding` goes."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_sat.model.builder import Embedding, build_chunk, build_chunks, embedding_of
from megatron_sat.model.settings import ModelConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import bare, layout, tiny_config

EMBEDDING = Embedding(padded_vocab_size=128, max_sequence_length=32)


def test_settings_say_all_that_lies_outside_the_layers() -> None:
    settings = ModelConfig(
        seq_length=8,
        max_position_embeddings=16,
        padded_vocab_size=1024,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
        rotary_base=5000,
        rotary_percent=0.5,
        rotary_seq_len_interpolation_factor=2,
        use_rope_scaling=True,
        rope_scaling_factor=4.0,
        fp16_lm_cross_entropy=True,
    )
    assert embedding_of(settings, rows=256) == Embedding(
        padded_vocab_size=256,
        max_sequence_length=16,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
        rotary_base=5000,
        rotary_percent=0.5,
        rotary_seq_len_interpolation_factor=2,
        rope_scaling=True,
        rope_scaling_factor=4.0,
        fp16_lm_cross_entropy=True,
    )


def parts(_: int, pp: int, virtual_pp: int | None) -> list[tuple[bool, bool, list[int]]]:
    """Of each chunk of this rank: whether it embeds, whether it has the head, its global layers."""
    layout(pp=pp, virtual_pp=virtual_pp)
    chunks = [bare(chunk) for chunk in build_chunks(tiny_config(), EMBEDDING)]
    return [
        (chunk.pre_process, chunk.post_process, [layer.layer_number for layer in chunk.decoder.layers])
        for chunk in chunks
    ]


@pytest.mark.parametrize(
    "pp, virtual_pp, expected",
    [
        (1, None, [[(True, True, [1, 2, 3, 4])]]),
        (2, None, [[(True, False, [1, 2])], [(False, True, [3, 4])]]),
        (2, 2, [[(True, False, [1]), (False, False, [3])], [(False, False, [2]), (False, True, [4])]]),
    ],
    ids=["one", "two-stages", "interleaved"],
)
def test_each_pipeline_chunk_has_its_layers_and_the_ends_what_is_outside(
    pp: int, virtual_pp: int | None, expected: list[Any]
) -> None:
    assert run_ranks(parts, pp, pp, virtual_pp) == expected


def types(_: int, changes: dict[str, Any]) -> tuple[str, set[torch.dtype]]:
    """The class of the only chunk, and the types of its parameters."""
    layout()
    (chunk,) = build_chunks(tiny_config(**changes), EMBEDDING)
    return type(chunk).__name__, {parameter.dtype for parameter in chunk.parameters()}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ("GPTModel", {torch.float32})),
        ({"bf16": True, "params_dtype": torch.bfloat16}, ("Float16Module", {torch.bfloat16})),
        ({"fp16": True, "params_dtype": torch.float16}, ("Float16Module", {torch.float16})),
    ],
    ids=["fp32", "bf16", "fp16"],
)
def test_half_precision_is_wrapped_and_cast(changes: dict[str, Any], expected: Any) -> None:
    assert run_ranks(types, 1, changes)[0] == expected


def moved(_: int, available: bool) -> int:
    """How many chunks went to the GPU."""
    layout()
    moves: list[nn.Module] = []

    def cuda(self: nn.Module) -> nn.Module:
        moves.append(self)
        return self

    nn.Module.cuda = cuda
    torch.cuda.is_available = lambda: available
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    build_chunks(tiny_config(), EMBEDDING)
    return len(moves)


@pytest.mark.parametrize("available", [False, True])
def test_chunks_go_to_the_gpu_where_there_is_one(available: bool) -> None:
    assert run_ranks(moved, 1, available)[0] == int(available)


def arrived(_: int, changes: dict[str, Any]) -> dict[str, Any]:
    """What a chunk made of its `Embedding`, by field."""
    layout()
    chunk = build_chunk(tiny_config(), replace(EMBEDDING, **changes))
    rotary = getattr(chunk, "rotary_pos_emb", None)
    frequencies = rotary.inv_freq if rotary else torch.zeros(0)
    return {
        "padded_vocab_size": chunk.embedding.word_embeddings.weight.size(0),
        "max_sequence_length": chunk.max_sequence_length,
        "share_embeddings_and_output_weights": chunk.output_layer.weight is None,
        "position_embedding_type": rotary is not None,
        "rotary_percent": frequencies.numel(),
        "rotary_base": [round(f, 6) for f in frequencies.tolist()],
        "rope_scaling": [round(f, 6) for f in frequencies.tolist()],
        "rope_scaling_factor": [round(f, 6) for f in frequencies.tolist()],
        "rotary_seq_len_interpolation_factor": rotary and rotary.seq_len_interpolation_factor,
        "fp16_lm_cross_entropy": chunk.fp16_lm_cross_entropy,
    }


CHANGES: dict[str, Any] = {
    "padded_vocab_size": 256,
    "max_sequence_length": 64,
    "share_embeddings_and_output_weights": True,
    "position_embedding_type": "none",
    "rotary_percent": 0.5,
    "rotary_base": 500000,
    "rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "rotary_seq_len_interpolation_factor": 2.0,
    "fp16_lm_cross_entropy": True,
}


@pytest.mark.parametrize("field", [field.name for field in fields(Embedding)])
def test_every_field_changes_the_model_where_it_should(field: str) -> None:
    others = {"rope_scaling": True, "rotary_base": 500000} if field == "rope_scaling_factor" else {}
    before, after = (run_ranks(arrived, 1, others | changes)[0] for changes in ({}, {field: CHANGES[field]}))
    assert before[field] != after[field]
