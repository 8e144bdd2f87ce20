"""What does not fit a run is refused by name, on every rank, before anything of the run is touched."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_sat.checkpoint.folder import TRACKER, folder_of
from tests.checkpoint.runs import BF16, DATA, DISTRIBUTED, go_on, load, save, to_the_end, untouched
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.ranks import run_ranks


def rates(rank: int, root: Path, changes: dict[str, Any], optim: dict[str, Any]) -> tuple[float, float, float, float]:
    """Rate, decay, and both rates of the schedule's end after loading with another schedule."""
    engine, layout = make_engine(rate=changes, optim=optim)
    load(engine, layout, root)
    group = engine._optimizer.param_groups[0]
    train(engine, layout, steps=range(2, 3))
    return engine.learning_rate, group["weight_decay"], group["max_lr"], engine._scheduler.max_lr


def test_a_changed_schedule_is_refused_unless_a_flag_says_whose_counts(tmp_path: Path) -> None:
    run_ranks(to_the_end, 1, {}, tmp_path)
    new = {"lr": 1e-3, "lr_decay_style": "constant", "weight_decay": 0.2}
    with pytest.raises(
        RuntimeError, match=r"max_lr of the schedule must be the checkpoint's \(0.003\), got 0.001; pass"
    ):
        run_ranks(rates, 1, tmp_path, new, {})
    theirs = run_ranks(rates, 1, tmp_path, {**new, "use_checkpoint_opt_param_scheduler": True}, {})[0]
    assert theirs == run_ranks(rates, 1, tmp_path, {}, {})[0]
    assert theirs[1:] == (0.1, 3e-3, 3e-3)
    ours = run_ranks(rates, 1, tmp_path, {**new, "override_opt_param_scheduler": True}, {})[0]
    assert ours == (1e-3, 0.2, 1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="it has none for .* set --decoupled-lr"):
        run_ranks(rates, 1, tmp_path, {}, {"decoupled_lr": 1e-3, "decoupled_min_lr": 0.0})


