"""MST by masks: its arithmetic by lists, a whole run against w * m written out, and the same in every layout."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.baselines.course import after_reduction
from megatron_sat.baselines.masks import Masks
from megatron_sat.baselines.matrices import find_matrices
from megatron_sat.baselines.mst import MaskedMst, change_mask, densities
from megatron_sat.baselines.settings import MstConfig
from megatron_sat.distributed import initialize_model_parallel
from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.schedule import ScheduleConfig
from megatron_sat.sparsity.selection import generator_of
from tests.helpers.masked_twin import RATE, Twin, split
from tests.helpers.plain_engine import MICRO_BATCHES, make_engine, train, weights
from tests.helpers.plain_gpt import make_chunks, make_config
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import GROWN_LOSS, RUN_LOSS, RUN_NORM, RUN_WEIGHTS

SPARSITY, LAST, INTERVAL = 0.8, 12, 2
SEVEN_EIGHTHS = SPARSITY * (1 - (1 - 1 / 2) ** 3)
TARGETS = {2: SEVEN_EIGHTHS, 4: SPARSITY, 6: SPARSITY, 8: SEVEN_EIGHTHS, 10: 0.0}
"""After which steps the masks change, and to which share: two stages of two steps, four steps, and back."""
REPLACED, RANDOM = 0.5, 0.25
LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]


def config_of(**changes: Any) -> MstConfig:
    schedule: dict[str, Any] = {"kind": "mst", "omission_rate": Fraction(4, 5), "train_iters": LAST}
    schedule |= {"warmup": 4, "restoration": 4, "stages": 2, "interval": INTERVAL} | changes.pop("schedule", {})
    growing = Growing(replaced=REPLACED, random_share=RANDOM, last_step=LAST)
    settings: dict[str, Any] = {"schedule": ScheduleConfig(**schedule), "growing": growing}
    return MstConfig(**settings | {"attention_stride": 0, "seed": 7} | changes)


# -- literal


def literal_densities(shapes: list[tuple[int, int]], *, sparsity: float) -> list[float]:
    """Matrices whose share would be above one are made whole, the most so first, until none is."""
    whole: set[int] = set()
    while True:
        wanted = sum(r * c for r, c in shapes) * (1 - sparsity) - sum(shapes[i][0] * shapes[i][1] for i in whole)
        raw = {i: (r + c) / (r * c) for i, (r, c) in enumerate(shapes) if i not in whole}
        factor = wanted / sum(raw[i] * shapes[i][0] * shapes[i][1] for i in raw) if raw else 0.0
        worst = max(raw.values(), default=0.0)
        if worst * factor <= 1 + 1e-12:
            return [1.0 if i in whole else raw[i] * factor for i in range(len(shapes))]
        whole |= {i for i, each in raw.items() if each == worst}


def literal_change(
    mask: list[bool], weight: list[float], gradient: list[float], *, density: float, step: int, key: str
) -> list[bool]:
    """The smallest go; the largest gradients and random ones come."""
    size, had = len(mask), sum(mask)
    missing = int(round((1 - density) * size - (size - had), 6))
    pruned = max(int(had * REPLACED / 2 * (1 + math.cos(math.pi * step / LAST))), missing)
    grown = pruned - missing
    places = sorted((i for i in range(size) if mask[i]), key=lambda i: (-abs(weight[i]), i))[: had - pruned]
    left = sorted(set(range(size)) - set(places), key=lambda i: (-abs(gradient[i]), i))
    places += left[: int(grown * 3 / 4)]
    noise = torch.rand(size, generator=generator_of(key), dtype=torch.float64).tolist()
    left = sorted(set(range(size)) - set(places), key=lambda i: -noise[i])
    places += left[: grown - int(grown * 3 / 4)]
    return [i in set(places) for i in range(size)]


@pytest.mark.parametrize("sparsity", [0, Fraction(1, 10), Fraction(1, 2), Fraction(4, 5), Fraction(99, 100)])
@pytest.mark.parametrize("shapes", [SHAPES, [(4, 4), (64, 64), (8, 100)], [(768, 3072), (768, 2304)]])
def test_densities_are_erdos_renyis_and_come_to_the_sparsity(shapes: list[tuple[int, int]], sparsity: Fraction) -> None:
    found = densities(shapes, sparsity=Fraction(sparsity))
    assert [float(each) for each in found] == pytest.approx(literal_densities(shapes, sparsity=float(sparsity)))
    assert sum(each * r * c for each, (r, c) in zip(found, shapes, strict=True)) == (1 - sparsity) * sum(
        r * c for r, c in shapes
    )
    assert all(0 < each <= 1 for each in found)


@pytest.mark.parametrize(("had", "density"), [(60, "3/5"), (100, "1/5"), (20, "1"), (30, "1/2"), (50, "9/20")])
@pytest.mark.parametrize("step", [2, 6, 10])
def test_a_change_of_masks_is_dropping_and_growing_by_lists(had: int, density: str, step: int) -> None:
    generator = torch.Generator().manual_seed(had + step)
    weight, gradient = torch.randn(2, 10, 10, generator=generator)
    mask = torch.zeros(100, dtype=torch.bool)
    mask[torch.randperm(100, generator=generator)[:had]] = True
    weight = weight * mask.view(10, 10)
    growing = Growing(replaced=REPLACED, random_share=RANDOM, last_step=LAST)
    found = change_mask(
        mask.view(10, 10),
        weight=weight,
        gradient=gradient,
        density=Fraction(density),
        growing=growing,
        step=step,
        generator=generator_of("key"),
    )
    arguments = (mask.tolist(), weight.flatten().tolist(), gradient.flatten().tolist())
    expected = literal_change(*arguments, density=float(Fraction(density)), step=step, key="key")
    assert found.flatten().tolist() == expected
    assert int(found.sum()) == round(100 * float(Fraction(density)))


# -- a run


class Ran(NamedTuple):
    steps: list[tuple[float, float]]
    weights: dict[str, Tensor]
    still: list[int]
    """Steps whose update moved nothing that takes part."""
    zeros: list[float]
    """After each step, the share of zeros among the matrices' weights of this rank."""


