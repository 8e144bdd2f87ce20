"""EST against a dense model without the layers that sit out, whose output weights are those of what takes part, over
its share."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Linear, Module, Parameter
from torch.testing import assert_close

from megatron_sat.baselines.est import Est, layers_left_out
from megatron_sat.baselines.settings import EstConfig
from megatron_sat.layers.attach import attach_selectors
from megatron_sat.layers.passable import pass_by
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import SEQ, VOCAB, layout, tiny_chunks
from tests.helpers.tolerances import EXACT, FP32_SUMS

LAYERS, HEADS_PER_GROUP, HEAD = 4, 2, 8
STEPS, LAYERS_UNTIL, UNTIL = 5, 2, 4
RATE = Fraction(1, 2)
EST = EstConfig(layer_rate=Fraction(1, 2), layers_until=LAYERS_UNTIL, seed=3)
OUTPUTS = {"linear_proj.weight": ("attention", HEADS_PER_GROUP * HEAD), "linear_fc2.weight": ("mlp", 1)}
"""A layer's output weights: the kind of what they belong to, and the columns of one unit."""


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (2, SEQ + 1), generator=generator)
    return {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(SEQ).expand(2, -1),
        "attention_mask": torch.triu(torch.ones(1, 1, SEQ, SEQ), 1).bool(),
    }


def sparse_model() -> tuple[Any, Controller, Est]:
    (model,) = tiny_chunks(params_dtype=torch.float64)
    selection = SelectionConfig(importance="uniform", selection="sampling", rescale="inverse-keep", seed=3)
    attach_selectors([model], config=selection, layout=layout())
    schedule = build_schedule(
        ScheduleConfig(kind="ladder", omission_rate=RATE, start=UNTIL, rungs=1, train_iters=STEPS)
    )
    controller = Controller(sparse_modules([model]), schedule=schedule, interval=1)
    return model, controller, Est(controller.selectors, config=EST, num_layers=LAYERS)


