"""A cut weight against a dense one with zeros in it, forward and backward."""

import pytest
import torch

from megatron_sat.sparsity.gather import keep_columns, keep_place, keep_rows, learn_rows
from tests.helpers.reference import zeroed
from tests.helpers.tolerances import EXACT, FP32_SUMS

INDEX = torch.tensor([0, 2, 3, 6])
OMITTED = torch.tensor([1, 4, 5])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def gradient_of(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def test_kept_rows_compute_what_a_dense_weight_with_zeroed_rows_computes():
    weight, tokens, seed = random(7, 5), random(9, 5), random(9, 4)
    cut = tokens @ keep_rows(weight, INDEX).T
    dense = tokens @ zeroed(weight, INDEX, dim=0).T

    torch.testing.assert_close(cut, dense[:, INDEX], **FP32_SUMS)
    assert torch.count_nonzero(dense[:, OMITTED]) == 0
    ours = gradient_of((cut * seed).sum(), weight, tokens)
    twins = gradient_of((dense[:, INDEX] * seed).sum(), weight, tokens)
    torch.testing.assert_close(ours, twins, **FP32_SUMS)


def test_kept_columns_compute_what_a_dense_weight_with_zeroed_columns_computes():
    weight, tokens = random(5, 7), random(9, 7)
    cut = tokens[:, INDEX] @ keep_columns(weight, INDEX).T
    dense = tokens @ zeroed(weight, INDEX, dim=1).T

    torch.testing.assert_close(cut, dense, **FP32_SUMS)
    ours, twins = (gradient_of(out.square().sum(), weight, tokens) for out in (cut, dense))
    torch.testing.assert_close(ours, twins, **FP32_SUMS)


def test_a_twin_with_other_rows_zeroed_is_told_apart():
    weight, tokens = random(7, 5), random(9, 5)
    cut = tokens @ keep_rows(weight, INDEX).T
    dense = tokens @ zeroed(weight, torch.tensor([0, 2, 3, 5]), dim=0).T

    assert not torch.allclose(cut, dense[:, INDEX], **FP32_SUMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keep", "dim"), [(keep_rows, 0), (keep_columns, 1)])
def test_the_cut_and_its_gradient_are_those_of_index_select_bit_for_bit(keep, dim, dtype):
    weight = random(7, 7, dtype=dtype)
    cut, twin = keep(weight, INDEX), weight.index_select(dim, INDEX)
    seed = torch.randn(cut.shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    torch.testing.assert_close(cut, twin, **EXACT)
    (ours,), (theirs,) = (gradient_of((out * seed).sum(), weight) for out in (cut, twin))
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert (ours.dtype, ours.shape) == (dtype, weight.shape)


@pytest.mark.parametrize(("keep", "dim"), [(keep_rows, 0), (keep_columns, 1)])
def test_omitted_entries_get_exactly_zero_gradient_and_kept_ones_do_not(keep, dim):
    weight = random(7, 7)
    (gradient,) = gradient_of(keep(weight, INDEX).exp().sum(), weight)

    assert torch.count_nonzero(gradient.index_select(dim, OMITTED)) == 0
    assert torch.count_nonzero(gradient.index_select(dim, INDEX)) == 4 * 7


def test_gradients_of_two_uses_of_one_weight_add_up():
    weight = random(7, 3)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([2, 6])
    (gradient,) = gradient_of(keep_rows(weight, first).sum() + keep_rows(weight, second).sum(), weight)

    assert gradient[:, 0].tolist() == [1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 1.0]


def test_a_bias_is_cut_like_rows():
    bias = random(7)
    (gradient,) = gradient_of((keep_rows(bias, INDEX) * torch.tensor([1.0, 2, 3, 4])).sum(), bias)

    assert gradient.tolist() == [1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("keep", [keep_rows, keep_columns])
def test_gradients_agree_with_finite_differences(keep):
    weight = random(7, 7, dtype=torch.float64).detach().requires_grad_()

    assert torch.autograd.gradcheck(lambda w: keep(w, INDEX).sin(), (weight,))


@pytest.mark.parametrize(("keep", "dim"), [(keep_rows, 0), (keep_columns, 1)])
def test_the_cut_is_a_copy_and_not_a_view(keep, dim):
    weight = random(7, 7).detach()
    cut = keep(weight, INDEX)
    before = cut.clone()
    weight.zero_()

    torch.testing.assert_close(cut, before, **EXACT)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_place_has_the_shape_of_what_is_kept_no_memory_and_the_same_way_back(dim):
    weight, seed = random(7, 7), random(4, 7) if dim == 0 else random(7, 4)
    place, cut = keep_place(weight, INDEX, dim=dim), (keep_rows, keep_columns)[dim](weight, INDEX)

    assert place.shape == cut.shape and place.untyped_storage().nbytes() == weight.element_size()
    ours, theirs = (torch.autograd.grad(out, weight, seed.detach())[0] for out in (place, cut))
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("shape", [(7,), (7, 3)])
def test_rows_that_learn_are_computed_with_all_and_alone_get_a_gradient(shape):
    weight, seed = random(*shape), random(*shape).detach()
    learning = learn_rows(weight, INDEX)
    (gradient,) = torch.autograd.grad(learning.exp(), weight, seed)
    (dense,) = torch.autograd.grad(weight.exp(), weight, seed)

    assert learning.equal(weight)
    torch.testing.assert_close(gradient, zeroed(dense, INDEX, dim=0), **EXACT)
    assert torch.count_nonzero(dense[OMITTED]) == 3 * dense[0].numel()
