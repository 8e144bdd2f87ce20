"""Lines copied aside and written back: by torch, and by the kernel for a GPU, against one line after the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sat.aside.copies import Copies
from megatron_sat.aside.lines import Lines, lines_of
from megatron_sat.aside.table import _entry

ROOT = Path(__file__).parents[2]


def matrices(device: str = "cpu") -> list[Tensor]:
    """By shape, stride and dtype; with infinities, NaNs of odd bits and minus zero among their numbers."""
    found: list[Tensor] = []
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        for shape in ((5, 40), (33, 7), (50,)):
            limit = torch.iinfo(bits)
            found.append(torch.randint(limit.min, limit.max, shape, dtype=bits).view(dtype))
        found.append(found[-2].t().contiguous().t())  # as columns
    return [one.to(device) for one in found]


def lines_in(tensors: list[Tensor]) -> list[Lines]:
    """Of each matrix rows and columns that no other names, and a rectangle behind the start of the vectors."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for tensor in tensors:
        for dim, share in ((0, 2), (1, 3)) if tensor.dim() == 2 else ((0, 2),):
            size = tensor.shape[dim]
            index = torch.randperm(size, generator=generator)[: max(1, size // share)].to(tensor.device)
            found.append(lines_of(tensor, dim=dim, index=index))
        if tensor.dim() == 1:
            odd = torch.arange(9, device=tensor.device)[1::2]  # not contiguous
            found.append(Lines(tensor, 3, (4, 9), (9, 1), 1, odd))
            found.append(Lines(tensor, 5, (2, 20), (20, 1), 0, odd[:0]))
    return found


def held_in(tensors: list[Tensor], lines: list[Lines]) -> list[Tensor]:
    """bool of each tensor's shape: what its lines name, one line after the other."""
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in tensors]
    for each in lines:
        (mask,) = [mask for mask, tensor in zip(masks, tensors, strict=True) if tensor is each.tensor]
        rows, columns = each.shape
        there = mask if mask.dim() == 2 else mask[each.offset : each.offset + rows * columns].view(rows, columns)
        for number in each.which.tolist():
            there.select(each.dim, number).fill_(True)
    return masks


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def check(copies: Copies, tensors: list[Tensor], lines: list[Lines]) -> int:
    """Everything is overwritten between the two; returns how many elements came back."""
    before = [bits_of(tensor).clone() for tensor in tensors]
    copies.copy(lines)
    for tensor in tensors:
        tensor.fill_(7.0)
    copies.write_back(lines)
    held = 0
    for tensor, old, mask in zip(tensors, before, held_in(tensors, lines), strict=True):
        other = bits_of(torch.full_like(tensor, 7.0))
        assert torch.equal(bits_of(tensor), torch.where(mask, old, other)), (tensor.shape, tensor.dtype)
        held += int(mask.sum())
    return held


def test_what_was_copied_comes_back_bit_for_bit_and_the_rest_stays() -> None:
    tensors = matrices()
    copies = Copies()
    assert check(copies, tensors, lines_in(tensors)) > 500
    assert check(copies, tensors, lines_in(tensors)[::2]) > 200


def test_what_moved_in_between_is_written_where_it_is_now() -> None:
    old, new, index = torch.arange(6.0).view(3, 2), torch.zeros(3, 2), torch.tensor([2, 0])
    copies = Copies()
    copies.copy([lines_of(old, dim=0, index=index)])
    copies.write_back([lines_of(new, dim=0, index=index)])
    assert new.tolist() == [[0, 1], [0, 0], [4, 5]]


def test_nothing_to_copy_is_nothing_to_do() -> None:
    check(Copies(), [torch.ones(3)], [])


def test_entries_of_a_vector_are_one_line_not_as_many_as_they_are() -> None:
    vector, which = torch.randn(50), torch.arange(7)
    *_, lines, width, between_rows, between_columns, by_rows = _entry(
        lines_of(vector, dim=0, index=which), index=which, first=0
    )
    assert (lines, width, between_rows, between_columns, by_rows) == (1, 7, 1, 1, 0)


# -- the kernel, on Triton's interpreter, which takes one program after the other

INTERPRETED = """
import torch
from megatron_sat.aside import copies, table
from megatron_sat.aside.copies import Copies
from tests.aside.test_copies import check, lines_in, matrices

copies.KERNELS_ON = "cpu"
table.PROGRAMS, table.BLOCK = 3, 16
made, true = [], table.Table.__init__
moves, move = [], table.Table._move
table.Table.__init__ = lambda self, lines: (made.append(len(lines)), true(self, lines))[1]
table.Table._move = lambda self, aside, back: (moves.append(back), move(self, aside, back=back))[1]
copies.copy_by_torch = copies.write_by_torch = None

torch.manual_seed(1)
tensors = matrices()
lines, kept = lines_in(tensors), Copies()
for step in range(3):
    held = check(kept, tensors, lines)
    for tensor, fresh in zip(tensors, matrices()):
        tensor.copy_(fresh)
print(held, len(made), len(moves))
lines[0] = lines[0]._replace(which=lines[0].which.clone())  # another choice
check(kept, tensors, lines)
print(len(made), len(moves))
tensors[0].data = tensors[0].data.clone()  # the same tensor elsewhere, and its lines under the same index
check(kept, tensors, lines)
print(len(made))
"""


def run_in_another(code: str, **environment: str) -> list[str]:
    """The words that a process of its own printed."""
    pytest.importorskip("triton", reason="comes with builds of torch for GPUs")
    there = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=there, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_the_kernel_moves_what_torch_moves_in_one_launch_a_dtype_each_way_by_a_table_made_once() -> None:
    tensors = matrices()
    held = check(Copies(), tensors, lines_in(tensors))
    # two dtypes: two tables for three steps of two ways; one more table for one choice, and for one move
    assert run_in_another(INTERPRETED, TRITON_INTERPRET="1") == [str(held), "2", "12", "3", "16", "4"]


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_sat.aside.kernels import move

for pointer in ("*fp32", "*bf16", "*fp16"):
    for back in (False, True):
        constants = {"PROGRAMS": 64, "BLOCK": 1024, "BACK": back}
        signature = {"table": "*i64", "aside": pointer} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=move, signature=signature, constexprs=constants)
        print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]) > 0)
"""


def test_the_kernel_compiles_for_a_gpu_without_one() -> None:
    """The interpreter takes what the compiler refuses."""
    assert run_in_another(COMPILED) == ["True"] * 6


@pytest.mark.gpu
def test_a_gpu_moves_what_torch_moves_and_the_host_never_waits() -> None:
    tensors = matrices("cuda")
    lines, copies = lines_in(tensors), Copies()
    here = matrices()
    assert check(copies, tensors, lines) == check(Copies(), here, lines_in(here))
    copies.copy(lines)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copies.write_back(lines)
        copies.copy(lines)
        copies.write_back(lines)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_without_triton_torch_moves_what_lies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands in for one."""
    monkeypatch.setattr("megatron_sat.aside.copies.KERNELS_ON", "cpu")
    monkeypatch.setattr("megatron_sat.aside.table.find_spec", lambda name: None)
    tensor = torch.arange(12.0).view(3, 4)
    copies, lines = Copies(), [lines_of(tensor, dim=0, index=torch.tensor([1]))]
    copies.copy(lines)
    tensor.zero_()
    copies.write_back(lines)
    assert tensor[1].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert tensor.sum() == 22
