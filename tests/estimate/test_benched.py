"""What a benchmark's file says of its run: in so many words, or in the command that made it."""

from typing import Any

import pytest

from megatron_sat.estimate.benched import read_benched

FAST = ("--layer-graphs", "--cross-entropy-loss-fusion")
ZERO = ("--engine", "deepspeed", "--zero-stage", "3")


def file(command: str, **more: Any) -> dict[str, Any]:
    return {"about": {"device": "NVIDIA H100 80GB HBM3", "command": f"python benchmarks/{command}"}, **more}


def test_flags_and_ranks_are_read_where_they_are_written():
    command = "bench_step.py '--flags=--bf16' --out x.json"
    found = read_benched(file(command, flags=" ".join(FAST), tensor_parallel=2))
    assert (found.device, found.flags, found.tensor) == ("NVIDIA H100 80GB HBM3", FAST, 2)
    assert read_benched(file(command, flags="", tensor_parallel=1)).flags == ()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("bench_step.py --layers 12 --flags=--layer-graphs --cross-entropy-loss-fusion --out step.json", FAST),
        ("bench_step.py --flags=--layer-graphs --cross-entropy-loss-fusion", FAST),
        ("bench_step.py '--flags=--layer-graphs --cross-entropy-loss-fusion' --out step.json", FAST),
        ("bench_step.py --flags=--engine deepspeed --zero-stage 3 --out z", ZERO),
        ("bench_step.py --flags=--sat-temperature=0.1 --sat-seed=3 --out z", ["--sat-temperature=0.1", "--sat-seed=3"]),
        ("bench_ladder.py --ladders cpt=96 --out cpt.json", ()),
        ("bench_step.py --flags= --out step.json", ()),
    ],
)
def test_without_them_flags_are_those_of_the_command_to_the_benchmarks_next_option(command, flags):
    assert read_benched(file(command)).flags == tuple(flags)


@pytest.mark.parametrize(
    ("command", "tensor"),
    [
        ("bench_step.py --tensor-parallel 2 --flags=--sequence-parallel", 2),
        ("bench_step.py --tensor-parallel=4", 4),
        ("bench_step.py --layers 2", 1),
    ],
)
def test_without_them_ranks_are_those_of_the_command(command, tensor):
    assert read_benched(file(command)).tensor == tensor


def test_a_gpu_is_known_by_its_name_and_must_be_where_ranks_talk():
    found = read_benched(file("bench_step.py"))
    assert found.gpu(ranks=2) == "h100"
    unknown = read_benched({"about": {"device": "NVIDIA Even", "command": ""}})
    assert unknown.gpu(ranks=1) in {"a100", "h100"}
    with pytest.raises(ValueError, match=r"2 ranks must be of a device whose NVLink .*, got NVIDIA Even; compare what"):
        unknown.gpu(ranks=2)
