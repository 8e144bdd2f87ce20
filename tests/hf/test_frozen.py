"""Frozen neurons against an update of everything of which the kept entries alone are taken."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.hf.callback import SatCallback
from megatron_sat.hf.model import SparseModel
from tests.helpers.tolerances import EXACT, RUN_LOSS
from tests.hf.models import (
    CHANNELS,
    GROUPS,
    HEAD_DIM,
    HEADS,
    chosen,
    constant,
    ladder,
    loss_and_gradients,
    make_batch,
    make_model,
    make_sparse,
)
from tests.hf.training import Batches, logged, make_trainer, train, written_out

STEPS = 4


def make_optimizer(model: Any, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=kind == "adam foreach")


def omitted_of(name: str, shape: torch.Size, kept: dict[str, Tensor], *, gqa: str) -> Tensor:
    """Bool of a parameter's shape: true where it belongs to omitted units alone. By loops over names and units."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if ".layers." not in name or "norm" in name:
        return mask
    layer, kind = int(name.split(".")[2]) + 1, "attention" if "self_attn" in name else "mlp"
    stay, projection = set(kept[f"{kind}.{layer}"].tolist()), name.split(".")[-2]
    if projection in ("o_proj", "down_proj") and name.endswith("bias"):
        return mask
    per_group = HEADS // GROUPS
    for place in range(HEADS * HEAD_DIM if kind == "attention" else CHANNELS):
        unit = place
        if kind == "attention":
            head = place // HEAD_DIM
            if projection in ("k_proj", "v_proj"):  # here a place lies in a group
                if gqa == "head" or head >= GROUPS:
                    break
                unit = head
            else:
                unit = head if gqa == "head" else head // per_group
        if unit not in stay:
            if projection in ("o_proj", "down_proj"):
                mask[:, place] = True
            else:
                mask[place] = True
    return mask


def everything(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of weights and of what the optimizer remembers of them, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"{name} {key}"] = value.clone()
    return found


def step_of_everything(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the same update would make of all of it; model and optimizer stay as they are."""
    twin = make_model("llama-biases")
    twin.load_state_dict(model.state_dict())
    other = type(optimizer)(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    other.step()
    return everything(twin, other)


@pytest.mark.parametrize("gqa", ["group", "head"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adam foreach"])
def test_an_update_takes_what_is_kept_and_leaves_the_rest(kind: str, gqa: str) -> None:
    model = make_model("llama-biases")
    sparse = make_sparse(model, constant("1/2", steps=STEPS), gqa=gqa)
    optimizer = make_optimizer(model, kind)
    sparse.freeze_omitted(optimizer)
    held = 0
    for step in range(1, STEPS + 1):
        with sparse.step(step):
            loss_and_gradients(model, [make_batch(step)])
            before, moved = everything(model, optimizer), step_of_everything(model, optimizer)
            optimizer.step()
            kept = chosen(sparse)
        for name, after in everything(model, optimizer).items():
            mask = omitted_of(name.split()[0], after.shape, kept, gqa=gqa)
            # what the first step makes of an optimizer's nothing
            expected = torch.where(mask, before.get(name, moved[name]), moved[name])
            assert_close(after, expected, **EXACT, msg=name)
            held += int(mask.sum())
    assert held > 0


def test_without_it_momentum_and_decay_move_what_is_omitted() -> None:
    """The negative control."""
    model = make_model()
    sparse = make_sparse(model)
    optimizer = make_optimizer(model, "adam")
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    for step in (1, 2):
        with sparse.step(step):
            loss_and_gradients(model, [make_batch(step)])
            before: Any = weight.detach().clone()
            optimizer.step()
            mask = omitted_of("model.layers.0.mlp.up_proj.weight", before.shape, chosen(sparse), gqa="group")
    assert (weight != before)[mask].all()


def test_at_rate_0_nothing_is_held() -> None:
    runs = []
    for frozen in (False, True):
        model = make_model()
        optimizer = make_optimizer(model, "adam")
        sparse = make_sparse(model, constant("0"))
        if frozen:
            sparse.freeze_omitted(optimizer)
        with sparse.step(1):
            loss_and_gradients(model, [make_batch()])
            optimizer.step()
        runs.append(everything(model, optimizer))
    assert_close(runs[0], runs[1], **EXACT)


def test_an_update_outside_a_step_is_an_error_until_it_is_let_go() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "adam")
    freezer = make_sparse(model).freeze_omitted(optimizer)
    loss_and_gradients(model, [make_batch()])
    with pytest.raises(ValueError, match="must be made inside its step, none is open; move optimizer.step"):
        optimizer.step()
    freezer.remove()
    optimizer.step()


LORS = ladder("1/2", steps=6, start=4, rungs=1)


def model_and_sparse() -> tuple[Any, SparseModel]:
    model = make_model("qwen2")
    return model, make_sparse(model, LORS)


def test_the_trainer_freezes_as_the_loop_written_out(tmp_path: Path) -> None:
    batches = Batches()
    trainer, _ = train(*model_and_sparse(), tmp_path, omitted_neurons="frozen", collator=batches)
    twin, sparse = model_and_sparse()
    assert_close(logged(trainer, "loss"), list(written_out(twin, batches.given[:12], sparse, frozen=True)), **RUN_LOSS)
    moved, _ = train(*model_and_sparse(), tmp_path)
    assert abs(logged(moved, "loss")[-1] - logged(trainer, "loss")[-1]) > 1e-3
    optimizer: Any = trainer.optimizer
    assert not optimizer.optimizer._optimizer_step_pre_hooks  # let go at the end


def test_another_word_is_an_error() -> None:
    with pytest.raises(ValueError, match="omitted_neurons must be one of optimizer, frozen, got 'still'"):
        SatCallback(model_and_sparse()[1], omitted_neurons="still")


def test_frozen_under_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparse = model_and_sparse()
    trainer = make_trainer(model, tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="omitted_neurons must be optimizer with deepspeed, .* got frozen; use DDP"):
        SatCallback(sparse, pack=False, omitted_neurons="frozen").on_init_end(
            trainer.args, trainer.state, trainer.control
        )
