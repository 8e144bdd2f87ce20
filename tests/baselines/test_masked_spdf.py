"""SPDF inside Megatron's engine: against w * m written out, and the same in every layout."""

from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.baselines.course import after_reduction
from megatron_sat.baselines.masked_spdf import MaskedSpdf, random_mask
from megatron_sat.baselines.masks import Masks
from megatron_sat.baselines.matrices import find_matrices
from megatron_sat.baselines.settings import SpdfConfig
from megatron_sat.distributed import initialize_model_parallel
from tests.helpers.engine_state import snapshot
from tests.helpers.masked_twin import RATE, Twin, split
from tests.helpers.plain_engine import MICRO_BATCHES, make_engine, train, weights
from tests.helpers.plain_gpt import make_chunks, make_config
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM, RUN_WEIGHTS

STEPS, UNTIL = 6, 4
LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}


class Ran(NamedTuple):
    """What a rank saw."""

    steps: list[tuple[float, float]]
    masks: dict[str, list[int]]
    """Of this stage's matrices, packed."""
    zeros: set[str]
    """What is exactly zero at each entry left out, after the last sparse step: weight, main, exp_avg, exp_avg_sq."""
    learned: float
    """The share of the weights left out that are not zero at the end."""
    weights: dict[str, Tensor]


def course(engine: Any, layout: Any, **changes: Any) -> MaskedSpdf:
    """SPDF on an engine, as `build` does it."""
    settings: dict[str, Any] = {"rate": Fraction(1, 2), "until": UNTIL, "mask": "magnitude", "seed": 1} | changes
    masks = Masks(find_matrices(engine.chunks, group=layout.tp_group))
    spdf = MaskedSpdf(masks, config=SpdfConfig(**settings), clear=engine.clear)
    after_reduction(engine.chunks, do=spdf.silence)
    return spdf


def run(_: int, layout_settings: dict[str, Any], changes: dict[str, Any]) -> Ran:
    engine, layout = make_engine(rate=RATE, **layout_settings)
    spdf = course(engine, layout, **changes)
    spdf.start(1)
    masks = {name: bits.tolist() for name, bits in spdf.state().items()}
    left_out = {id(p): where for p, where in spdf.masks.left_out()}
    steps, zeros = [], set[str]()
    for step in range(1, STEPS + 1):
        spdf.begin_step(step)
        steps += train(engine, layout, steps=range(step, step + 1))
        if step == UNTIL:
            zeros = exactly_zero(engine, left_out)
    engine.gather_weights()
    matrices = [p for chunk in engine.chunks for p in chunk.parameters() if id(p) in left_out]
    learned = torch.cat([p.detach()[left_out[id(p)]] != 0 for p in matrices]).float().mean().item()
    return Ran(steps, masks, zeros, learned, weights(engine))


def exactly_zero(engine: Any, left_out: dict[int, Tensor]) -> set[str]:
    """The kinds of tensors that are zero in every entry left out."""
    names = {
        f"{index}.{name}": left_out[id(p)]
        for index, chunk in enumerate(engine.chunks)
        for name, p in chunk.named_parameters()
        if id(p) in left_out
    }
    found: dict[str, bool] = {}
    for key, tensor in snapshot(engine).items():
        name, kind = key.rsplit(" ", 1)
        if name in names:
            found[kind] = found.get(kind, True) and not tensor[names[name]].any()
    return {kind for kind, zero in found.items() if zero}


