"""A run stopped and resumed equals the uninterrupted one, in its layout bit for bit, in another nearly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_sat.checkpoint.folder import folder_of
from megatron_sat.checkpoint.resume import Resumed, open_checkpoint
from megatron_sat.distributed import initialize_model_parallel
from tests.checkpoint.runs import (
    BF16,
    DISTRIBUTED,
    FP16,
    INTERLEAVED,
    LATE,
    LOSS,
    NORM,
    go_on,
    header,
    load,
    save,
    to_the_end,
)
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.plain_gpt import make_batches, make_chunks, make_config
from tests.helpers.ranks import run_ranks

SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "bf16": (1, {"model": BF16}),
    "fp16 with its loss scale": (1, {"model": FP16, "optim": {"initial_loss_scale": 2.0**10}}),
    "sgd": (1, {"optim": {"optimizer": "sgd"}}),
    "tp 2": (2, {"tp": 2}),
    "pp 2": (2, {"pp": 2}),
    "pp 2, interleaved": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}),
    "dp 2": (2, {}),
    "dp 2, distributed": (2, {"ddp": DISTRIBUTED}),
    "dp 2, distributed, bf16, overlapped": (2, {"ddp": LATE, "model": BF16}),
    "decoupled rate": (1, {"optim": {"decoupled_lr": 1e-3, "decoupled_min_lr": 1e-4}}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case: str, tmp_path: Path) -> None:
    ranks, settings = SAME[case]
    whole = run_ranks(to_the_end, ranks, settings, tmp_path)
    resumed = run_ranks(go_on, ranks, settings, tmp_path)
    for (steps, state), (later, state_later, _) in zip(whole, resumed, strict=True):
        assert later == steps[2:]
        assert state_later == state


OTHERS: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "tp 2 to 1": (2, {"tp": 2}, 1, {}),
    "tp 2 to 1, distributed": (2, {"tp": 2, "ddp": DISTRIBUTED}, 1, {"ddp": DISTRIBUTED}),
    "tp 1 to 2": (1, {}, 2, {"tp": 2}),
    "pp 2 to tp 2": (2, {"pp": 2}, 2, {"tp": 2}),
    "pp 2 interleaved to pp 2": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}, 2, {"pp": 2}),
    "dp 2 to 1, distributed": (2, {"ddp": DISTRIBUTED}, 1, {"ddp": DISTRIBUTED}),
    "tp 2 dp 2 to pp 2, distributed": (4, {"tp": 2, "ddp": LATE}, 2, {"pp": 2, "ddp": DISTRIBUTED}),
}


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    return run_ranks(to_the_end, 1, {}, None)[0][0]


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_goes_on_in_another_layout(case: str, tmp_path: Path, uninterrupted: list[Any]) -> None:
    ranks, settings, other_ranks, other_settings = OTHERS[case]
    run_ranks(to_the_end, ranks, settings, tmp_path)
    for steps, _, resumed in run_ranks(go_on, other_ranks, other_settings, tmp_path):
        assert max(abs(a[0] - b[0]) for a, b in zip(steps, uninterrupted[2:], strict=True)) < LOSS
        assert max(abs(a[1] - b[1]) for a, b in zip(steps, uninterrupted[2:], strict=True)) < NORM
        assert (resumed.iteration, resumed.consumed_train_samples) == (2, 16)
        assert resumed.extra == {"rung": 2}
        for layer in range(4):
            assert torch.equal(resumed.tensors[f"sat.layers.{layer}.mlp.kept"], torch.arange(layer, 20 + layer))


def test_without_its_moments_a_resumed_run_is_another(tmp_path: Path, uninterrupted: list[Any]) -> None:
    run_ranks(to_the_end, 1, {}, tmp_path)
    steps, _, resumed = run_ranks(go_on, 1, {}, tmp_path, no_load_optim=True)[0]
    assert resumed.iteration == 2
    assert steps[0][0] == uninterrupted[2][0], "the first loss is before the first update"
    assert abs(steps[2][0] - uninterrupted[4][0]) > 1e-4


def test_finetune_takes_weights_alone_and_starts_a_new_run(tmp_path: Path, uninterrupted: list[Any]) -> None:
    run_ranks(to_the_end, 2, {"tp": 2}, tmp_path)
    steps, _, resumed = run_ranks(go_on, 1, {"ddp": DISTRIBUTED}, tmp_path, finetune=True, data={"blend": "other"})[0]
    assert resumed == Resumed(iteration=0, consumed_train_samples=0, extra={}, tensors={})
    assert steps[0][0] == pytest.approx(uninterrupted[2][0], abs=LOSS)


def drawn(rank: int, root: Path, resume_it: bool, flags: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers after a checkpoint, of the uninterrupted process or of one that loaded it."""
    engine, layout = make_engine(tp=2)
    if resume_it:
        load(engine, layout, root, **flags)
    else:
        train(engine, layout, steps=range(1))
        torch.rand(7)
        save(engine, layout, root, iteration=1)
    with get_cuda_rng_tracker().fork():
        mine = torch.rand(3)
    with get_cuda_rng_tracker().fork("data-parallel-rng"):
        shared = torch.rand(3)
    return torch.rand(3), mine, shared


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    first = run_ranks(drawn, 2, tmp_path, False, {})
    again = run_ranks(drawn, 2, tmp_path, True, {})
    fresh = run_ranks(drawn, 2, tmp_path, True, {"no_load_rng": True})
    for one, two, new in zip(first, again, fresh, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0], new[0])
    assert not torch.equal(first[0][1], first[1][1]), "tensor-parallel ranks draw their own"


def plain_load(rank: int, root: Path) -> float:
    """The checkpoint in a plain GPTModel through megatron.core alone; the loss it gives."""
    layout = initialize_model_parallel(tp=2, pp=1, cp=1, virtual_pp=None, seed=0)
    (model,) = make_chunks(make_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": layout.dp_cp_group})}
    loaded = dist_checkpointing.load(state, str(folder_of(root, 2)))
    assert loaded["iteration"] == 2
    model.load_state_dict(loaded["model"])
    batch = next(make_batches(2, total=1))
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses.mean().item()


def our_load(rank: int, root: Path) -> float:
    engine, layout = make_engine()
    load(engine, layout, root)
    batch = next(make_batches(2, total=1))
    args = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return engine.chunks[0](*args, labels=batch["labels"]).mean().item()


def test_plain_megatron_opens_a_checkpoint(saved: Path) -> None:
    assert run_ranks(plain_load, 2, saved)[0] == pytest.approx(run_ranks(our_load, 1, saved)[0], abs=LOSS)


def test_a_checkpoint_tells_its_run_before_it_is_loaded(saved: Path) -> None:
    opened = open_checkpoint(saved)
    assert opened.header == header(2)
    assert opened.shapes["decoder.layers.mlp.linear_fc1.weight"] == (4, 96, 32)
    assert opened.dtypes["sat.layers.0.mlp.kept"] == torch.int64
