"""Trainer with DDP and with DeepSpeed's ZeRO on two replicas, against its loop written out for all their texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS, RUN_WEIGHTS
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.hf.models import chosen, ladder, make_model, make_sparse
from tests.hf.training import Batches, as_a_rank, logged, make_arguments, make_texts, train, written_out

STEPS, MICRO_BATCHES = 4, 2
SCHEDULE = ladder("1/2", steps=STEPS, start=2, rungs=1)
Batch = dict[str, Tensor]


def replica(
    rank: int,
    folder: Path,
    stage: int | None,
    *,
    saved: Path | None = None,
    knows_gloo: bool = True,
    **selection: Any,
) -> tuple[list[float], Any, list[Batch]]:
    """Losses, choices, and the micro-batches this rank was given. stage: ZeRO's, None: DDP.

    saved: where the model is read from, after DeepSpeed is known, so that stage 3 never has it whole.
    """
    as_a_rank(knows_gloo=knows_gloo)
    changes: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 2}
    if stage is not None:
        changes |= {"deepspeed": settings_of_zero(stage), "use_cpu": False}
    known = make_arguments(folder, **changes)
    batches = Batches()
    model = make_model("qwen2") if saved is None else Qwen2ForCausalLM.from_pretrained(saved)
    assert hasattr(model.lm_head.weight, "ds_shape") is (saved is not None)
    sparse = make_sparse(model, SCHEDULE, **selection)
    trainer, choices = train(
        model, sparse, folder, pack=stage is None, texts=make_texts(32), collator=batches, **changes
    )
    trainer.save_model(str(folder))
    assert known.deepspeed is None or trainer.model_wrapped.zero_optimization_stage() == stage
    assert hasattr(model.lm_head.weight, "ds_shape") is (stage == 3)
    return logged(trainer, "loss"), choices, batches.given[: STEPS * MICRO_BATCHES]


def settings_of_zero(stage: int) -> dict[str, Any]:
    """Nothing is kept whole at stage 3, and a whole model can be written."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True} | dict.fromkeys(auto, "auto")


def together(ranks: list[Any], folder: Path, **selection: Any) -> None:
    """The ranks against one process that is given all their texts: losses, choices, and the weights they wrote."""
    assert ranks[0][:2] == ranks[1][:2]
    losses, choices, _ = ranks[0]
    pairs = list(zip(ranks[0][2], ranks[1][2], strict=True))
    assert not any(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)
    merged = [merge(*pair) for pair in pairs]
    model = make_model("qwen2")
    sparse = make_sparse(model, SCHEDULE, **selection)
    seen: list[dict[str, list[int]]] = []
    model.register_forward_hook(lambda *_: seen.append({k: v.tolist() for k, v in chosen(sparse).items()}))
    assert_close(losses, list(written_out(model, merged, sparse)), **RUN_LOSS)
    assert choices == seen[::MICRO_BATCHES]
    assert [len(kept) for kept in choices] == [4, 4, 0, 0]
    written = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(written.state_dict(), model.state_dict(), **RUN_WEIGHTS)


def merge(one: Batch, other: Batch) -> Batch:
    return {name: torch.cat([one[name], other[name]]) for name in one}


def test_two_replicas_under_ddp_are_one_process(tmp_path: Path) -> None:
    together(run_ranks(replica, 2, tmp_path, None), tmp_path)


@needs_deepspeed
def test_processes_that_accelerate_does_not_know_of_are_an_error(tmp_path: Path) -> None:
    load_library()
    with pytest.raises(RuntimeError, match="the Trainer must know of all 2 processes, it knows of 1 and would give"):
        run_ranks(replica, 2, tmp_path, 1, knows_gloo=False)


ZERO = [
    pytest.param(1, {}, id="1", marks=pytest.mark.slow),
    pytest.param(2, {}, id="2"),
    pytest.param(3, {}, id="3"),
    pytest.param(3, {"importance": "contribution", "gqa": "head"}, id="3-contribution"),
    pytest.param(3, {"importance": "uniform"}, id="3-uniform", marks=pytest.mark.slow),
    pytest.param(2, {"statistics": "lagged"}, id="2-lagged"),
]


@needs_deepspeed
@pytest.mark.parametrize(("stage", "selection"), ZERO)
def test_two_replicas_under_zero_are_one_process(stage: int, selection: dict[str, Any], tmp_path: Path) -> None:
    load_library()
    together(run_ranks(replica, 2, tmp_path, stage, **selection), tmp_path, **selection)


@needs_deepspeed
@pytest.mark.parametrize("importance", ["maxip", pytest.param("contribution", marks=pytest.mark.slow)])
def test_a_model_that_is_read_in_shards_is_sparse_too(importance: str, tmp_path: Path) -> None:
    load_library()
    make_model("qwen2").save_pretrained(tmp_path / "saved")
    ranks = run_ranks(replica, 2, tmp_path / "run", 3, saved=tmp_path / "saved", importance=importance)
    together(ranks, tmp_path / "run", importance=importance)
