"""Held entries stay bit-identical across an update, in every optimizer of megatron.core; all others move."""

from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_sat.engines.base import Held
from megatron_sat.engines.frozen import hold_entries
from megatron_sat.engines.megatron import MegatronEngine
from megatron_sat.engines.pieces import Piece, pieces
from tests.helpers.engine_state import named, snapshot
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.ranks import run_ranks

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "fp32, sgd": (1, {"optim": {"optimizer": "sgd"}}),
    "bf16": (1, {"model": BF16}),
    "fp32, distributed": (2, {"ddp": {"use_distributed_optimizer": True}}),
    "bf16, distributed, overlapped": (
        2,
        {
            "model": BF16,
            "ddp": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
        },
    ),
    "fp32, TP 2": (2, {"tp": 2}),
    "fp32, interleaved PP 2": (
        2,
        {"pp": 2, "virtual_pp": 2, "model": {"overlap_p2p_comm": True, "batch_p2p_comm": False}},
    ),
}


def choose(engine: MegatronEngine) -> dict[str, tuple[torch.nn.Parameter, int, Tensor]]:
    """A third of the rows of fc1 and qkv, of the columns of fc2, and of a norm: by index and by mask."""
    chosen = {}
    for name, parameter in named(engine):
        if "linear_fc1" in name or "linear_qkv" in name:
            chosen[name] = (parameter, 0, torch.arange(0, parameter.shape[0], 3))
        elif "linear_fc2" in name:
            chosen[name] = (parameter, 1, torch.arange(parameter.shape[1]) % 3 == 1)
        elif "final_layernorm" in name:
            chosen[name] = (parameter, 0, torch.tensor([0, 5]))
    return chosen


def compare(rank: int, settings: dict[str, Any], hold: bool) -> dict[str, tuple[bool, float]]:
    """For each tensor of a chosen parameter: are its held entries bit-identical, and how many of the others
    moved?"""
    engine, layout = make_engine(**settings)
    chosen = choose(engine)
    train(engine, layout, steps=range(2))  # momentum builds up
    if hold:
        engine.hold(lambda: list(chosen.values()))
    before = snapshot(engine)
    train(engine, layout, steps=range(2, 4))
    after = snapshot(engine)
    verdict = {}
    for name, (parameter, dim, index) in chosen.items():
        held = torch.zeros(parameter.shape, dtype=torch.bool)
        held.index_fill_(dim, index.nonzero().flatten() if index.dtype == torch.bool else index, True)
        for key, old in before.items():
            if key.startswith(f"{name} "):
                same = torch.equal(old[held].view(torch.uint8), after[key][held].view(torch.uint8))
                verdict[key] = same, (old[~held] != after[key][~held]).float().mean().item()
    return verdict


@pytest.mark.parametrize("case", SETTINGS)
def test_held_weights_and_moments_stay_bit_identical_and_the_others_move(case: str) -> None:
    ranks, settings = SETTINGS[case]
    held_moved, kinds = [], set()
    others_moved: dict[str, float] = {}
    for answer in run_ranks(compare, ranks, settings, True):
        for key, (same, moved) in answer.items():
            kinds.add(key.split()[-1])
            others_moved[key] = max(others_moved.get(key, 0.0), moved)
            if not same:
                held_moved.append(key)
    assert not held_moved
    assert kinds == {"weight", "main"} | ({"momentum_buffer"} if "sgd" in case else {"exp_avg", "exp_avg_sq"})
    # a bf16 weight moves only when its step exceeds its rounding; half of a sharded tensor lies on the other
    # rank
    assert min(others_moved.values()) > (0.05 if "bf16" in case or "distributed" in case else 0.9)


@pytest.mark.parametrize("case", SETTINGS)
def test_without_holding_the_same_entries_move(case: str) -> None:
    ranks, settings = SETTINGS[case]
    answers = run_ranks(compare, ranks, settings, False)
    moved = {key for answer in answers for key, (same, _) in answer.items() if not same}
    # the state of a parameter may lie wholly on one rank, and a step may be too small for two bf16 entries of
    # a norm
    assert {key for answer in answers for key in answer if "layernorm" not in key} <= moved


