"""Which optional libraries are found, with modules of their names put in place."""

import sys
from types import ModuleType

import pytest
import torch

from megatron_sat.layers import available


def put(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """A module of this name, and the packages it lies in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        if module.__name__ not in sys.modules or end == len(parts):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[name].__dict__.update(contents)


def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn", __version__="2.8.3", flash_attn_func=max)
    put(monkeypatch, "transformer_engine", __version__="2.9.0")
    put(monkeypatch, "transformer_engine.pytorch", RMSNorm=torch.nn.Linear, LayerNorm=torch.nn.Bilinear)
    put(monkeypatch, "apex", __version__="0.1")
    put(
        monkeypatch,
        "apex.normalization.fused_layer_norm",
        fused_rms_norm_affine=min,
        fused_layer_norm_affine=sum,
    )
    put(monkeypatch, "fused_layer_norm_cuda")
    put(monkeypatch, "fused_weight_gradient_mlp_cuda")


def found(*, cuda: bool) -> list[object]:
    return [
        available.flash_attention(cuda=cuda),
        available.transformer_engine_norm(cuda=cuda),
        available.transformer_engine_norm(cuda=cuda, kind="LayerNorm"),
        available.apex_rms_norm(cuda=cuda),
        available.apex_layer_norm(cuda=cuda),
        available.fused_gradient_accumulation(cuda=cuda),
    ]


def test_each_library_gives_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    everything(monkeypatch)
    assert found(cuda=True) == [max, torch.nn.Linear, torch.nn.Bilinear, min, sum, True]


def test_without_a_gpu_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    everything(monkeypatch)
    assert found(cuda=False) == [None, None, None, None, None, False]


def test_what_is_not_installed_is_not_found() -> None:
    assert found(cuda=True) == [None, None, None, None, None, False]


def test_apex_without_its_extension_has_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=min)
    assert available.apex_rms_norm(cuda=True) is None


@pytest.mark.parametrize(
    "version, usable", [("2.0.9", False), ("2.1.0", True), ("2.7.4.post1", True), ("3.0.0b1", True)]
)
def test_flash_attention_counts_from_the_version_that_aligns_its_mask_to_the_lower_right(
    monkeypatch: pytest.MonkeyPatch, version: str, usable: bool
) -> None:
    put(monkeypatch, "flash_attn", __version__=version, flash_attn_func=max)
    assert (available.flash_attention(cuda=True) is max) == usable


def test_a_flash_attn_package_without_the_function_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn")
    assert available.flash_attention(cuda=True) is None


def test_a_library_that_is_installed_but_broken_is_reported_and_left_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("megatron_sat.log._warned", set())
    with pytest.warns(UserWarning, match="flash_attn is installed but flash_attn cannot be imported"):
        assert available.flash_attention(cuda=True) is None


def in_use(*, cuda: bool = True, dtype: torch.dtype = torch.bfloat16, fusion: bool = True) -> str:
    return available.in_use(
        cuda=cuda, dtype=dtype, gradient_accumulation_fusion=fusion, optimizer="optimizer: torch's AdamW"
    )


def test_one_line_says_that_torch_does_it_all() -> None:
    torch_is = f"torch {torch.__version__}"
    assert in_use(fusion=False) == (
        f"attention: {torch_is} SDPA; norm: {torch_is}; optimizer: torch's AdamW; gradient accumulation: not fused"
    )


def test_one_line_says_what_the_libraries_do(monkeypatch: pytest.MonkeyPatch) -> None:
    everything(monkeypatch)
    assert in_use() == (
        "attention: flash-attn 2.8.3; norm: Transformer Engine 2.9.0; optimizer: torch's AdamW; "
        "gradient accumulation: fused (apex)"
    )


def test_flash_attention_is_not_said_to_compute_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    everything(monkeypatch)
    assert "SDPA" in in_use(dtype=torch.float32)


def test_apex_is_named_where_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=min)
    put(monkeypatch, "fused_layer_norm_cuda")
    assert "norm: apex;" in in_use()


@pytest.mark.parametrize(
    ("cuda", "fusion", "how"),
    [(True, False, "not fused"), (False, True, "fused (torch)"), (True, True, "fused (apex)")],
)
def test_gradient_accumulation_is_fused_where_asked_for_by_whoever_can(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, fusion: bool, how: str
) -> None:
    everything(monkeypatch)
    assert f"gradient accumulation: {how}" in in_use(cuda=cuda, fusion=fusion)
