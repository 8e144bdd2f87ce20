"""Omission in the backward alone: the dense module's output, the kept neurons' gradient."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout
from tests.layers.twins import (
    Run,
    attach,
    attention_masks,
    attention_pair,
    mlp_masks,
    mlp_pair,
    run,
    run_twin,
    step,
)

CASES = [
    pytest.param("mlp", "group", {}, id="mlp"),
    pytest.param("mlp", "group", {"add_bias_linear": True}, id="mlp-bias"),
    pytest.param("attention", "group", {}, id="groups"),
    pytest.param("attention", "head", {}, id="heads"),
    pytest.param("attention", "head", {"add_bias_linear": True, "add_qkv_bias": True}, id="heads-bias"),
]


def three(_: int, kind: str, gqa: str, extras: dict[str, Any]) -> tuple[Run, Run, Run]:
    """Ours, the dense twin, the twin whose omitted neurons are silent."""
    layout()
    pair = mlp_pair(**extras) if kind == "mlp" else attention_pair(**extras)
    selector = attach(pair.sparse, omit="backward", gqa=gqa)
    with step(pair.sparse, rate=Fraction(1, 2)):
        ours = run(pair.sparse, pair.rest)
        assert selector.choice is not None
        index = selector.choice.index
    config = pair.sparse.config
    masks = mlp_masks(index, config) if kind == "mlp" else attention_masks(index, config, gqa=gqa)
    dense = run(pair.twin, pair.rest)
    weight = "linear_fc2.weight" if kind == "mlp" else "linear_proj.weight"
    return ours, dense, run_twin(pair, masks, row_weight=weight)


@pytest.mark.parametrize(("kind", "gqa", "extras"), CASES)
def test_the_output_is_the_dense_one_and_the_gradient_that_of_what_is_kept(
    kind: str, gqa: str, extras: dict[str, Any]
) -> None:
    ours, dense, silent = run_ranks(three, 1, kind, gqa, extras)[0]
    assert_close(ours.output, dense.output)
    assert_close(ours.input_grad, silent.input_grad)
    assert_close(ours.grads, silent.grads)
    assert not torch.allclose(ours.output, silent.output)
    assert not torch.allclose(ours.input_grad, dense.input_grad)


def at_rate_zero(_: int) -> bool:
    layout()
    pair = mlp_pair()
    attach(pair.sparse, omit="backward")
    with step(pair.sparse, rate=Fraction(0)):
        ours = run(pair.sparse, pair.rest)
    dense = run(pair.twin, pair.rest)
    return ours.output.equal(dense.output) and ours.input_grad.equal(dense.input_grad)


def test_rate_zero_is_dense_bit_for_bit() -> None:
    assert run_ranks(at_rate_zero, 1)[0]
