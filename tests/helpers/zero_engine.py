"""A DeepSpeedEngine around the plain tiny GPT, in whatever layout a test asks for; the twin of `plain_engine`."""

import importlib
import importlib.util
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_sat.distributed import Layout, initialize_model_parallel
from megatron_sat.engines.deepspeed import DeepSpeedEngine, library
from megatron_sat.engines.optim import LearningRateConfig, make_optimizer_config
from megatron_sat.engines.zero_settings import Said, merge
from tests.helpers.plain_engine import MICRO_BATCHES, weights
from tests.helpers.plain_gpt import MICRO, make_chunks, make_config

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install 'megatron-sat[deepspeed]'",
)


def load_library() -> None:
    """Import the package before ranks are forked: seconds once, not in each of them."""
    library()
    for late in ("zero.stage3", "superoffload.superoffload_stage3"):
        importlib.import_module(f"deepspeed.runtime.{late}")


def make_zero_engine(
    stage: int,
    *,
    tp: int = 1,
    cp: int = 1,
    tied: bool = False,
    vocab: int = 96,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    rate: dict[str, Any] | None = None,
    file: dict[str, Any] | None = None,
    build: Any = None,
) -> tuple[DeepSpeedEngine, Layout]:
    """The engine on the ranks there are, with the settings of `plain_engine.make_engine`.

    file: what a configuration file of DeepSpeed's says; at stage 3 no parameter is kept whole unless it says so.
    """
    layout = initialize_model_parallel(tp=tp, pp=1, cp=cp, virtual_pp=None, seed=1234)
    config = make_config(**(model or {}))
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    settings: dict[str, Any] = {"lr": 3e-3, "min_lr": 3e-4, "lr_decay_style": "cosine", "weight_decay": 0.1}
    settings |= {"lr_warmup_iters": 2, "lr_warmup_init": 1e-3}
    settings |= {"train_iters": 20, "global_batch_size": MICRO * MICRO_BATCHES}
    learning_rate = LearningRateConfig(**{**settings, **(rate or {})})
    more = {"clip_grad": 1.0, "adam_beta2": 0.95, **(optim or {})}
    optimizer_config = make_optimizer_config(learning_rate, model=config, ddp=ddp, **more)
    said = Said(
        zero_stage=stage,
        micro_batch_size=MICRO,
        global_batch_size=MICRO * MICRO_BATCHES,
        num_micro_batches=MICRO_BATCHES // layout.dp_size,
        clip_grad=more["clip_grad"],
        bf16=config.bf16,
        fp32_gradients=True,
    )
    nothing_kept = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    engine = DeepSpeedEngine(
        build(config) if build else make_chunks(config, tied=tied, vocab=vocab),
        layout=layout,
        optimizer_config=optimizer_config,
        learning_rate=learning_rate,
        settings=merge(nothing_kept if file is None else file, said=said),
        micro_batch_size=MICRO,
    )
    return engine, layout


def zero_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Copies of this rank's parameters by name and chunk, whole at stage 3 too."""
    with engine.whole():
        return weights(engine)  # type: ignore[arg-type]
