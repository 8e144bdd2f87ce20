"""Omission in the weights' gradients alone: the dense module's output and input gradient, and of its weights' gradients
the part of the kept neurons, however it is computed."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.layers import fused
from megatron_sat.sparsity.controller import Controller
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout
from tests.layers.twins import Masks, Pair, Run, attach, attention_masks, attention_pair, mlp_masks, mlp_pair, run, step

CASES = [
    pytest.param("mlp", "group", {}, id="mlp"),
    pytest.param("mlp", "group", {"add_bias_linear": True}, id="mlp-bias"),
    pytest.param("attention", "group", {}, id="groups"),
    pytest.param("attention", "head", {}, id="heads"),
    pytest.param("attention", "head", {"add_bias_linear": True, "add_qkv_bias": True}, id="heads-bias"),
]
HALF = Fraction(1, 2)
MICRO_BATCHES = 2


def made(kind: str, gqa: str, extras: dict[str, Any]) -> Pair:
    pair = mlp_pair(**extras) if kind == "mlp" else attention_pair(**extras)
    attach(pair.sparse, omit="weight-gradient", gqa=gqa)
    return pair


def masks_of(pair: Pair, *, kind: str, gqa: str) -> Masks:
    """Of the step under way."""
    assert pair.sparse.selector is not None and pair.sparse.selector.choice is not None
    index, config = pair.sparse.selector.choice.index, pair.sparse.config
    return mlp_masks(index, config) if kind == "mlp" else attention_masks(index, config, gqa=gqa)


def masked(grads: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Without the omitted rows of the first layer and columns of the second; its bias belongs to no neuron."""
    first, second = ("linear_fc1.", "linear_qkv."), ("linear_fc2.weight", "linear_proj.weight")
    found = {}
    for name, grad in grads.items():
        rows = masks.rows if grad.dim() == 1 else masks.rows[:, None]
        found[name] = grad * rows if name.startswith(first) else grad * masks.columns if name in second else grad
    return found


def gathered(_: int, kind: str, gqa: str, extras: dict[str, Any]) -> tuple[Run, Run, Masks]:
    """Ours, the dense twin, what was kept."""
    layout()
    pair = made(kind, gqa, extras)
    with step(pair.sparse, rate=HALF):
        ours, masks = run(pair.sparse, pair.rest), masks_of(pair, kind=kind, gqa=gqa)
    return ours, run(pair.twin, pair.rest), masks


@pytest.mark.parametrize(("kind", "gqa", "extras"), CASES)
def test_output_and_input_gradient_are_dense_and_weight_gradients_those_of_what_is_kept(
    kind: str, gqa: str, extras: dict[str, Any]
) -> None:
    ours, dense, masks = run_ranks(gathered, 1, kind, gqa, extras)[0]
    assert_close(ours.output, dense.output)
    assert_close(ours.input_grad, dense.input_grad)
    assert_close(ours.grads, masked(dense.grads, masks))
    assert masks.rows.any() and not masks.rows.all()
    with pytest.raises(AssertionError):
        assert_close(ours.grads, dense.grads)


def packed(_: int, kind: str, gqa: str, uses: int) -> tuple[list[Run], Run, Masks, dict[str, Tensor]]:
    """Ours of two micro-batches, the dense twin's of one, what was kept, the sums in ``main_grad``."""
    layout()
    fused.install()
    pair = made(kind, gqa, {})
    linears = {f"{name}.weight": x for name, x in pair.sparse.named_modules() if x in pair.sparse.linear_pair()}
    for linear in linears.values():
        linear.gradient_accumulation_fusion = True
        linear.weight.main_grad = torch.zeros_like(linear.weight)
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=HALF, train_iters=1))
    with Controller([pair.sparse], schedule=schedule, interval=1).step(1, micro_batches=uses):
        ours = [run(pair.sparse, pair.rest) for _ in range(MICRO_BATCHES)]
        masks = masks_of(pair, kind=kind, gqa=gqa)
        buffers = [linear.packed_buffer for linear in linears.values()]
        assert all(buffer is not None and buffer.untyped_storage().nbytes() == 8 for buffer in buffers)  # no weight
    return ours, run(pair.twin, pair.rest), masks, {name: x.weight.main_grad for name, x in linears.items()}


@pytest.mark.parametrize(("kind", "gqa"), [("mlp", "group"), ("attention", "group"), ("attention", "head")])
def test_packed_gradients_add_up_where_the_weights_own_would_and_no_weight_is_copied(kind: str, gqa: str) -> None:
    ours, dense, masks, sums = run_ranks(packed, 1, kind, gqa, MICRO_BATCHES)[0]
    for each in ours:
        assert_close(each.output, dense.output)
        assert_close(each.input_grad, dense.input_grad)
    assert len(sums) == 2
    assert_close(sums, {name: MICRO_BATCHES * masked(dense.grads, masks)[name] for name in sums})
    *_, too_early = run_ranks(packed, 1, kind, gqa, MICRO_BATCHES + 1)[0]
    assert not any(torch.allclose(too_early[name], sums[name]) for name in sums)  # not yet where they belong


def frozen_or_whole(_: int, rate: Fraction, trains: bool) -> tuple[Run, Run]:
    layout()
    pair = made("mlp", "group", {})
    for module in (pair.sparse, pair.twin):
        module.requires_grad_(trains)
    with step(pair.sparse, rate=rate):
        return run(pair.sparse, pair.rest), run(pair.twin, pair.rest)


@pytest.mark.parametrize(("rate", "trains"), [(Fraction(0), True), (HALF, False)], ids=["rate-zero", "frozen"])
def test_rate_zero_and_weights_that_are_not_trained_are_megatrons_own_bit_for_bit(rate: Fraction, trains: bool) -> None:
    ours, dense = run_ranks(frozen_or_whole, 1, rate, trains)[0]
    assert ours.output.equal(dense.output) and ours.input_grad.equal(dense.input_grad)
    assert ours.grads.keys() == dense.grads.keys() and bool(ours.grads) == trains
    assert all(ours.grads[name].equal(grad) for name, grad in dense.grads.items())
