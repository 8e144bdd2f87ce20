"""A checkpoint's model without a run: built from the settings that were saved with the weights, in any layout.

For the parity gate and whoever else only computes with a model. What trains is built by `build`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat import distributed, faults
from megatron_sat.checkpoint.hf_config import MODEL_KEYS
from megatron_sat.checkpoint.resume import Checkpoint, LoadConfig, load_checkpoint, open_checkpoint
from megatron_sat.config import Config, compose
from megatron_sat.distributed import Layout
from megatron_sat.flags.defaults import look_at_machine
from megatron_sat.model.builder import build_chunks, embedding_of

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WORDS = "embedding.word_embeddings.weight"
"""The key whose first dimension is the padded vocabulary."""
_TIMEOUT_MINUTES = 120


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint's model on this rank, dense, in evaluation mode."""

    chunks: list[torch.nn.Module]
    layout: Layout
    config: Config


def open_model(
    load: Path, *, tp: int = 1, pp: int = 1, dtype: str = "fp32", step: int | None = None, seq_length: int | None = None
) -> Opened:
    """Build the model of a checkpoint in a layout and load its weights; collective.

    The default process group exists; model-parallel groups of before go. dtype: a key of `DTYPES`. step: None: the
    newest. seq_length: of the longest text; None: what the model was made for.
    Raises ValueError for a checkpoint that is missing, damaged, or does not say what model it holds.
    """
    faults.apply_all()
    checkpoint = open_checkpoint(load, step=step)
    settings = model_settings(checkpoint)
    longest = seq_length or settings["max_position_embeddings"]
    config = compose(
        settings | _run_of_one_step(tp=tp, pp=pp, dtype=dtype, seq_length=longest),
        machine=look_at_machine(cuda=torch.cuda.is_available()),
        world_size=dist.get_world_size(),
    )
    parallel_state.destroy_model_parallel()
    layout = distributed.initialize_model_parallel(
        tp=tp, pp=pp, cp=1, virtual_pp=None, seed=1, timeout_minutes=_TIMEOUT_MINUTES
    )
    rows = config.model.padded_vocab_size
    assert rows is not None
    embedding = embedding_of(config.model, rows=rows)
    chunks = [chunk.eval() for chunk in build_chunks(TransformerConfig(**config.transformer), embedding)]
    weights = _Weights(chunks, layout=layout)
    load_checkpoint(
        checkpoint, trainer=weights, layout=layout, tokenizer=None, data={}, config=LoadConfig(finetune=True)
    )
    return Opened(chunks=chunks, layout=layout, config=config)


def model_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's settings by key, from the configuration that was saved with the weights.

    Raises ValueError for a checkpoint of another program, which has none.
    """
    if checkpoint.header is None or not checkpoint.header.config:
        raise ValueError(
            f"a checkpoint must say what model it holds, {checkpoint.folder} does not: it is of another program; "
            "start a run from it with --finetune, save, and take that checkpoint"
        )
    saved = checkpoint.header.config
    settings = {key: saved[key] for key in MODEL_KEYS if saved.get(key) is not None}
    if not settings.get("group_query_attention"):
        settings.pop("num_query_groups", None)
    return settings | {"padded_vocab_size": checkpoint.shapes[_WORDS][0]}


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, unless there is one. Raises ValueError where there are other ranks."""
    launch = distributed.read_launch()
    ranks = dist.get_world_size() if dist.is_initialized() else launch.world_size
    if ranks != 1:
        raise ValueError(
            f"import and export are the work of one process, got {ranks} ranks; start without torchrun, and compare "
            "other layouts with verify"
        )
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.join(launch, backend=backend, timeout_minutes=_TIMEOUT_MINUTES)
    try:
        yield
    finally:
        distributed.leave()


def _run_of_one_step(*, tp: int, pp: int, dtype: str, seq_length: int) -> dict[str, Any]:
    """What `compose` asks of a run besides the model; nothing of it is used."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        **({dtype: True} if dtype != "fp32" else {}),
        "seq_length": seq_length,
        "micro_batch_size": 1,
        "train_iters": 1,
        "lr": 1.0,
        "train_data_path": ["unused"],
        "tokenizer_type": "NullTokenizer",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "gradient_accumulation_fusion": False,
    }


class _Weights:
    """A model where `load_checkpoint` expects an engine: weights and nothing else."""

    def __init__(self, chunks: Sequence[Any], *, layout: Layout) -> None:
        self._chunks, self._layout = chunks, layout

    @property
    def content_metadata(self) -> dict[str, Any]:
        return {"singleton_local_shards": False}

    def sharded_state_dict(
        self, *, is_loading: bool, with_optimizer: bool, content_metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        metadata = {**content_metadata, "dp_cp_group": self._layout.dp_cp_group}
        return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self._chunks)}

    def complaint(self, saved: Mapping[str, Any]) -> str | None:
        return None

    def load_state_dict(self, state: Mapping[str, Any], *, with_optimizer: bool) -> None:
        for number, chunk in enumerate(self._chunks):
            chunk.load_state_dict(state[f"model{number}"])
