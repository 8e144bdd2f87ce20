"""What a model is besides its layers."""

import pytest

from megatron_sat.model.settings import ModelConfig, padded_vocab_size


@pytest.mark.parametrize(
    ("vocab", "divisible_by", "tp", "rows"),
    [
        (256, 128, 1, 256),
        (257, 128, 1, 384),
        (257, 128, 2, 512),
        (32000, 128, 8, 32768),
        (7, 1, 2, 8),
        (1, 1, 1, 1),
    ],
)
def test_the_vocabulary_is_padded_to_the_least_multiple(vocab, divisible_by, tp, rows):
    assert padded_vocab_size(vocab, divisible_by=divisible_by, tp=tp) == rows


def model(**more):
    return ModelConfig(**{"seq_length": 8, "max_position_embeddings": 8, **more})


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 384),
        ({"pad_vocab_size": False}, 300),
        ({"make_vocab_size_divisible_by": 10}, 300),
        ({"vocab_size": 500}, 512),
        ({"padded_vocab_size": 310}, 310),
    ],
)
def test_an_embedding_has_room_for_the_tokenizer(settings, rows):
    assert model(**settings).rows(299, tp=2) in (rows, rows + 128)
    assert model(**settings).rows(299, tp=2) >= 299


def test_padding_counts_the_ranks():
    assert [model().rows(299, tp=tp) for tp in (1, 2, 4)] == [384, 512, 512]


@pytest.mark.parametrize("name", ["vocab_size", "padded_vocab_size"])
def test_an_embedding_smaller_than_the_tokenizer_is_refused(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(
        ValueError, match=f"^{flag} must be at least the tokenizer's 300, got 299; leave it out$"
    ):
        model(**{name: 299}).rows(300, tp=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seq_length": 0}, "--seq-length must be at least 1, got 0"),
        ({"vocab_size": 0}, "--vocab-size must be at least 1, got 0"),
        ({"rotary_base": 0}, "--rotary-base must be at least 1, got 0"),
        ({"rotary_percent": 1.5}, r"--rotary-percent must be in \(0, 1\], got 1.5; 1 rotates all"),
        ({"rope_scaling_factor": 0.0}, "--rope-scaling-factor must be above 0, got 0.0; Llama 3.1 has 8"),
        (
            {"position_embedding_type": "yarn"},
            "--position-embedding-type must be one of learned_absolute, rope, none",
        ),
        (
            {"vocab_size": 9, "padded_vocab_size": 8},
            r"--padded-vocab-size must be at least --vocab-size \(9\), got 8",
        ),
    ],
)
def test_what_no_model_can_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        model(**settings)
