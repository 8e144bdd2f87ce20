"""Packed sums moved to their places within one buffer: by torch, and by the kernels for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sat.sparsity import unpack as by_kernels
from megatron_sat.sparsity.unpack import parts, unpack

ROOT = Path(__file__).parents[2]
SHAPES = [(24, 40), (33, 20)]
"""More than a block of the kernels as the interpreter takes them, in either direction."""
CASES = """
import torch
from megatron_sat.sparsity import unpack
from tests.sparsity.test_unpack import SHAPES, cases, expected, full_of

unpack.BLOCK = 16
moved = 0
for shape, dim, index in cases():
    full, packed = full_of(shape, index, dim=dim)
    by = unpack._rows_by_kernels if dim == 0 else unpack._columns_by_kernels
    by(full, index, kernels=unpack._kernels())
    assert full.equal(expected(shape, packed, index, dim=dim)), (shape, dim, index)
    moved += 1
print(moved)
"""


def cases() -> list[tuple[tuple[int, int], int, Tensor]]:
    """Shape, dim, index: few, half, most, all; sorted and not."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for shape in SHAPES:
        for dim in (0, 1):
            size = shape[dim]
            for count in (1, size // 4, size // 2, size - 3, size):
                index = torch.randperm(size, generator=generator)[:count]
                found += [(shape, dim, index), (shape, dim, index.sort().values)]
    return found


def full_of(shape: tuple[int, int], index: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """A buffer with packed numbers at its front, and these numbers."""
    packed = torch.randn((index.numel(), shape[1]) if dim == 0 else (shape[0], index.numel()))
    full = torch.zeros(shape)
    full.view(-1)[: packed.numel()] = packed.view(-1)
    return full, packed


def expected(shape: tuple[int, int], packed: Tensor, index: Tensor, *, dim: int) -> Tensor:
    """One row or column after the other."""
    full = torch.zeros(shape)
    for number, place in enumerate(index.tolist()):
        full.select(dim, place).copy_(packed.select(dim, number))
    return full


def test_each_row_or_column_goes_to_its_place_and_the_rest_is_zero() -> None:
    for shape, dim, index in cases():
        full, packed = full_of(shape, index, dim=dim)
        unpack(full, index, dim=dim)
        assert full.equal(expected(shape, packed, index, dim=dim))


def test_the_kernels_move_what_torch_moves() -> None:
    """On Triton's interpreter, which takes one program of a kernel after the other."""
    pytest.importorskip("triton", reason="comes with builds of torch for GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", CASES], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(len(cases()))]


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `unpack` goes on by torch."""
    monkeypatch.setattr(by_kernels, "find_spec", lambda name: None)
    by_kernels._kernels.cache_clear()
    assert by_kernels._kernels() is None
    by_kernels._kernels.cache_clear()


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_sat.sparsity import unpack_kernels as kernels

pointers = dict.fromkeys(("front", "aside", "full", "source"), "*fp32") | {"index": "*i64", "place": "*i32"}
for kernel in (kernels.rows_out, kernels.rows_in, kernels.columns):
    constants = {name: 64 for name in kernel.arg_names if name.isupper()}
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]) > 0)
"""


def test_the_kernels_compile_for_a_gpu_without_one() -> None:
    """The interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="comes with builds of torch for GPUs")
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True"] * 3


@pytest.mark.parametrize(("kept", "count"), [(1, 1), (250, 2), (500, 3), (750, 3), (880, 0), (1000, 0)])
def test_no_part_goes_where_something_is_still_packed(kept: int, count: int) -> None:
    """Every element of a part is written behind the last that is still to be read, of this part or of the rest."""
    last, width, found = 1000, 1000, list(parts(1000, kept=kept, width=1000))
    assert len(found) == count
    for first in found:
        assert first < last
        assert first * width >= last * kept
        last = first


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_moves_what_a_cpu_moves(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    large = [((3000, 5000), dim, torch.randperm((3000, 5000)[dim], generator=generator)[:1500]) for dim in (0, 1)]
    for shape, dim, index in cases() + large:
        full = full_of(shape, index, dim=dim)[0].to(dtype)
        on_gpu = full.cuda()
        unpack(full, index, dim=dim)
        unpack(on_gpu, index.cuda(), dim=dim)
        assert on_gpu.cpu().equal(full)