def twin(step: int, kept: dict[str, list[int] | None], left_out: frozenset[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the dense model: masks and shares written into the weights, layers not called."""
    (model,) = tiny_chunks(params_dtype=torch.float64)
    takes_part = LAYERS - len(left_out)
    for layer in model.decoder.layers:  # type: ignore[union-attr]
        if layer.layer_number in left_out:
            layer.forward = lambda hidden_states, **_: (hidden_states, None)
    weights = dict(model.named_parameters())
    replaced = {}
    for name, weight in weights.items():
        kind, width = next((of for end, of in OUTPUTS.items() if name.endswith(end)), (None, 0))
        if kind is None:
            continue
        units = kept[f"{kind}.{int(name.split('.')[2]) + 1}"]
        columns = torch.zeros(weight.size(1), dtype=weight.dtype)
        for unit in range(weight.size(1) // width):
            if units is None or unit in units:
                columns[unit * width : (unit + 1) * width] = 1
        share = Fraction(int(columns.sum()), len(columns)) * Fraction(takes_part, LAYERS)
        replaced[name] = weight * columns / float(share)
    loss = functional_call(model, replaced, kwargs=batch(step)).mean()
    loss.backward()
    return loss.detach(), gradients_of(model)


def gradients_of(model: Module) -> dict[str, Tensor]:
    """A parameter without a gradient has one of zero."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def both(_: int) -> list[tuple[Any, Any, int]]:
    """Of each step, ours and the twin's loss and gradients, and how many layers' MLPs were called."""
    layout()
    model, controller, est = sparse_model()
    called, found = list[int](), []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: called.append(1))
    for step in range(1, STEPS + 1):
        est.begin_step(step)
        model.zero_grad()
        called.clear()
        with controller.step(step):
            loss = model(**batch(step)).mean()
            loss.backward()
            kept = {name: None if each is None else each.index.tolist() for name, each in controller.kept().items()}
        left_out = layers_left_out(step, config=EST, num_layers=LAYERS)
        found.append(((loss.detach(), gradients_of(model)), twin(step, kept, left_out), len(called)))
    return found


def test_a_step_is_that_of_a_dense_model_of_what_takes_part_over_its_share() -> None:
    (found,) = run_ranks(both, 1)
    for ours, expected, _ in found:
        assert_close(ours, expected)
    assert [called for _, _, called in found] == [2, 2, 4, 4, 4]
    weights = [name for name in found[0][0][1] if "linear" in name and "layers" in name]
    idle = [sum(not ours[1][name].any() for name in weights) for ours, _, _ in found]
    assert idle == [2 * 4, 2 * 4, 0, 0, 0]  # four matrices of each of two layers


def evaluated(_: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The first step's batch outside of a step, before it and after it; and how often what was kept in two steps."""
    layout()
    model, controller, est = sparse_model()
    with torch.no_grad():
        before = model(**batch(1))
    for step in (1, 2):
        est.begin_step(step)
        with controller.step(step):
            model(**batch(step))
    with torch.no_grad():
        after = model(**batch(1))
    return before, after, [selector.visits.tolist() for selector in controller.selectors]


def test_outside_a_step_every_layer_takes_part_and_visits_are_of_those_that_did() -> None:
    before, after, visits = run_ranks(evaluated, 1)[0]
    assert_close(before, after, **EXACT)
    sat_out = Counter(layer for step in (1, 2) for layer in layers_left_out(step, config=EST, num_layers=LAYERS))
    for layer in range(1, LAYERS + 1):
        attention, mlp = visits[2 * (layer - 1) : 2 * layer]
        assert sum(attention) == (2 - sat_out[layer]) * len(attention) / 2
        assert sum(mlp) == (2 - sat_out[layer]) * len(mlp) / 2
    assert len(set(sat_out.values())) > 1 or len(sat_out) < LAYERS  # other layers in the other step


def test_layers_are_drawn_anew_in_each_step_evenly_until_the_last_one() -> None:
    config = EstConfig(layer_rate=Fraction(2, 5), layers_until=2000, seed=0)
    drawn = [layers_left_out(step, config=config, num_layers=6) for step in range(1, 2001)]
    assert {len(each) for each in drawn} == {3}  # 6 (1 - 2/5) rounded down take part
    counts = Counter(layer for each in drawn for layer in each)
    assert sorted(counts) == [1, 2, 3, 4, 5, 6]
    assert max(abs(count - 1000) for count in counts.values()) < 4.5 * (2000 / 4) ** 0.5
    assert drawn == [layers_left_out(step, config=config, num_layers=6) for step in range(1, 2001)]
    assert not layers_left_out(2001, config=config, num_layers=6)
    other = EstConfig(layer_rate=Fraction(2, 5), layers_until=2000, seed=1)
    assert drawn != [layers_left_out(step, config=other, num_layers=6) for step in range(1, 2001)]


def test_one_layer_at_least_takes_part() -> None:
    config = EstConfig(layer_rate=Fraction(99, 100), layers_until=1, seed=0)
    assert config.kept(4, step=1) == 1 and config.kept(4, step=2) == 4


def test_weights_that_are_passed_by_have_a_gradient_of_zero() -> None:
    layer, hidden = Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    passed = pass_by(hidden, list(layer.parameters()))
    assert_close(passed, hidden, **EXACT)
    passed.square().sum().backward()
    assert hidden.grad is not None and layer.weight.grad is not None
    assert_close(hidden.grad, 2 * hidden.detach(), **FP32_SUMS)
    assert not layer.weight.grad.any()


def test_where_ddp_keeps_the_sum_it_is_told_that_it_is_there() -> None:
    weight: Any = Parameter(torch.ones(3))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(3), False
    told: list[bool] = []
    weight.register_post_accumulate_grad_hook(lambda p: told.append(p.grad_added_to_main_grad))
    pass_by(torch.ones(2, requires_grad=True), [weight]).sum().backward()
    assert told == [True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_rate": Fraction(1)}, r"--est-layer-rate must be in \[0, 1\), got 1; 0.5 is every second layer"),
        ({"layers_until": -1}, "--est-layers-until must be at least 0, got -1; 0 leaves none out"),
    ],
)
def test_a_setting_out_of_range_is_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EstConfig(**{"layer_rate": RATE, "layers_until": 1, "seed": 0, **changes})