def moved_by_decay(rank: int, hold: bool) -> float:
    """How far rows with a zero gradient go in one step after their momentum was built up."""
    engine, layout = make_engine(rate={"weight_decay": 0.1})
    weight = next(p for n, p in named(engine) if "linear_fc1" in n)
    train(engine, layout, steps=range(1))
    entries: list[Held] = [(weight, 0, torch.arange(4))]
    if hold:
        engine.hold(lambda: entries)
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.arange(4), 0.0))
    train(engine, layout, steps=range(1, 2))
    return (weight.detach() - before)[:4].abs().max().item()


def test_a_zero_gradient_alone_does_not_keep_a_weight_where_it_was() -> None:
    assert run_ranks(moved_by_decay, 1, False)[0] > 1e-4
    assert run_ranks(moved_by_decay, 1, True)[0] == 0.0


def first_step(rank: int) -> tuple[float, float, bool]:
    engine, layout = make_engine()
    weight = next(p for n, p in named(engine) if "linear_fc2" in n)
    columns = torch.tensor([1, 2, 40])
    engine.hold(lambda: [(weight, 1, columns)])
    before = weight.detach().clone()
    train(engine, layout, steps=range(1))
    moments = engine._optimizer.chained_optimizers[0].optimizer.state[weight]
    held = max(moments[key][:, columns].abs().max().item() for key in ("exp_avg", "exp_avg_sq"))
    return (
        held,
        moments["exp_avg"][:, 3].abs().max().item(),
        torch.equal(before[:, columns], weight[:, columns]),
    )


def test_moments_made_by_the_first_step_are_zero_where_it_was_sat_out() -> None:
    held, other, same = run_ranks(first_step, 1)[0]
    assert (held, same) == (0.0, True)
    assert other > 0.0


def changing(rank: int) -> list[bool]:
    """Row 0 sits out step 1, row 1 sits out step 2: each moves exactly in the other."""
    engine, layout = make_engine()
    weight = next(p for n, p in named(engine) if "linear_fc1" in n)
    row = 0
    engine.hold(lambda: [(weight, 0, torch.tensor([row]))])
    answers = []
    for row in (0, 1):
        before = weight.detach().clone()
        train(engine, layout, steps=range(row, row + 1))
        answers += [torch.equal(before[0], weight[0]), torch.equal(before[1], weight[1])]
    return answers


def test_what_is_held_is_asked_anew_before_each_step() -> None:
    assert run_ranks(changing, 1)[0] == [True, False, False, True]


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_pieces_of_a_flat_range_are_rectangles_that_cover_it_once(columns: int) -> None:
    whole = torch.arange(5 * columns)
    for start in range(len(whole)):
        for end in range(start + 1, len(whole) + 1):
            cut = pieces(start, end, columns=columns)
            table = whole.view(5, columns)
            covered = torch.cat([table[slice(*p.rows), slice(*p.columns)].flatten() for p in cut])
            assert torch.equal(covered, whole[start:end])
            assert len(cut) <= 3
            assert [p.start + start for p in cut] == [int(table[p.rows[0], p.columns[0]]) for p in cut]


def test_a_whole_parameter_is_one_piece() -> None:
    assert pieces(0, 20, columns=4) == [Piece(0, (0, 5), (0, 4))]


def refused(rank: int, how: str) -> None:
    engine, _ = make_engine()
    wrapper = engine._optimizer.chained_optimizers[0]
    if how == "offload":
        wrapper.optimizer = HybridDeviceOptimizer.__new__(HybridDeviceOptimizer)
    elif how == "scaled":
        wrapper.config.exp_avg_dtype = torch.uint8
    else:
        wrapper = type("Muon", (), {"is_stub_optimizer": False})()
    hold_entries(wrapper, entries=list)


@pytest.mark.parametrize(
    "how, message",
    [
        ("offload", "state on one device, got --optimizer-cpu-offload"),
        ("scaled", "without a shared scale, got --exp-avg-dtype torch.uint8"),
        ("unknown", "three wrappers, got Muon"),
    ],
)
def test_an_optimizer_that_cannot_hold_entries_is_refused(how: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_ranks(refused, 1, how)


def stub(rank: int) -> bool:
    engine, _ = make_engine()
    wrapper = engine._optimizer.chained_optimizers[0]
    wrapper.is_stub_optimizer, wrapper.optimizer = True, None
    hold_entries(engine._optimizer, entries=list)
    return True


def test_a_rank_without_trainable_parameters_has_nothing_to_hold() -> None:
    assert run_ranks(stub, 1) == [True]
