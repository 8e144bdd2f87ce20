"""A packed weight against its slow twin: cut once or cut every time, the same outputs and the same gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.sparsity.compact import Pack
from megatron_sat.sparsity.gather import keep_columns, keep_rows

INDEX = torch.tensor([0, 2, 3, 6])
CUTS = {0: keep_rows, 1: keep_columns}


class AddsItself(torch.autograd.Function):
    """A linear layer that adds its weight gradient into ``main_grad`` and hands back a dummy, as Megatron's does."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        weight.main_grad.add_(grads[0].t() @ inputs)
        weight.grad_added_to_main_grad = True
        return grads[0] @ weight, torch.full_like(weight, torch.nan)  # never to be read


def weight_with_buffer() -> Parameter:
    weight = Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    weight.main_grad = torch.zeros(8, 8)
    weight.grad_added_to_main_grad = False
    return weight


def micro_batches(dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    width = 8 if dim == 0 else len(INDEX)
    return [torch.randn(5, width, generator=generator).requires_grad_() for _ in range(3)]


def packed(dim: int, *, uses: int = 3) -> tuple[Parameter, list[Tensor], list[Tensor]]:
    """The weight after three micro-batches through a pack, their outputs and their input gradients."""
    weight, inputs = weight_with_buffer(), micro_batches(dim)
    pack = Pack(weight, INDEX, dim=dim, uses=uses)
    outputs = []
    for tokens in inputs:
        outputs.append(AddsItself.apply(tokens, pack.use()))
        outputs[-1].square().sum().backward()
    return weight, outputs, [tokens.grad for tokens in inputs]


def gathered(dim: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same through `gather`: the weight's gradient, outputs, input gradients."""
    weight, inputs = weight_with_buffer(), micro_batches(dim)
    outputs = []
    for tokens in inputs:
        outputs.append(tokens @ CUTS[dim](weight, INDEX).t())
        outputs[-1].square().sum().backward()
    return weight.grad, outputs, [tokens.grad for tokens in inputs]


@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_and_input_gradients_are_those_of_the_gather(dim: int) -> None:
    _, outputs, gradients = packed(dim)
    _, expected_outputs, expected_gradients = gathered(dim)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs, strict=True))
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("dim", [0, 1])
def test_after_the_last_use_the_buffer_holds_the_dense_gradient(dim: int) -> None:
    weight, _, _ = packed(dim)
    expected, _, _ = gathered(dim)
    torch.testing.assert_close(weight.main_grad, expected)
    omitted = torch.ones(8, dtype=torch.bool).index_fill(0, INDEX, False).nonzero()[:, 0]
    assert not weight.main_grad.index_select(dim, omitted).any()


@pytest.mark.parametrize("dim", [0, 1])
def test_before_the_last_use_the_sums_are_not_in_their_place(dim: int) -> None:
    weight, _, _ = packed(dim, uses=4)
    expected, _, _ = gathered(dim)
    assert not torch.allclose(weight.main_grad, expected)


def test_every_use_says_that_the_gradient_has_been_added() -> None:
    weight, _, _ = packed(0)
    assert weight.grad_added_to_main_grad


def test_a_look_without_gradients_counts_as_no_use() -> None:
    weight = weight_with_buffer()
    pack = Pack(weight, INDEX, dim=0, uses=1)
    with torch.no_grad():
        assert torch.equal(pack.use(), weight.detach()[INDEX])
    tokens = torch.ones(1, 8)
    AddsItself.apply(tokens, pack.use()).sum().backward()
    assert torch.equal(weight.main_grad[INDEX], torch.ones(4, 8))


def test_a_pack_that_is_used_up_is_not_used_again() -> None:
    weight = weight_with_buffer()
    pack = Pack(weight, INDEX, dim=0, uses=1)
    AddsItself.apply(torch.ones(1, 8), pack.use()).sum().backward()
    with pytest.raises(AssertionError):
        pack.use()


def test_a_weight_without_a_gradient_buffer_cannot_be_packed() -> None:
    with pytest.raises(AssertionError, match="main_grad"):
        Pack(Parameter(torch.zeros(8, 8)), INDEX, dim=0, uses=1)
