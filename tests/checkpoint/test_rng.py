"""Random states as tensors, also of a tracker made for CUDA graphs."""

import pytest
import torch

from megatron_sat.checkpoint import rng
from megatron_sat.distributed import initialize_model_parallel
from tests.helpers.ranks import run_ranks


class GraphTracker:
    """Keeps generators where the usual tracker keeps states."""

    def __init__(self) -> None:
        self.states = {"model-parallel-rng": torch.Generator().manual_seed(7)}

    def get_states(self) -> dict[str, torch.Generator]:
        return self.states

    def set_states(self, states: dict[str, torch.Generator]) -> None:
        self.states = states


def test_generators_of_a_graph_tracker_go_on_where_they_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = GraphTracker()
    monkeypatch.setattr(rng.tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    generator = tracker.states["model-parallel-rng"]
    torch.rand(3, generator=generator)
    saved = {name: state.clone() for name, state in rng.gather().items()}
    want = torch.rand(5, generator=generator)
    rng.restore(saved)
    assert torch.equal(torch.rand(5, generator=generator), want)


def fitting(rank: int) -> list[bool]:
    layout = initialize_model_parallel(tp=2, pp=1, cp=1, virtual_pp=None, seed=3)
    states = rng.gather()
    length = {name: len(state) for name, state in states.items()}
    saved = {name: (1, 2, size) for name, size in length.items()} | {"decoder.weight": (4, 4)}
    one_missing = dict(list(saved.items())[1:])
    another_device = {**saved, f"{rng.PREFIX}device": (1, 2, 16)}
    another_grid = {name: (2, 1, size) for name, size in length.items()}
    all_of_them = (saved, one_missing, another_device, another_grid)
    return [rng.fits(states, saved=shapes, layout=layout) for shapes in all_of_them]


def test_states_fit_the_same_grid_the_same_device_and_the_same_generators() -> None:
    assert run_ranks(fitting, 2) == [[True, False, False, False]] * 2
