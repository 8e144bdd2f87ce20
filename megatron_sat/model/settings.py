"""What a model is besides its layers: vocabulary, sequence, positions, ties."""

import math
from dataclasses import dataclass

POSITIONS = ("learned_absolute", "rope", "none")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Field names are Megatron-LM's flags."""

    seq_length: int
    """Tokens of a training sample, at least 1."""
    max_position_embeddings: int
    """Longest sequence that positions exist for, at least 1."""
    vocab_size: int | None = None
    """Tokens before padding, at least 1; None: the tokenizer's."""
    padded_vocab_size: int | None = None
    """Rows of the embedding over all TP ranks, no fewer than vocab_size; None: vocab_size, padded."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the TP size, at least 1."""
    pad_vocab_size: bool = True
    """Whether it is padded beyond what the TP size asks for."""
    untie_embeddings_and_output_weights: bool = False
    """An output layer of its own instead of the embedding."""
    position_embedding_type: str = "rope"
    """One of POSITIONS."""
    rotary_base: int = 10000
    """Base of the rotary frequencies, at least 1."""
    rotary_percent: float = 1.0
    """Share of a head's dimensions that is rotated, in (0, 1]."""
    rotary_seq_len_interpolation_factor: int | None = None
    """Positions are divided by it."""
    use_rope_scaling: bool = False
    """Llama-3's scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    """Its factor, above 0."""
    fp16_lm_cross_entropy: bool = False
    """The loss in fp16."""

    def __post_init__(self) -> None:
        sizes = ("seq_length", "max_position_embeddings", "make_vocab_size_divisible_by", "rotary_base")
        optional = ("vocab_size", "padded_vocab_size", "rotary_seq_len_interpolation_factor")
        for name in (*sizes, *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {value}; leave it out or raise it")
        if not 0.0 < self.rotary_percent <= 1.0:
            raise ValueError(f"--rotary-percent must be in (0, 1], got {self.rotary_percent}; 1 rotates all")
        if not self.rope_scaling_factor > 0.0:
            raise ValueError(
                f"--rope-scaling-factor must be above 0, got {self.rope_scaling_factor}; Llama 3.1 has 8"
            )
        if self.position_embedding_type not in POSITIONS:
            raise ValueError(
                f"--position-embedding-type must be one of {', '.join(POSITIONS)}, got "
                f"{self.position_embedding_type}; Llama-like models use rope"
            )
        if self.padded_vocab_size is not None and self.padded_vocab_size < (self.vocab_size or 0):
            raise ValueError(
                f"--padded-vocab-size must be at least --vocab-size ({self.vocab_size}), got "
                f"{self.padded_vocab_size}; leave it out"
            )

    def rows(self, vocab_size: int, *, tp: int) -> int:
        """Rows of the embedding over all TP ranks for a tokenizer of ``vocab_size`` tokens.

        Raises ValueError where the given sizes have no room for all of them.
        """
        smallest = self.padded_vocab_size or self.vocab_size or vocab_size
        if smallest < vocab_size:
            name = "--vocab-size" if self.padded_vocab_size is None else "--padded-vocab-size"
            raise ValueError(
                f"{name} must be at least the tokenizer's {vocab_size}, got {smallest}; leave it out"
            )
        if self.padded_vocab_size is not None:
            return self.padded_vocab_size
        divisible_by = self.make_vocab_size_divisible_by if self.pad_vocab_size else 1
        return padded_vocab_size(smallest, divisible_by=divisible_by, tp=tp)


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tp: int) -> int:
    """The least multiple of ``divisible_by * tp`` that holds ``vocab_size`` tokens, as in Megatron-LM."""
    multiple = divisible_by * tp
    return math.ceil(vocab_size / multiple) * multiple


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
