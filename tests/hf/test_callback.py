"""Trainer with the callback against its loop written out; resuming; what is refused."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from megatron_sat.hf import state as saved_state
from megatron_sat.hf.callback import SatCallback
from megatron_sat.hf.model import SparseModel
from tests.helpers.tolerances import EXACT, RUN_LOSS
from tests.hf.models import constant, ladder, make_model, make_sparse
from tests.hf.training import Batches, logged, make_texts, make_trainer, summed_loss, train, written_out

LORS = ladder("1/2", steps=6, start=2, rungs=2)


def model_and_sparse(schedule: Any = LORS, **selection: Any) -> tuple[PreTrainedModel, SparseModel]:
    model = make_model("qwen2")
    return model, make_sparse(model, schedule, **selection)


@pytest.mark.parametrize("pack", [False, True], ids=["gathered", "packed"])
def test_a_run_of_the_trainer_is_the_loop_written_out(pack: bool, tmp_path: Path) -> None:
    batches = Batches()
    trainer, choices = train(*model_and_sparse(), tmp_path, pack=pack, collator=batches)
    twin, sparse = model_and_sparse()
    losses = list(written_out(twin, batches.given[:12], sparse))
    assert_close(logged(trainer, "loss"), losses, **RUN_LOSS)
    assert [bool(kept) for kept in choices] == [True, True, True, False, False, False]


def test_the_dense_loop_is_another_run(tmp_path: Path) -> None:
    """The negative control."""
    batches = Batches()
    trainer, _ = train(*model_and_sparse(), tmp_path, collator=batches)
    dense = list(written_out(make_model("qwen2"), batches.given[:12], None))
    assert all(abs(one - other) > 1e-3 for one, other in zip(logged(trainer, "loss"), dense, strict=True))


def test_rate_0_is_the_trainer_without_the_callback(tmp_path: Path) -> None:
    trainer, _ = train(*model_and_sparse(constant("0", steps=6)), tmp_path)
    plain = make_trainer(make_model("qwen2"), tmp_path)
    plain.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert_close(trainer.model.state_dict(), plain.model.state_dict(), **EXACT)


def test_recomputation_by_the_trainers_own_flag_changes_no_bit(tmp_path: Path) -> None:
    runs = []
    for flag in ({}, {"gradient_checkpointing": True}):
        trainer, _ = train(*model_and_sparse(), tmp_path, **flag)
        runs.append(logged(trainer, "loss"))
    assert runs[0] == runs[1]


def test_in_bf16_packed_weights_are_gathered_ones_to_the_bit(tmp_path: Path) -> None:
    """Autocast: weights stay fp32, products are bf16. Against fp32 the losses differ by its eight bits."""

    def losses(**how: Any) -> list[float]:
        trainer, _ = train(*model_and_sparse(constant("1/2", steps=2)), tmp_path, max_steps=2, **how)
        return logged(trainer, "loss")

    packed, gathered, exact = losses(pack=True, bf16=True), losses(pack=False, bf16=True), losses(bf16=False)
    assert packed == gathered != exact
    assert packed[0] == pytest.approx(exact[0], rel=0.05)


def test_an_epochs_last_step_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    """Ten texts are five micro-batches: two steps of two and one of one, in each of two epochs."""
    runs = []
    for pack in (False, True):
        trainer, _ = train(*model_and_sparse(), tmp_path, pack=pack, texts=make_texts(10))
        runs.append(logged(trainer, "loss"))
    assert len(runs[0]) == 6
    assert_close(runs[0], runs[1], **RUN_LOSS)


def test_evaluation_between_steps_is_dense_and_changes_nothing(tmp_path: Path) -> None:
    held_out = make_texts(4, seed=9)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer, choices = train(*model_and_sparse(), tmp_path, evaluated=held_out, **settings)
    alone, same = train(*model_and_sparse(), tmp_path)
    assert choices == same
    assert logged(trainer, "loss") == logged(alone, "loss")
    plain: Any = make_model("qwen2").eval()
    plain.load_state_dict(trainer.model.state_dict())
    batch = Batches()(held_out)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    found = summed_loss(plain, batch).item() / tokens
    assert_close(logged(trainer, "eval_loss")[-1], found, **RUN_LOSS)


def test_the_log_says_the_rate_and_what_it_came_to(tmp_path: Path) -> None:
    trainer, _ = train(*model_and_sparse(), tmp_path)
    assert logged(trainer, "sat_omission_rate") == [0.5, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert logged(trainer, "sat_omitted_attention") == [0.5, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert logged(trainer, "sat_omitted_mlp") == [0.5, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert "sat_omission_rate" not in trainer.state.log_history[-1]  # the summary, which has no step's loss


class Logger(TrainerCallback):
    """What a callback that writes elsewhere is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_a_logger_behind_the_callback_is_given_the_rate(tmp_path: Path) -> None:
    """One before it is not: docs/hf.md says how to put it first."""
    model, sparse = model_and_sparse()
    before, behind = Logger(), Logger()
    trainer = make_trainer(model, tmp_path, before, SatCallback(sparse), behind)
    trainer.train()
    assert [line["sat_omission_rate"] for line in behind.seen if "loss" in line] == [0.5, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert not any("sat_omission_rate" in line for line in before.seen)


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param({}, id="fresh"),
        pytest.param({"selection_interval": 4}, id="interval", marks=pytest.mark.slow),
        pytest.param({"statistics": "lagged"}, id="lagged", marks=pytest.mark.slow),
        pytest.param({"statistics": "lagged", "importance": "contribution", "selection_interval": 2}, id="both"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(selection: dict[str, Any], tmp_path: Path) -> None:
    schedule = ladder("1/2", steps=6, start=5, rungs=1)
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole, choices = train(*model_and_sparse(schedule, **selection), tmp_path / "whole", **settings)
    model, sparse = model_and_sparse(schedule, **selection)
    again, late = train(
        model, sparse, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"), **settings
    )
    assert late == choices[2:]
    assert_close(again.model.state_dict(), whole.model.state_dict(), **EXACT)


def test_a_checkpoint_without_its_choices_would_go_on_otherwise(tmp_path: Path) -> None:
    """The negative control: choices do outlive a step there."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    selection = {"selection_interval": 4}
    _, choices = train(*model_and_sparse(constant("1/2", steps=6), **selection), tmp_path, **settings)
    checkpoint = tmp_path / "checkpoint-2"
    edit_state(checkpoint, lambda saved: saved.update(blocks=[]))
    model, sparse = model_and_sparse(constant("1/2", steps=6), **selection)
    _, late = train(model, sparse, tmp_path / "again", resume=str(checkpoint), **settings)
    assert late != choices[2:]


def edit_state(checkpoint: Path, edit: Any) -> None:
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    edit(state["stateful_callbacks"]["SatCallback"]["attributes"])
    file.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("schedule", "selection", "said"),
    [
        (constant("1/4", steps=6), {}, r"the rungs of a resumed run must be those of its .* got \[\[1, 6, '1/4'"),
        (constant("1/2", steps=6), {"seed": 5}, "the selection of a resumed run must .* {'seed': 5} instead of {'s"),
    ],
)
def test_another_setting_on_resume_is_an_error(
    schedule: Any, selection: dict[str, Any], said: str, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(*model_and_sparse(constant("1/2", steps=6)), tmp_path, **settings)
    with pytest.raises(ValueError, match=said):
        train(*model_and_sparse(schedule, **selection), tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)


def test_settings_are_what_a_checkpoint_gives_back() -> None:
    """Else a run could not be resumed under its own: a field may hold what JSON has not."""
    _, sparse = model_and_sparse()
    sparse.selection = dataclasses.make_dataclass("Wider", ["names", "rate"])(names=("a", "b"), rate=Fraction(1, 3))
    found = saved_state.settings(sparse)
    assert json.loads(json.dumps(found)) == found
    assert found["selection"] == {"names": ["a", "b"], "rate": "1/3"}


def test_a_checkpoint_is_a_plain_transformers_model(tmp_path: Path) -> None:
    trainer, _ = train(*model_and_sparse(), tmp_path, save_strategy="steps", save_steps=3)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert_close(opened.state_dict(), trainer.model.state_dict(), **EXACT)
    assert list(opened.state_dict()) == list(make_model("qwen2").state_dict())


def test_a_run_that_stops_in_the_middle_of_a_step_leaves_the_model_dense(tmp_path: Path) -> None:
    model, sparse = model_and_sparse()
    failing = Batches()
    trainer = make_trainer(model, tmp_path, SatCallback(sparse), collator=failing)
    handle = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("out of memory")))
    with pytest.raises(KeyError, match="out of memory"):
        trainer.train()
    assert sparse.is_open
    handle.remove()
    trainer.train()  # as auto_find_batch_size would
    assert not sparse.is_open
    fresh, _ = train(*model_and_sparse(), tmp_path)
    assert logged(trainer, "loss")[-6:] == logged(fresh, "loss")


# -- what is refused


def test_a_schedule_of_another_length_is_an_error(tmp_path: Path) -> None:
    model, sparse = model_and_sparse(constant("1/2", steps=7))
    with pytest.raises(ValueError, match="last step .train_iters. must be the Trainer's last, 6, got 7; build"):
        train(model, sparse, tmp_path)


def test_a_layer_replaced_after_sparsify_is_an_error(tmp_path: Path) -> None:
    model: Any
    model, sparse = model_and_sparse()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    with pytest.raises(ValueError, match="the model must keep the layers that sparsify found, some were replaced"):
        train(model, sparse, tmp_path)


@pytest.mark.parametrize("when", ["given", "added"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_n_gpu": 2}, "sparse training needs a process for each GPU, this one has 2, .* torchrun --nproc-per-node 2"),
        ({"torch_compile": True}, "torch_compile must be off for sparse training"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_callback_states_from_checkpoint must be off"),
        ({"parallelism_config": object()}, "sparse training needs every layer's weights whole in its forward"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_would_not_obey_is_refused_before_the_first_step(
    change: dict[str, Any], said: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sparse = model_and_sparse()
    trainer = make_trainer(model, tmp_path)
    name, value = next(iter(change.items()))
    if name == "torch_compile":
        monkeypatch.setattr(AcceleratorState().dynamo_plugin, "backend", "INDUCTOR")
    else:
        monkeypatch.setattr(trainer.args, name, value)
    callback = SatCallback(sparse)
    moment = callback.on_init_end if when == "given" else callback.on_train_begin
    with pytest.raises(ValueError, match=said):
        moment(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("kind", ["FSDP", "XLA", "MEGATRON_LM"])
def test_engines_that_cut_weights_otherwise_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sparse = model_and_sparse()
    trainer = make_trainer(model, tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"weights whole in its forward, {kind} .* use DDP .torchrun. or deepspeed"):
        SatCallback(sparse).on_init_end(trainer.args, trainer.state, trainer.control)


def test_packing_under_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparse = model_and_sparse()
    trainer = make_trainer(model, tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="pack must be False with deepspeed"):
        SatCallback(sparse).on_init_end(trainer.args, trainer.state, trainer.control)
    SatCallback(sparse, pack=False).on_init_end(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("selection", [{"selection_interval": 2}, {"statistics": "lagged"}])
def test_local_choices_that_outlive_a_step_are_refused_among_replicas(
    selection: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sparse = model_and_sparse(dp_selection="local", **selection)
    trainer = make_trainer(model, tmp_path)
    trainer.state.max_steps = 6
    callback = SatCallback(sparse)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="--sat-dp-selection must be shared where choices or sums outlive a step"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
