"""The stand-ins for a GPU: in force without one, absent with one, and invisible to everybody but Megatron."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_sat import cpu

ROOT = Path(__file__).parent.parent
IN_FORCE = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is replaced")


def in_a_fresh_process(script: str) -> Any:
    """What the script prints last, as a Python value; it finds `cpu` and `torch`, nothing installed."""
    head = "import torch\nfrom megatron_sat import cpu\n"
    command = [sys.executable, "-c", head + script]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return ast.literal_eval(ran.stdout.strip().splitlines()[-1])


NAMES = [
    "torch.compile",
    "torch.cuda.current_device",
    "torch.cuda.set_device",
    "torch.cuda.synchronize",
    "torch.cuda.current_stream",
    "torch.cuda.get_rng_state",
    "torch.cuda.set_rng_state",
    "torch.cuda.manual_seed",
    "torch.Tensor.cuda",
    "torch.Tensor.type",
    "torch.nn.Module.cuda",
    *(f"torch.{name}" for name in cpu._FACTORIES),
]


def test_with_a_gpu_nothing_is_replaced() -> None:
    replaced = in_a_fresh_process(
        f"names = {NAMES}\n"
        "before = [eval(name) for name in names]\n"
        "torch.cuda.is_available = lambda: True\n"
        "installed = cpu.install()\n"
        "print([installed] + [n for n, b in zip(names, before) if eval(n) != b])"
    )
    assert replaced == [False]


@IN_FORCE
def test_without_a_gpu_every_name_is_replaced_and_a_second_time_changes_nothing() -> None:
    first, kept, second, again = in_a_fresh_process(
        f"names = {NAMES}\n"
        "before = [eval(name) for name in names]\n"
        "first = cpu.install()\n"
        "once = [eval(name) for name in names]\n"
        "second = cpu.install()\n"
        "twice = [eval(name) for name in names]\n"
        "print((first, [n for n, b, o in zip(names, before, once) if b == o],\n"
        "       second, [n for n, o, t in zip(names, once, twice) if o != t]))"
    )
    assert (first, kept) == (True, [])
    assert (second, again) == (True, [])


def test_each_stand_in_is_explained_in_a_line_of_its_own() -> None:
    lines = cpu.explain()
    assert len(lines) == len(cpu.STAND_INS) and len(set(lines)) == len(lines)
    assert all(what in line and why in line for (what, why, _), line in zip(cpu.STAND_INS, lines, strict=True))


def test_what_is_replaced_is_named_in_the_explanation() -> None:
    text = " ".join(cpu.explain())
    named = ["torch.compile", "current_device", "set_device", "synchronize", "current_stream", "random state"]
    assert all(name in text for name in [*named, "Tensor.type()", "Tensor.cuda", "Module.cuda", *cpu._FACTORIES])


@IN_FORCE
def test_megatron_sees_parameters_of_the_gpu_and_we_see_them_where_they_are() -> None:
    megatron = ModuleType("megatron.core.something")
    exec("def ask(tensor, *args): return tensor.type(*args)", megatron.__dict__)
    assert megatron.ask(torch.zeros(1)) == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type() == "torch.FloatTensor"


@IN_FORCE
def test_casting_by_type_works_for_megatron_and_for_us() -> None:
    megatron = ModuleType("megatron.core.something")
    exec("def ask(tensor, *args): return tensor.type(*args)", megatron.__dict__)
    for cast in (megatron.ask(torch.zeros(1), torch.float64), torch.zeros(1).type(torch.float64)):
        assert cast.dtype == torch.float64


@IN_FORCE
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)], ids=str)
def test_a_factory_that_is_asked_for_a_gpu_gives_the_cpu(device: Any) -> None:
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.empty_like(torch.ones(3), device=device),
    ]
    assert [tensor.device.type for tensor in made] == ["cpu"] * 3


@IN_FORCE
def test_a_factory_that_is_asked_for_another_device_gives_that() -> None:
    assert torch.zeros(2, device="meta").is_meta
    assert torch.zeros(2).device.type == "cpu"


@IN_FORCE
def test_pinned_memory_is_plain_memory() -> None:
    assert not torch.empty(2, pin_memory=True).is_pinned()


@IN_FORCE
def test_moving_to_the_gpu_stays_where_it_is() -> None:
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and module.cuda() is module


@IN_FORCE
def test_the_gpus_random_state_is_the_cpus() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@IN_FORCE
def test_streams_can_be_waited_for() -> None:
    stream = torch.cuda.current_stream()
    assert stream.wait_stream(stream) is None and torch.cuda.synchronize() is None


@IN_FORCE
@pytest.mark.parametrize("decorate", [torch.compile, torch.compile(mode="max-autotune")], ids=["bare", "options"])
def test_compiling_leaves_a_function_as_it_is(decorate: Any) -> None:
    assert decorate(max) is max


def test_a_device_context_still_reaches_the_wrapped_factories() -> None:
    with torch.device("meta"):
        made = [torch.empty(2), torch.arange(3), torch.zeros(1), torch.tensor([1.0])]
    assert [one.device.type for one in made] == ["meta"] * 4
