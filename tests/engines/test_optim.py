"""Learning rates by literal formulas, weight decay where it belongs, and every refusal of a schedule."""

import math
from typing import Any

import pytest
import torch
from megatron.core import optimizer as mcore_optimizer

from megatron_sat.engines.optim import (
    LearningRateConfig,
    build_scheduler,
    describe_adam,
    match_groups,
    saved_group_lists,
)
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.ranks import run_ranks

BATCH = 4


def config(**changes: Any) -> LearningRateConfig:
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.1, "train_iters": 20, "lr_decay_style": "cosine"}
    return LearningRateConfig(**{"global_batch_size": BATCH, **settings, **changes})


class Groups:
    """All that the scheduler asks of an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def rates(config: LearningRateConfig, *, updates: int) -> list[tuple[float, float]]:
    """(learning rate, weight decay) that each update uses."""
    groups = Groups()
    scheduler = build_scheduler(groups, config=config)  # type: ignore[arg-type]
    used = []
    for _ in range(updates):
        used.append((groups.param_groups[0]["lr"], groups.param_groups[0]["weight_decay"]))
        assert groups.param_groups[1]["weight_decay"] == 0.0
        scheduler.step(increment=BATCH)
    return used


def cosine(x: float) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x))


@pytest.mark.parametrize(
    "changes, rate",
    [
        ({"lr_decay_style": "constant"}, lambda t: 1.0),
        ({"lr_decay_style": "linear"}, lambda t: 1.0 - 0.9 * t / 20),
        ({"lr_decay_style": "cosine"}, lambda t: cosine(t / 20)),
        ({"lr_decay_style": "cosine", "lr_decay_iters": 10}, lambda t: cosine(t / 10) if t <= 10 else 0.1),
        (
            {"lr_decay_style": "cosine", "lr_warmup_iters": 4, "lr_warmup_init": 0.2},
            lambda t: 0.2 + 0.8 * t / 4 if t <= 4 else cosine((t - 4) / 16),
        ),
        (
            {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.2},
            lambda t: t / 4 if t <= 4 else cosine((t - 4) / 16),
        ),
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 4},
            lambda t: t / 4 if t <= 4 else max(0.1, 2 / math.sqrt(t)),
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "linear"},
            lambda t: 1.0 if t <= 15 else 0.1 + 0.9 * (1 - (t - 15) / 5),
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "minus_sqrt"},
            lambda t: 1.0 if t <= 15 else 0.1 + 0.9 * (1 - math.sqrt((t - 15) / 5)),
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "cosine"},
            lambda t: 1.0 if t <= 15 else cosine((t - 15) / 5),
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5},
            lambda t: 1.0 if t <= 15 else 0.1 + 0.9 * (2 * 0.5 ** ((t - 15) / 5) - 1),
        ),
    ],
)
def test_learning_rates_follow_the_formula_of_their_style(changes: dict[str, Any], rate: Any) -> None:
    used = [lr for lr, _ in rates(config(**changes), updates=23)]
    # update t (from 0) uses the rate after t updates; inverse-square-root counts in samples, where both
    # factors cancel
    want = [rate(t) if t <= 20 or changes["lr_decay_style"] == "constant" else 0.1 for t in range(23)]
    assert used == pytest.approx(want, abs=1e-12)


def test_weight_decay_grows_from_its_start_to_its_end() -> None:
    grown = config(start_weight_decay=0.0, end_weight_decay=0.2, weight_decay_incr_style="linear")
    assert [wd for _, wd in rates(grown, updates=22)] == pytest.approx([0.01 * min(t, 20) for t in range(22)])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0.0}, "--lr must be above 0, got 0.0"),
        ({"lr": math.nan}, "--lr must be above 0, got nan"),
        ({"train_iters": 0}, "--train-iters must be at least 1, got 0"),
        ({"global_batch_size": 0}, "--global-batch-size must be at least 1, got 0"),
        ({"min_lr": 2.0}, r"--min-lr must be in \[0, --lr = 1.0\], got 2.0"),
        ({"lr_warmup_init": -1.0}, r"--lr-warmup-init must be in \[0, --lr = 1.0\], got -1.0"),
        (
            {"lr_decay_style": "cosin"},
            "--lr-decay-style must be one of constant, linear, cosine, .*, got cosin",
        ),
        ({"lr_wsd_decay_style": "square"}, "--lr-wsd-decay-style must be one of exponential, .*, got square"),
        (
            {"weight_decay_incr_style": "step"},
            "--weight-decay-incr-style must be one of constant, .*, got step",
        ),
        ({"lr_decay_iters": 0}, "--lr-decay-iters must be at least 1, got 0"),
        ({"lr_warmup_iters": 20}, r"--lr-warmup-iters must be in \[0, --lr-decay-iters = 20\), got 20"),
        (
            {"lr_warmup_iters": 2, "lr_warmup_fraction": 0.1},
            r"--lr-warmup-fraction \(0.1\) and --lr-warmup-iters \(2\)",
        ),
        ({"lr_warmup_fraction": 1.0}, r"--lr-warmup-fraction must be in \[0, 1\), got 1.0"),
        (
            {"lr_decay_style": "WSD"},
            r"--lr-wsd-decay-iters must be in \[1, .* = 20\] with --lr-decay-style WSD, got None",
        ),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 21}, "--lr-wsd-decay-iters must be in .* got 21"),
        ({"weight_decay": -0.1}, "weight decay must be >= 0 and must not shrink, got -0.1"),
        (
            {"start_weight_decay": 0.2, "end_weight_decay": 0.1, "weight_decay_incr_style": "linear"},
            "must not shrink, got 0.2 at the start and 0.1 at the end",
        ),
        (
            {"start_weight_decay": 0.0},
            "constant needs equal --start-weight-decay and --end-weight-decay, got 0.0 and 0.01",
        ),
        (
            {"use_checkpoint_opt_param_scheduler": True, "override_opt_param_scheduler": True},
            "exclude each other, both are set",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_setting_of_wsd_without_wsd_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="--lr-wsd-decay-iters has no effect with --lr-decay-style cosine"):
        config(lr_wsd_decay_iters=5)


def build_with(rank: int, optim: dict[str, Any]) -> None:
    make_engine(optim=optim)


@pytest.mark.parametrize(
    "optim, message",
    [
        (
            {"bf16": True},
            "bf16 of the optimizer follows from the other settings and cannot be given, got True",
        ),
        ({"adam_beta3": 0.9}, "the optimizer of this megatron.core has no setting adam_beta3, got 0.9"),
    ],
)
def test_an_optimizer_setting_is_given_once_and_must_exist(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_ranks(build_with, 1, optim)


def decayed(rank: int) -> dict[str, bool]:
    """Which parameters decay when their gradient is zero throughout."""
    engine, _ = make_engine(model={"add_bias_linear": True, "add_qkv_bias": True})
    chunk = engine.chunks[0]
    for parameter in chunk.parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 0.5)
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    for parameter in chunk.parameters():
        parameter.main_grad.zero_()
    engine._optimizer.step()
    return {name: not torch.equal(before[name], p) for name, p in chunk.named_parameters()}


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    answer = run_ranks(decayed, 1)[0]
    assert any("bias" in name for name in answer)
    assert any("norm" in name for name in answer)
    assert {name for name, moved in answer.items() if moved} == {
        name for name in answer if name.endswith("weight") and "norm" not in name
    }


def first_rate(rank: int, settings: dict[str, Any]) -> tuple[float, float]:
    engine, layout = make_engine(**settings)
    before = engine.learning_rate
    train(engine, layout, steps=range(1))
    return before, engine.learning_rate


def test_the_engine_names_the_rate_of_the_next_update() -> None:
    before, after = run_ranks(first_rate, 1, {})[0]
    assert (before, after) == pytest.approx((1e-3, 2e-3))
    decoupled = run_ranks(first_rate, 1, {"optim": {"decoupled_lr": 3e-4, "decoupled_min_lr": 0.0}})[0]
    assert decoupled == pytest.approx((1e-3, 2e-3)), "the rate of the body, not of the embedding"


def test_the_adam_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_adam() == "optimizer: torch's AdamW (neither Transformer Engine nor apex is installed)"
    for module, name in (
        ("apex.optimizers.fused_adam", "apex's"),
        ("transformer_engine.pytorch", "Transformer Engine's"),
    ):
        monkeypatch.setattr(mcore_optimizer, "Adam", type("FusedAdam", (), {"__module__": module}))
        assert describe_adam() == f"optimizer: {name} FusedAdam"


def test_parameter_groups_pair_by_purpose_whatever_their_rates_and_order() -> None:
    saved = [
        {"wd_mult": 0.0, "max_lr": 1},
        {"wd_mult": 1.0, "max_lr": 2},
        {"default_config": False, "max_lr": 3},
    ]
    current = [
        {"default_config": False, "max_lr": 7},
        {"wd_mult": 1.0, "max_lr": 8},
        {"wd_mult": 0.0, "max_lr": 9},
    ]
    pairs = [(a["max_lr"], b["max_lr"]) for a, b in match_groups(saved, current=current)]
    assert pairs == [(3, 7), (2, 8), (1, 9)]


def test_a_parameter_group_without_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it has none for \(0.0, 1.0, False, True\); set --decoupled-lr"):
        match_groups([{"wd_mult": 1.0}], current=[{"wd_mult": 0.0}])


def test_group_lists_are_found_in_every_optimizers_state() -> None:
    plain = {"state": {}, "param_groups": [1]}
    assert list(saved_group_lists(plain)) == [[1]]
    assert list(saved_group_lists({0: {"optimizer": plain}, 1: {"optimizer": {"param_groups": [2]}}})) == [
        [1],
        [2],
    ]