def run(_: int, layout_settings: dict[str, Any], seed: int = 7) -> Ran:
    engine, layout = make_engine(rate=RATE, **layout_settings)
    masks = Masks(find_matrices(engine.chunks, group=layout.tp_group))
    mst = MaskedMst(
        masks, config=config_of(seed=seed), attentions=[], clear=engine.clear, gather_gradients=engine.gather_gradients
    )
    after_reduction(engine.chunks, do=mst.after_reduction)
    engine.pass_over(lambda: mst.is_change)
    mst.start(1)
    steps, still, zeros = [], [], []
    for step in range(1, LAST + 1):
        before = weights(engine)
        mst.begin_step(step)
        steps += train(engine, layout, steps=range(step, step + 1))
        engine.gather_weights()
        now = weights(engine)
        if all(((now[name] == before[name]) | (now[name] == 0)).all() for name in now):
            still.append(step)
        matrices = [now[name] for name in now if "linear" in name]
        zeros.append(sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices))
    return Ran(steps, weights(engine), still, zeros)


def written_out(_: int) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    initialize_model_parallel(tp=1, pp=1, cp=1, virtual_pp=None, seed=1234)
    (model,) = make_chunks(make_config())
    twin = Twin(model)  # type: ignore[arg-type]
    shapes = [(view.numel() // 48 if "fc2" in name else view.numel() // 32, 48 if "fc2" in name else 32)
              for name, view in twin.matrices.values()]  # fmt: skip

    def change(step: int, dense: dict[str, Tensor]) -> bool:
        if step not in TARGETS:
            return True
        shares = literal_densities(shapes, sparsity=TARGETS[step])
        for (key, (name, mask)), density in zip(twin.matrices.items(), shares, strict=True):
            part = key.split(".")[1]
            values = [split(name, each[name].detach())[part].flatten().tolist() for each in (twin.weights, dense)]
            had = [bool(each) for each in mask.flatten().tolist()]
            now = literal_change(had, *values, density=density, step=step, key=f"7/{step}/{key}")
            mask.copy_(torch.tensor(now).view(mask.shape))
        twin.apply_masks()
        for weight, state in twin.adam.state.items():
            (name,) = [each for each in twin.weights if twin.weights[each] is weight]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment].mul_(twin.masks[name])
        return False

    steps = [
        twin.train_step(step, total=MICRO_BATCHES, change=lambda dense, step=step: change(step, dense))  # type: ignore[misc]
        for step in range(1, LAST + 1)
    ]
    return steps, {f"0.{name}": weight.detach() for name, weight in twin.weights.items()}


