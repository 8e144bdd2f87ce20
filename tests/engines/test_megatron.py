"""The engine on megatron.core: every layout trains as one process does, and says the same on every rank."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.engines.base import StepResult
from tests.helpers import plain_engine
from tests.helpers.plain_engine import MICRO_BATCHES, batches_of, make_engine, train, weights
from tests.helpers.plain_gpt import MICRO, make_batches
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_chunks

STEPS = range(4)
LOSS, NORM = 2e-6, 5e-6  # fp32, other orders of summation; measured at most 2e-7 and 1e-6
LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
FP16 = {"fp16": True, "params_dtype": torch.float16, "pipeline_dtype": torch.float16}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2": (2, {"tp": 2}),
    "tp 2, sequence parallel": (2, {"tp": 2, "model": {"sequence_parallel": True}}),
    "pp 2": (2, {"pp": 2}),
    "pp 2, interleaved": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}),
    "dp 2": (2, {}),
    "dp 2, overlapped reduction": (2, {"ddp": {"overlap_grad_reduce": True, "bucket_size": 4000}}),
    "dp 2, distributed optimizer": (2, {"ddp": {"use_distributed_optimizer": True}}),
    "dp 2, distributed optimizer, all overlapped": (2, {"ddp": {**LATE, "bucket_size": 4000}}),
    "tp 2, dp 2": (4, {"tp": 2, "ddp": LATE}),
    "pp 2, interleaved, dp 2, all overlapped": (
        4,
        {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED, "ddp": {**LATE, "align_param_gather": True}},
    ),
}


def run(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    engine, layout = make_engine(**settings)
    steps = train(engine, layout, steps=STEPS)
    evaluation = engine.evaluate(batches_of(99, layout), num_micro_batches=MICRO_BATCHES // layout.dp_size)
    after = train(engine, layout, steps=range(4, 5))
    return {"steps": steps + after, "evaluation": (evaluation.loss, evaluation.num_tokens)}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(run, 1, {})[0]


def far(one: dict[str, Any], *, other: dict[str, Any]) -> tuple[float, float]:
    """Largest differences of losses and of norms."""
    losses = [abs(a[0] - b[0]) for a, b in zip(one["steps"], other["steps"], strict=True)]
    losses.append(abs(one["evaluation"][0] - other["evaluation"][0]))
    return max(losses), max(abs(a[1] - b[1]) for a, b in zip(one["steps"], other["steps"], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_and_evaluates_like_one_process(layout: str, alone: dict[str, Any]) -> None:
    answers = run_ranks(run, LAYOUTS[layout][0], LAYOUTS[layout][1])
    assert all(answer == answers[0] for answer in answers), "ranks must report the same"
    loss, norm = far(answers[0], other=alone)
    assert loss < LOSS
    assert norm < NORM


def test_tied_embeddings_train_alike_on_two_pipeline_stages_and_on_one() -> None:
    one = run_ranks(run, 1, {"tied": True})[0]
    two = run_ranks(run, 2, {"tied": True, "pp": 2})[0]
    assert max(far(two, other=one)) < NORM


CONTEXT: dict[str, tuple[int, dict[str, Any]]] = {
    "cp 2": (2, {"cp": 2}),
    "cp 2, dp 2, distributed optimizer": (4, {"cp": 2, "ddp": LATE}),
    "cp 2, tp 2, sequence parallel": (4, {"cp": 2, "tp": 2, "model": {"sequence_parallel": True}}),
}


@pytest.fixture(scope="module")
def alone_on_own_layers() -> dict[str, Any]:
    return run_ranks(run, 1, {"build": tiny_chunks})[0]


@pytest.mark.parametrize("layout", CONTEXT)
def test_context_parallelism_trains_like_one_process(layout: str, alone_on_own_layers: dict[str, Any]) -> None:
    ranks, settings = CONTEXT[layout]
    answers = run_ranks(run, ranks, {"build": tiny_chunks, **settings})
    assert all(answer == answers[0] for answer in answers), "ranks must report the same"
    loss, norm = far(answers[0], other=alone_on_own_layers)
    assert loss < LOSS
    assert norm < NORM


def test_another_model_is_told_apart(alone: dict[str, Any]) -> None:
    assert far(run_ranks(run, 1, {"tied": True})[0], other=alone)[0] > 1e-3


def test_bf16_on_one_process_equals_bf16_with_a_distributed_optimizer_and_stays_near_fp32(
    alone: dict[str, Any],
) -> None:
    one = run_ranks(run, 1, {"model": BF16})[0]
    two = run_ranks(run, 2, {"model": BF16, "ddp": LATE})[0]
    assert far(two, other=one)[0] < 2e-3
    assert 0 < far(one, other=alone)[0] < 5e-3


def gather_between(rank: int, between: bool) -> list[tuple[float, float]]:
    engine, layout = make_engine(ddp=LATE)
    results = []
    for step in STEPS:
        results += train(engine, layout, steps=range(step, step + 1))
        if between:
            engine.gather_weights()
    return results


def test_gathering_weights_between_steps_changes_nothing() -> None:
    assert run_ranks(gather_between, 2, True) == run_ranks(gather_between, 2, False)


def stale(rank: int, gather: bool) -> dict[str, Tensor]:
    engine, layout = make_engine(ddp=LATE)
    train(engine, layout, steps=STEPS)
    if gather:
        engine.gather_weights()
    return weights(engine)


def test_gathered_weights_are_the_same_on_both_replicas_and_ungathered_ones_are_not() -> None:
    one, two = run_ranks(stale, 2, True)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = run_ranks(stale, 2, False)
    assert not all(torch.equal(one[name], two[name]) for name in one)


def literal(rank: int) -> tuple[list[StepResult], list[float], float]:
    """The engine's losses, and the same means by hand."""
    engine, _ = make_engine()
    chunk = engine.chunks[0]
    by_hand, results = [], []
    for step in range(3):
        total = tokens = 0.0
        with torch.no_grad():
            for batch in make_batches(step, total=MICRO_BATCHES):
                losses = chunk(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
                total += (losses * batch["loss_mask"]).double().sum().item()
                tokens += batch["loss_mask"].sum().item()
        by_hand.append(total / tokens)
        results.append(engine.train_step(make_batches(step, total=MICRO_BATCHES), num_micro_batches=MICRO_BATCHES))
    return results, by_hand, tokens


def test_the_loss_is_the_mean_over_unmasked_tokens_before_the_update() -> None:
    results, by_hand, tokens = run_ranks(literal, 1)[0]
    assert [r.loss for r in results] == pytest.approx(by_hand, abs=1e-6)
    assert results[-1].num_tokens == tokens < MICRO * 16 * MICRO_BATCHES
    assert not results[-1].skipped


def gradients(rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient that one step hands to the optimizer."""
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(1))
    return {n: p.main_grad.clone() for n, p in engine.chunks[0].named_parameters()}


def test_the_gradient_is_that_of_the_mean_over_all_tokens() -> None:
    got = run_ranks(gradients, 2, {"optim": {"clip_grad": 0.0}})[1]
    want = run_ranks(autograd_of_the_mean, 1)[0]
    assert all(torch.allclose(got[name], want[name], atol=1e-7) for name in want)
    other = run_ranks(gradients, 2, {"optim": {"clip_grad": 0.0}, "model": {"calculate_per_token_loss": False}})[1]
    assert not all(torch.allclose(other[name], want[name], atol=1e-7) for name in want), "means of means differ"


def autograd_of_the_mean(rank: int) -> dict[str, Tensor]:
    engine, _ = make_engine()
    chunk = engine.chunks[0]
    batches = list(make_batches(0, total=MICRO_BATCHES))
    total = sum(
        (chunk(b["tokens"], b["position_ids"], b["attention_mask"], labels=b["labels"]) * b["loss_mask"]).sum()
        for b in batches
    )
    mean = total / sum(b["loss_mask"].sum() for b in batches)
    names, parameters = zip(*chunk.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(mean, parameters), strict=True))


def test_the_gradient_norm_is_reported_without_clipping_too() -> None:
    clipped = run_ranks(run, 1, {"optim": {"clip_grad": 0.01}})[0]["steps"][0]
    free = run_ranks(run, 1, {"optim": {"clip_grad": 0.0}})[0]["steps"][0]
    assert clipped == free
    assert free[1] > 0.01


def all_masked(rank: int) -> tuple[StepResult, bool]:
    engine, _ = make_engine(rate={"weight_decay": 0.0})
    before = weights(engine)

    def blank() -> Any:
        for batch in make_batches(0, total=MICRO_BATCHES):
            yield {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}

    result = engine.train_step(blank(), num_micro_batches=MICRO_BATCHES)
    return result, all(torch.equal(before[name], value) for name, value in weights(engine).items())


def test_a_step_without_any_unmasked_token_has_no_loss_and_moves_nothing() -> None:
    result, same = run_ranks(all_masked, 1)[0]
    assert math.isnan(result.loss)
    assert (result.num_tokens, result.grad_norm, same) == (0, 0.0, True)


def overflow(rank: int) -> tuple[list[bool], list[float], bool]:
    engine, _ = make_engine(model=FP16, optim={"initial_loss_scale": 2.0**40, "hysteresis": 1})
    results = [
        engine.train_step(make_batches(0, total=MICRO_BATCHES), num_micro_batches=MICRO_BATCHES) for _ in range(30)
    ]
    assert math.isnan(results[0].grad_norm)
    return (
        [r.skipped for r in results],
        [r.learning_rate for r in results],
        math.isfinite(results[-1].grad_norm),
    )


def test_an_overflow_in_fp16_skips_the_update_and_the_schedule_until_the_scale_fits() -> None:
    skipped, rates, finite = run_ranks(overflow, 1)[0]
    first = skipped.index(False)
    assert first > 3
    assert finite
    assert not any(skipped[first:])
    assert len(set(rates[: first + 1])) == 1
    assert rates[first + 1] != rates[first]


def evaluation_only(rank: int, settings: dict[str, Any]) -> bool:
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(2))
    engine.gather_weights()
    before = weights(engine)
    engine.evaluate(make_batches(5, total=4, ranks=layout.dp_size, rank=layout.dp_rank), num_micro_batches=2)
    assert all(chunk.training for chunk in engine.chunks)
    return all(torch.equal(before[name], value) for name, value in weights(engine).items())


def test_evaluation_leaves_the_weights_alone() -> None:
    assert run_ranks(evaluation_only, 2, {}) == [True, True]
    assert run_ranks(evaluation_only, 2, {"ddp": LATE}) == [True, True]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pp": 2, "virtual_pp": 2}, "overlap_p2p_comm must be on for an interleaved pipeline of 2 stages"),
        (
            {"ddp": {"average_in_collective": True}},
            "average_in_collective must be off with calculate_per_token_loss",
        ),
        ({"ddp": {"overlap_param_gather": True}}, "overlap_param_gather needs use_distributed_optimizer"),
        (
            {"ddp": {"overlap_param_gather": True, "use_distributed_optimizer": True}},
            "overlap_param_gather needs overlap_grad_reduce",
        ),
        ({"disagree": "bf16"}, "bf16 of the optimizer must be that of the model"),
    ],
)
def test_contradictions_are_refused_before_anything_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_ranks(refused, 2, settings)


def refused(rank: int, settings: dict[str, Any]) -> None:
    if settings.pop("disagree", None):
        true = plain_engine.make_optimizer_config

        def disagreeing(*args: Any, **kwargs: Any) -> Any:
            config = true(*args, **kwargs)
            config.bf16 = True
            return config

        plain_engine.make_optimizer_config = disagreeing  # type: ignore[assignment]
    make_engine(**settings)
