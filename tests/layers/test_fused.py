"""Weight gradients added in the product: torch's stand-in for apex' kernel, in every precision it may meet."""

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_sat.layers import fused


@pytest.mark.parametrize(
    ("factors", "sums"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_it_adds_the_product_to_what_is_there(factors: torch.dtype, sums: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, grad_output = (torch.randn(6, n, generator=generator).to(factors) for n in (4, 3))
    main_grad = torch.randn(3, 4, generator=generator).to(sums)
    expected = main_grad.float() + grad_output.float().t() @ inputs.float()
    buffer = main_grad
    fused.add_weight_gradient(inputs, grad_output, main_grad)
    tolerance = 1e-6 if factors == torch.float32 else 3e-2
    torch.testing.assert_close(buffer.float(), expected, atol=tolerance, rtol=tolerance)


def test_installed_once_it_serves_megatrons_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    assert fused.install() and fused.install()
    assert layers._grad_accum_fusion_available
    assert layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is fused.add_weight_gradient


def test_apex_own_kernel_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = type("Apex", (), {"wgrad_gemm_accum_fp32": staticmethod(lambda *args: None)})
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    assert not fused.install()
    assert layers.fused_weight_gradient_mlp_cuda is kernel