@pytest.fixture(scope="module")
def alone() -> Ran:
    return run_ranks(run, 1, {})[0]


def test_a_run_is_w_times_m_with_masks_that_change_written_out(alone: Ran) -> None:
    steps, expected = run_ranks(written_out, 1)[0]
    assert_close([loss for loss, _ in alone.steps], [loss for loss, _ in steps], **RUN_LOSS)
    assert_close([norm for _, norm in alone.steps], [norm for _, norm in steps], **RUN_NORM)
    assert_close(alone.weights, expected, **RUN_WEIGHTS)


def test_the_phases_are_dense_sparse_and_dense_and_a_change_takes_the_place_of_an_update(alone: Ran) -> None:
    assert alone.still == list(TARGETS)
    assert alone.zeros[0] == alone.zeros[-1] == 0
    assert alone.zeros[2] == pytest.approx(SEVEN_EIGHTHS, abs=1e-3)
    assert [alone.zeros[4], alone.zeros[6]] == pytest.approx([SPARSITY] * 2, abs=1e-3)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp 2": (2, {}),
    "dp 2, distributed optimizer": (2, {"ddp": {"use_distributed_optimizer": True}}),
    "tp 2, dp 2, distributed optimizer, overlapped": (4, {"tp": 2, "ddp": LATE}),
    "pp 2, interleaved": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=[pytest.mark.slow] * ("overlapped" not in each)) for each in LAYOUTS]
)
def test_every_layout_changes_the_same_weights_and_learns_the_same(layout: str, alone: Ran) -> None:
    ranks, settings = LAYOUTS[layout]
    for each in run_ranks(run, ranks, settings):
        assert_close([loss for loss, _ in each.steps], [loss for loss, _ in alone.steps], **GROWN_LOSS)
        assert each.still == alone.still


def test_another_seed_grows_others_and_is_told_apart(alone: Ran) -> None:
    """The negative control of the tolerance above."""
    other = run_ranks(run, 1, {}, 8)[0]
    apart = [abs(mine[0] / others[0] - 1) for mine, others in zip(alone.steps, other.steps, strict=True)]
    assert max(apart) > 2 * GROWN_LOSS["rtol"]


def carried(_: int) -> list[tuple[int, bool]]:
    """Of each step: how many masks its checkpoint gets, and whether taking over nothing lets all weights take part."""
    engine, layout = make_engine(rate=RATE)
    masks = Masks(find_matrices(engine.chunks, group=layout.tp_group))
    mst = MaskedMst(
        masks, config=config_of(), attentions=[], clear=engine.clear, gather_gradients=engine.gather_gradients
    )
    found = []
    for step in range(1, LAST + 1):
        mst.begin_step(step)
        for matrix in masks.matrices:
            masks.set(matrix, torch.zeros(matrix.shape, dtype=torch.bool))
        saved = len(mst.state())
        mst.restore({})
        found.append((saved, all(bool(masks.whole(matrix).all()) for matrix in masks.matrices)))
    return found


def test_checkpoints_carry_masks_from_the_first_change_to_the_last_and_none_means_dense() -> None:
    """The last one, after step 10, makes everything take part: it is carried, and says so."""
    found = run_ranks(carried, 1)[0]
    assert [saved for saved, _ in found] == [0] + [28] * 9 + [0] * 2
    assert all(lifted for _, lifted in found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": {"interval": 1}}, "--mst-interval must be at least 2 with --baseline mst, got 1: a change takes"),
        ({"attention_stride": -1}, "--mst-attention-stride must be at least 0, got -1; 0 is dense"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(**changes)
