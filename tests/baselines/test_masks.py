"""Masks of matrices in Megatron's fused parameters, and their way through a checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.baselines.course import NoCourse
from megatron_sat.baselines.masks import Masks, packed, unpacked
from megatron_sat.baselines.matrices import find_matrices
from megatron_sat.distributed import initialize_model_parallel
from tests.helpers.masked_twin import split
from tests.helpers.plain_gpt import make_chunks, make_config
from tests.helpers.ranks import run_ranks

NAMES = ["q", "k", "v", "proj", "gate", "up", "down"]


def of_model(*, tp: int = 1, **changes: Any) -> tuple[list[torch.nn.Module], Masks]:
    layout = initialize_model_parallel(tp=tp, pp=1, cp=1, virtual_pp=None, seed=1234)
    chunks = make_chunks(make_config(**changes))
    return chunks, Masks(find_matrices(chunks, group=layout.tp_group))


def wholes(_: int, tp: int) -> dict[str, Tensor]:
    _, masks = of_model(tp=tp)
    return {matrix.key: matrix.whole(matrix.parameter) for matrix in masks.matrices}


def views(_: int) -> dict[str, Tensor]:
    """The same by views of the fused parameters of one process."""
    ((chunk,), _) = of_model()
    found = {}
    for name, parameter in chunk.named_parameters():
        for part, view in split(name, parameter.detach()).items() if "layers" in name else ():
            found[f"{int(name.split('.')[2]) + 1}.{part}"] = view.reshape(-1, parameter.shape[1]).clone()
    return found


def test_each_matrix_is_found_whole_at_any_tensor_parallel_size() -> None:
    (alone,), expected = run_ranks(wholes, 1, 1), run_ranks(views, 1)[0]
    assert list(alone) == [f"{layer}.{name}" for layer in (1, 2, 3, 4) for name in NAMES]
    assert alone.keys() == expected.keys()
    for found in (alone, *run_ranks(wholes, 2, 2)):
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def ungated(_: int) -> dict[str, tuple[int, int]]:
    _, masks = of_model(gated_linear_unit=False)
    return {matrix.key: matrix.shape for matrix in masks.matrices if matrix.layer == 1}


def test_without_a_gate_the_first_matrix_of_an_mlp_is_one() -> None:
    shapes = run_ranks(ungated, 1)[0]
    assert (shapes["1.fc1"], shapes["1.down"]) == ((48, 32), (32, 48))
    assert not {"1.gate", "1.up"} & shapes.keys()


def through_a_checkpoint(_: int, saved: dict[str, Tensor] | None, tp: int) -> tuple[dict[str, Tensor], bool]:
    """Masks by a rule, or those saved; what a checkpoint gets of them."""
    _, masks = of_model(tp=tp)
    loaded = False
    if saved is None:
        for number, matrix in enumerate(masks.matrices):
            generator = torch.Generator().manual_seed(number)
            masks.set(matrix, torch.rand(matrix.shape, generator=generator) < 0.3)
    else:
        loaded = masks.load(saved)
    return masks.state(), loaded


def test_masks_are_the_same_after_a_checkpoint_in_another_layout() -> None:
    ((saved, _),) = run_ranks(through_a_checkpoint, 1, None, 1)
    assert 0.25 < torch.cat([unpacked(bits, shape=(bits.numel(), 8)).float() for bits in saved.values()]).mean() < 0.35
    for again, loaded in run_ranks(through_a_checkpoint, 2, saved, 2):
        assert loaded
        assert {name: bits.tolist() for name, bits in again.items()} == {n: b.tolist() for n, b in saved.items()}


def test_a_checkpoint_without_masks_leaves_all_taking_part() -> None:
    ((state, loaded),) = run_ranks(through_a_checkpoint, 1, {"sat.mlp.1.kept": torch.zeros(3)}, 1)
    assert not loaded
    assert all((bits == 255).all() for bits in state.values())


@pytest.mark.parametrize("damage", ["a matrix is missing", "another size"])
def test_masks_of_another_model_are_refused(damage: str) -> None:
    ((saved, _),) = run_ranks(through_a_checkpoint, 1, None, 1)
    bits = saved.pop("sat.mask.2.up")
    if damage == "another size":
        saved["sat.mask.2.up"] = bits[1:]
    said = r"masks must be of this model, that of matrix 2.up is not \(48 x 32 weights\); resume with the model of the"
    with pytest.raises(RuntimeError, match=said):
        run_ranks(through_a_checkpoint, 1, saved, 1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8)])
def test_bits_are_unpacked_as_they_were_packed(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = packed(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, shape=shape), mask)
    assert packed(torch.tensor([True, False, True])).tolist() == [5]


def test_a_run_without_a_baseline_has_nothing_to_carry() -> None:
    course = NoCourse()
    course.restore({})
    course.start(1)
    course.begin_step(1)
    assert course.state() == {}