def test_a_changed_decoupled_rate_is_refused(tmp_path: Path) -> None:
    run_ranks(to_the_end, 1, {"optim": {"decoupled_lr": 1e-3, "decoupled_min_lr": 0.0}}, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"max_lr of a parameter group must be the checkpoint's \(0.001\), got 0.002"
    ):
        run_ranks(rates, 1, tmp_path, {}, {"decoupled_lr": 2e-3, "decoupled_min_lr": 0.0})


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "width": (
        {"model": {"ffn_hidden_size": 64}},
        {},
        (
            "2 tensors differ:"
            "\n  decoder.layers.mlp.linear_fc1.weight: [4, 128, 32] in the model, [4, 96, 32] in the "
            "checkpoint\n  decoder.layers.mlp.linear_fc2.weight: [4, 32, 64] in the model, [4, 32, 48] in"
        ),
    ),
    "layers": (
        {"model": {"num_layers": 2}},
        {},
        "[2, 32] in the model, [4, 32] in the checkpoint\n  and 1 more",
    ),
    "biases": (
        {"model": {"add_qkv_bias": True}},
        {},
        "linear_qkv.bias: [4, 64] in the model, absent from the checkpoint",
    ),
    "tied": ({"tied": True}, {}, "output_layer.weight: [96, 32] in the checkpoint, absent from the model"),
    "vocabulary without a known tokenizer": (
        {"vocab": 128},
        {"tokenizer": None, "finetune": True},
        "embedding.word_embeddings.weight: [128, 32] in the model, [96, 32] in the checkpoint",
    ),
    "tokenizer": (
        {},
        {"tokenizer": "xyz"},
        "the tokenizer must be the checkpoint's (fingerprint abc), got xyz",
    ),
    "tokenizer of a new run": (
        {},
        {"tokenizer": "xyz", "finetune": True},
        "pass the tokenizer that the model was",
    ),
    "blend": ({}, {"data": {**DATA, "blend": [1, "zh"]}}, "blend was [0.7, 'zh', 0.3, 'en'], got [1, 'zh']"),
    "seed": (
        {},
        {"data": {**DATA, "seed": 2}},
        "seed was 1, got 2: the samples already read could not be told",
    ),
    "optimizer": (
        {"ddp": DISTRIBUTED},
        {},
        "this run's kind (distributed, fully_reshardable), the checkpoint's is fp32",
    ),
    "precision": ({"model": BF16}, {}, "this run's kind (16-bit with fp32 copies), the checkpoint's is fp32"),
    "step": ({}, {"step": 5}, "iter_0000005 is not there; whole ones: 2; choose with --ckpt-step"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_touched(case: str, saved: Path) -> None:
    settings, flags, message = REFUSALS[case]
    for refusal in run_ranks(untouched, 2, settings, saved, flags):
        assert message in refusal


@pytest.mark.parametrize(
    "settings, kind",
    [({"ddp": DISTRIBUTED}, "distributed, fully_reshardable"), ({"model": BF16}, "16-bit with fp32 copies")],
)
def test_the_kind_of_a_saved_optimizer_is_named(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    run_ranks(to_the_end, 1, settings, tmp_path)
    message = f"this run's kind (fp32), the checkpoint's is {kind}"
    assert message in run_ranks(untouched, 1, {}, tmp_path, {})[0]


def padded(rank: int, root: Path) -> tuple[bool, bool]:
    """Whether the rows of a vocabulary padded further are the checkpoint's, and the new ones zero."""
    engine, layout = make_engine(vocab=128)
    load(engine, layout, root, no_load_optim=True)
    table = engine.chunks[0].state_dict()["embedding.word_embeddings.weight"]
    small, layout = make_engine()
    load(small, layout, root, no_load_optim=True)
    same = small.chunks[0].state_dict()["embedding.word_embeddings.weight"]
    return torch.equal(table[:96], same), not table[96:].any()


def test_the_same_vocabulary_may_be_padded_otherwise(saved: Path) -> None:
    assert run_ranks(padded, 1, saved) == [(True, True)]


def saved_without(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1, with_optimizer=False, with_rng=False)


def test_weights_saved_alone_need_a_flag_to_go_on(tmp_path: Path) -> None:
    run_ranks(saved_without, 1, tmp_path)
    assert "the checkpoint has no optimizer state; pass --no-load-optim" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    iteration, warned = run_ranks(go_on_without, 1, tmp_path)[0]
    assert iteration == 1
    assert any("for another layout or device and stay as seeded" in text for text in warned)


def go_on_without(rank: int, root: Path) -> tuple[int, list[str]]:
    engine, layout = make_engine()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = load(engine, layout, root, no_load_optim=True)
    return resumed.iteration, [str(warning.message) for warning in caught]


def foreign(rank: int, root: Path) -> None:
    """A checkpoint as another program would write it: weights and an iteration."""
    engine, _ = make_engine()
    metadata = engine.content_metadata
    state = engine.sharded_state_dict(is_loading=False, with_optimizer=True, content_metadata=metadata)
    folder_of(root, 7).mkdir()
    dist_checkpointing.save({**state, "iteration": 7}, str(folder_of(root, 7)), content_metadata=metadata)
    (root / TRACKER).write_text("7")


def test_weights_of_another_program_start_a_run_and_do_not_continue_one(tmp_path: Path) -> None:
    run_ranks(foreign, 1, tmp_path)
    assert "has weights of another program; pass --finetune" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    steps, _, resumed = run_ranks(go_on, 1, {}, tmp_path, finetune=True)[0]
    assert resumed.iteration == 0
    (tmp_path / TRACKER).write_text("release")
    folder_of(tmp_path, 7).rename(tmp_path / "release")
    assert "has weights of another program; pass --finetune" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    assert run_ranks(go_on, 1, {}, tmp_path, finetune=True)[0][0] == steps