def written_out(_: int) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """The half of least magnitude of each matrix is left out until a step."""
    initialize_model_parallel(tp=1, pp=1, cp=1, virtual_pp=None, seed=1234)
    (model,) = make_chunks(make_config())
    twin = Twin(model)  # type: ignore[arg-type]
    for key, (name, mask) in twin.matrices.items():
        weight = split(name, twin.weights[name])[key.split(".")[1]]
        middle = weight.detach().abs().flatten().sort().values[weight.numel() // 2]
        mask.copy_(weight.detach().abs() >= middle)
    twin.apply_masks()
    steps = []
    for step in range(1, STEPS + 1):
        if step == UNTIL + 1:
            for mask in twin.masks.values():
                mask.fill_(1)
        steps.append(twin.train_step(step, total=MICRO_BATCHES))
    return steps, {f"0.{name}": weight.detach() for name, weight in twin.weights.items()}


@pytest.fixture(scope="module")
def alone() -> Ran:
    return run_ranks(run, 1, {}, {})[0]


def test_a_run_is_w_times_m_written_out(alone: Ran) -> None:
    steps, expected = run_ranks(written_out, 1)[0]
    assert_close([loss for loss, _ in alone.steps], [loss for loss, _ in steps], **RUN_LOSS)
    assert_close([norm for _, norm in alone.steps], [norm for _, norm in steps], **RUN_NORM)
    assert_close(alone.weights, expected, **RUN_WEIGHTS)


def test_another_last_step_is_told_apart(alone: Ran) -> None:
    """The negative control: dense from the first step on."""
    other = run_ranks(run, 1, {}, {"until": UNTIL - 1})[0]
    assert max((alone.weights[name] - other.weights[name]).abs().max() for name in alone.weights) > 1e-3


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2": (2, {"tp": 2}),
    "tp 2, sequence parallel": (2, {"tp": 2, "model": {"sequence_parallel": True}}),
    "dp 2": (2, {}),
    "dp 2, distributed optimizer": (2, {"ddp": {"use_distributed_optimizer": True}}),
    "dp 2, distributed optimizer, all overlapped": (2, {"ddp": LATE}),
    "pp 2, interleaved": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}),
    "tp 2, dp 2, distributed optimizer": (4, {"tp": 2, "ddp": LATE}),
}


FAST = ("tp 2, dp 2, distributed optimizer", "dp 2", "dp 2, distributed optimizer, all overlapped")


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=[pytest.mark.slow] * (each not in FAST)) for each in LAYOUTS]
)
def test_every_layout_leaves_out_the_same_weights_and_learns_the_same(layout: str, alone: Ran) -> None:
    ranks, settings = LAYOUTS[layout]
    found = run_ranks(run, ranks, settings, {})
    assert {name: bits for each in found for name, bits in each.masks.items()} == alone.masks
    for each in found:
        assert each.zeros == {"weight", "main", "exp_avg", "exp_avg_sq"}
        assert each.learned > 0.99
        assert_close([loss for loss, _ in each.steps], [loss for loss, _ in alone.steps], **RUN_LOSS)
        assert_close([norm for _, norm in each.steps], [norm for _, norm in alone.steps], **RUN_NORM)


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_bf16_the_copies_of_the_optimizer_are_zero_too(ranks: int) -> None:
    for each in run_ranks(run, ranks, {"model": BF16, "ddp": LATE if ranks == 2 else {}}, {}):
        assert each.zeros == {"weight", "main", "exp_avg", "exp_avg_sq"}
        assert each.learned > 0.9


def test_random_masks_leave_out_their_share_and_follow_from_seed_and_matrix_alone() -> None:
    masks = [random_mask((30, 7), rate=Fraction(1, 3), seed=seed, key=key) for seed, key in ((1, "1.q"), (1, "2.q"))]
    assert [int(mask.sum()) for mask in masks] == [140, 140]
    assert not torch.equal(*masks)
    assert torch.equal(masks[0], random_mask((30, 7), rate=Fraction(1, 3), seed=1, key="1.q"))
    assert not torch.equal(masks[0], random_mask((30, 7), rate=Fraction(1, 3), seed=2, key="1.q"))


def test_random_masks_train_as_well_and_are_others(alone: Ran) -> None:
    found = run_ranks(run, 1, {}, {"mask": "random"})[0]
    assert found.zeros == {"weight", "main", "exp_avg", "exp_avg_sq"}
    assert found.masks != alone.masks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": Fraction(1)}, r"--spdf-rate must be in \[0, 1\), got 1; the SAT paper compares with 0.5"),
        ({"until": 0}, "--spdf-until must be at least 1, got 0; --baseline none trains densely"),
        ({"mask": "largest"}, "--spdf-mask must be one of magnitude, random, got 'largest'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {"rate": Fraction(1, 2), "until": 1, "mask": "random", "seed": 1} | changes
    with pytest.raises(ValueError, match=said):
        SpdfConfig(**settings)
