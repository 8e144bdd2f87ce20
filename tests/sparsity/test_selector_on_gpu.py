"""A selector on a GPU: it chooses what a CPU chooses, and the host never waits for the choice."""

from fractions import Fraction

import pytest
import torch

from megatron_sat.sparsity.controller import Controller
from megatron_sat.sparsity.importance import METRICS
from tests.helpers.choosing import HALF, SmallModule, tokens_of

pytestmark = pytest.mark.gpu

KINDS: list[tuple[str, str]] = [("mlp", "group"), ("attention", "group"), ("attention", "head")]
"""(kind, gqa)"""


class Constant:
    """A half, for five steps."""

    last_step = 5

    def rate(self, step: int) -> Fraction:
        return HALF


def run_steps(module: SmallModule, device: str) -> list[list[int]]:
    """What the module keeps in each of five steps."""
    controller, chosen = Controller([module], schedule=Constant(), interval=2), []
    for step in range(1, 6):
        with controller.step(step):
            chosen.append(module.forward(tokens_of(step).to(device)) or [])
    return chosen


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
@pytest.mark.parametrize("importance", METRICS)
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_a_gpu_chooses_and_counts_what_a_cpu_chooses_and_counts(kind, gqa, importance, statistics):
    settings = {"gqa": gqa, "importance": importance, "statistics": statistics}
    on_cpu, on_gpu = (SmallModule(kind, device=device, **settings) for device in ("cpu", "cuda"))

    assert run_steps(on_gpu, "cuda") == run_steps(on_cpu, "cpu")
    states = [module.chooser.state() for module in (on_gpu, on_cpu)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("kept", "visits", "chosen"))


def test_a_state_moves_from_gpu_to_cpu_and_back():
    saved, resumed = SmallModule(device="cuda"), SmallModule(device="cuda")
    run_steps(saved, "cuda")
    resumed.chooser.load_state(saved.chooser.state())

    assert all(tensor.device.type == "cpu" for tensor in saved.chooser.state().values())
    assert torch.equal(resumed.chooser.visits, saved.chooser.visits)
    assert resumed.chooser.visits.device.type == "cuda"


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
@pytest.mark.parametrize("importance", METRICS)
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_no_step_makes_the_host_wait_for_the_gpu(kind, gqa, importance, statistics):
    module = SmallModule(kind, gqa=gqa, importance=importance, statistics=statistics, device="cuda")
    controller = Controller([module], schedule=Constant(), interval=1)
    tokens = [tokens_of(step).cuda() for step in range(1, 6)]
    run_steps(module, "cuda")  # the visits move to the GPU once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, micro_batch in enumerate(tokens, 1):
            with controller.step(step):
                module.kept(micro_batch)
                assert len(list(controller.omitted_entries())) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
