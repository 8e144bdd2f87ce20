"""The two linear layers cut to some rows or columns, against products with a weight that indexing cut."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_config

ROWS = torch.tensor([0, 3, 4, 9])


def column(**options: Any) -> SparseColumnParallelLinear:
    """[s, b, 8] -> [s, b, 10] with random weight and bias, in float64."""
    config = tiny_config(params_dtype=torch.float64)
    assert config.init_method is not None
    layer = SparseColumnParallelLinear(
        8,
        10,
        config=config,
        init_method=config.init_method,
        bias=True,
        gather_output=False,
        **{"skip_bias_add": False, **options},
    )
    torch.nn.init.normal_(layer.bias)
    return layer


def row(**options: Any) -> SparseRowParallelLinear:
    """[s, b, 10] -> [s, b, 8]."""
    config = tiny_config(params_dtype=torch.float64)
    assert config.init_method is not None
    return SparseRowParallelLinear(
        10,
        8,
        config=config,
        init_method=config.init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        **options,
    )


def tokens(width: int) -> Tensor:
    return torch.randn(5, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def run_column(_: int, rows: Tensor | None, skip_bias_add: bool) -> dict[str, Any]:
    """Output, bias that came back, weights and gradients of the sum of the squared output."""
    layout()
    layer = column(skip_bias_add=skip_bias_add)
    layer.rows = rows
    output, bias = layer(tokens(8))
    total = output if bias is None else output + bias
    total.square().sum().backward()
    return {"output": total, "weight": layer.weight, "bias": layer.bias} | {
        "weight_grad": layer.weight.grad,
        "bias_grad": layer.bias.grad,
    }


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_kept_rows_give_their_columns_of_the_dense_output(skip_bias_add: bool) -> None:
    cut = run_ranks(run_column, 1, ROWS, skip_bias_add)[0]
    dense = tokens(8) @ cut["weight"].T + cut["bias"]
    assert_close(cut["output"], dense[..., ROWS])


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_gradients_of_kept_rows_are_the_dense_ones_and_the_others_exactly_zero(skip_bias_add: bool) -> None:
    cut = run_ranks(run_column, 1, ROWS, skip_bias_add)[0]
    weight, bias = (cut[name].detach().requires_grad_() for name in ("weight", "bias"))
    (tokens(8) @ weight.T + bias)[..., ROWS].square().sum().backward()
    assert_close(cut["weight_grad"], weight.grad)
    assert_close(cut["bias_grad"], bias.grad)
    omitted = [i for i in range(10) if i not in ROWS]
    assert not cut["weight_grad"][omitted].any() and not cut["bias_grad"][omitted].any()


def test_other_rows_give_another_output() -> None:
    cut = run_ranks(run_column, 1, ROWS, False)[0]
    dense = tokens(8) @ cut["weight"].T + cut["bias"]
    with pytest.raises(AssertionError):
        assert_close(cut["output"], dense[..., ROWS + 0 * ROWS + torch.tensor([1, 0, 0, 0])])


def run_row(_: int, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Output, weight, bias, gradient of the weight, and what the observer saw."""
    layout()
    layer = row()
    layer.columns = columns
    seen: list[Tensor] = []
    layer.observe = seen.append
    output, _ = layer(tokens(10 if columns is None else columns.numel()))
    output.square().sum().backward()
    assert layer.weight.grad is not None
    return output, layer.weight, layer.bias, layer.weight.grad, seen


def test_kept_columns_take_their_part_of_the_input() -> None:
    output, weight, bias, grad, _ = run_ranks(run_row, 1, ROWS)[0]
    twin = weight.detach().requires_grad_()
    dense = tokens(4) @ twin[:, ROWS].T + bias.detach()
    dense.square().sum().backward()
    assert_close(output, dense)
    assert_close(grad, twin.grad)
    assert not grad[:, [i for i in range(10) if i not in ROWS]].any()


def test_an_observer_sees_the_input_as_it_is() -> None:
    *_, seen = run_ranks(run_row, 1, None)[0]
    assert [torch.equal(one, tokens(10)) for one in seen] == [True]


def fused(_: int, cut: bool) -> list[bool]:
    """Whether each layer asks Megatron for the fused weight-gradient kernel (which a CPU has not)."""
    layout()
    asked: list[bool] = []
    for layer in (column(), row()):
        layer.gradient_accumulation_fusion = True
        width = layer.weight.size(1)
        if cut:
            layer.rows = layer.columns = ROWS
            width = ROWS.numel() if isinstance(layer, SparseRowParallelLinear) else width

        def multiply(_, input, weight, **kwargs):
            asked.append(kwargs["gradient_accumulation_fusion"])
            return input @ weight.T

        with patch.object(type(layer).__mro__[2], "_forward_impl", multiply):
            layer(tokens(width))
    return asked


def test_a_cut_weight_leaves_the_fused_gradient_kernel_alone_and_a_whole_one_uses_it() -> None:
    assert run_ranks(fused, 1, True)[0] == [False, False]
    assert run_ranks(fused, 1, False)[0] == [True, True]
