"""Entries that are zeroed stay so under updates without a gradient, in every optimizer of megatron.core."""

from typing import Any

import pytest
import torch

from tests.helpers.engine_state import named, snapshot
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.ranks import run_ranks

LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "bf16": (1, {"model": BF16}),
    "fp32, distributed": (2, {"ddp": {"use_distributed_optimizer": True}}),
    "bf16, distributed, overlapped": (2, {"model": BF16, "ddp": LATE}),
    "fp32, TP 2": (2, {"tp": 2}),
}


def clear(_: int, settings: dict[str, Any]) -> dict[str, tuple[bool, bool]]:
    """For each tensor: were its named entries alive before, and are they, and they alone, zero now?"""
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(2))
    where = {name: torch.arange(p.numel()).view(p.shape) % 3 == 0 for name, p in named(engine) if p.dim() > 1}
    before = snapshot(engine)
    engine.clear([(p, where[name]) for name, p in named(engine) if name in where])
    after = snapshot(engine)
    found = {}
    for key, then in before.items():
        name = key.rsplit(" ", 1)[0]
        if name in where:
            others = torch.equal(after[key][~where[name]], then[~where[name]])
            found[key] = bool(then[where[name]].any()), others and not after[key][where[name]].any()
        else:
            found[key] = True, torch.equal(after[key], then)
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.slow] * (each == "fp32, distributed")) for each in SETTINGS]
)
def test_the_named_entries_are_zero_in_every_copy_and_nothing_else_changes(case: str) -> None:
    ranks, settings = SETTINGS[case]
    found = [each for rank in run_ranks(clear, ranks, settings) for each in rank.items()]
    assert [key for key, (_, right) in found if not right] == []
    alive = {key.rsplit(" ", 1)[1] for key, (alive, _) in found if alive}
    assert alive == {"weight", "main", "exp_avg", "exp_avg_sq"}, "there was something to clear"


def gradients(_: int, settings: dict[str, Any], gather: bool) -> dict[str, torch.Tensor]:
    """The reduced gradients of one step, as they lie on this rank before the update."""
    engine, layout = make_engine(optim={"clip_grad": 0.0}, **settings)
    seen = {}
    finalize: Any = engine._config.finalize_model_grads_func

    def look(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        if gather:
            engine.gather_gradients()
        seen.update({name: p.main_grad.clone() for name, p in named(engine)})  # type: ignore[attr-defined]

    engine._config.finalize_model_grads_func = look
    train(engine, layout, steps=range(1))
    return seen


@pytest.mark.parametrize("ddp", [{}, LATE])
def test_gathered_gradients_are_those_of_one_process_on_every_replica(ddp: dict[str, Any]) -> None:
    (alone,) = run_ranks(gradients, 1, {}, True)
    for found in run_ranks(gradients, 2, {"ddp": ddp}, True):
        assert max((found[name] - alone[name]).abs().max() for name in alone) < 1e-6


def test_a_distributed_optimizer_leaves_a_replica_without_the_others_sums() -> None:
    """The negative control: without gathering some gradients are of one replica alone."""
    (alone,) = run_ranks(gradients, 1, {}, True)
    found = run_ranks(gradients, 2, {"ddp": {"use_distributed_optimizer": True}}, False)[0]
    assert max((found[name] - alone[name]).abs().max() for name in alone) > 1e-4
