"""Where an optimizer has a parameter: at every stage the replicas together have each element once, in its place."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.shards import whole_shape, whole_weight
from tests.helpers.plain_engine import train
from tests.helpers.ranks import run_ranks
from tests.helpers.zero_engine import load_library, make_zero_engine, needs_deepspeed, zero_weights

pytestmark = needs_deepspeed
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    load_library()


def stretches(rank: int, stage: int, model: dict[str, Any]) -> dict[str, Any]:
    """By name: (start, elements) of this rank's stretch, and the whole weight."""
    engine, layout = make_zero_engine(stage, model=model)
    train(engine, layout, steps=range(1))  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    whole = zero_weights(engine)
    for name, parameter in engine.chunks[0].named_parameters():
        assert whole_shape(parameter) == whole[f"0.{name}"].shape
        assert torch.equal(whole_weight(parameter.data if stage < 3 else parameter), whole[f"0.{name}"])
        stretch = engine._find(parameter)
        part = None if stretch is None else (stretch.start, stretch.of(stretch.main).clone())
        found[name] = (part, whole[f"0.{name}"])
    return found


@pytest.mark.parametrize(
    ("stage", "model"),
    [(1, {}), (2, {}), (3, {}), (1, BF16), pytest.param(3, BF16, marks=pytest.mark.slow)],
)
def test_the_replicas_have_every_element_once_and_in_its_place(stage: int, model: dict[str, Any]) -> None:
    ranks = run_ranks(stretches, 2, stage, model)
    for name, (_, weight) in ranks[0].items():
        put: Tensor = torch.full((weight.numel(),), torch.nan)
        for one in ranks:
            if one[name][0] is not None:
                start, values = one[name][0]
                assert put[start : start + len(values)].isnan().all()
                put[start : start + len(values)] = values
        assert torch.equal(put.view(weight.shape).to(weight.dtype), weight), name
    cut = [name for name in ranks[0] if all(one[name][0] is not None for one in ranks)]
    assert cut, "some parameter lies on both"
