"""Ladders with fewer steps, and what a few steps say of the paper's length."""

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ladders import LADDERS, compare, run_program
from benchmarks.program import CONSTANT, Size, flags, model_shape
from megatron_sat import cli
from megatron_sat.model.flops import kept_shape, step_flops

SIZE = Size(model="tiny", layers=2, seq_length=32, micro_batch_size=1, micro_batches=2, vocabulary=128)
CPT, SFT = LADDERS["cpt"], LADDERS["sft"]


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """The settings and the shape of the benchmarked model."""
    line = flags(SIZE, data="none", cuda=False, steps=90, method=CONSTANT)
    config = cli.parse(line, world_size=1, cuda=False)
    return {"config": config, "shape": model_shape(config, vocabulary=128)}


def test_benchmarks_choose_as_the_paper_does(program: dict[str, Any]):
    line = flags(SIZE, data="none", cuda=False, steps=90, method=CPT.flags(90))
    for config in (program["config"], cli.parse(line, world_size=1, cuda=False)):
        chosen = config.selection
        assert (chosen.importance, chosen.selection, chosen.selection_interval) == ("maxip", "sampling", 1)


def test_the_papers_ladders_are_the_papers():
    rungs = [(rung.first, float(rung.rate)) for rung in CPT.schedule(3000)]
    assert rungs == [(1, 0.5), (2001, 0.4), (2033, 0.3), (2097, 0.2), (2226, 0.1), (2484, 0.0)]
    assert [(rung.first, float(rung.rate)) for rung in SFT.schedule(1200)] == [(1, 0.96), (601, 0.0)]


def test_fewer_steps_keep_the_proportions():
    assert (CPT.start(60), SFT.start(40)) == (40, 20)
    assert "--sat-schedule-start 40 --sat-rungs 5" in CPT.flags(60)
    assert "--sat-omission-rate 24/25" in SFT.flags(40)
    mean = sum(rung.steps * rung.rate for rung in CPT.schedule(60)) / 60
    assert float(mean) == pytest.approx(0.361, abs=0.01)


@pytest.mark.parametrize("steps", [0, 61])
def test_a_ladder_that_would_start_between_steps_is_refused(steps):
    with pytest.raises(ValueError, match=rf"must have a multiple of 3 steps, .* at 2000 of 3000, got {steps}; try"):
        CPT.start(steps)


def operations(rate: Fraction, program: dict[str, Any]) -> int:
    kept = kept_shape(program["shape"], rate, selection_groups=1, channel_multiple=1, gqa="group")
    return step_flops(program["shape"], kept, tokens=SIZE.tokens)


def records(seconds: list[float]) -> list[dict[str, Any]]:
    return [{"step_seconds": each} for each in seconds]


def proportional(ladder_steps: int, program: dict[str, Any], *, extra: dict[int, float]) -> list[float]:
    """Seconds of a program that is exactly as fast as its operations, but for some steps."""
    rates = [rung.rate for rung in CPT.schedule(ladder_steps) for _ in range(rung.steps)]
    dense = operations(Fraction(0), program)
    return [operations(rate, program) / dense + extra.get(step, 0.0) for step, rate in enumerate(rates, start=1)]


def test_a_program_as_fast_as_its_operations_reaches_the_bound_at_both_lengths(program):
    sparse = records(proportional(60, program, extra={}))
    found = compare(CPT, steps=60, dense=records([1.0] * 90), sparse=sparse, **program)
    assert found["dense_seconds"] == 60.0
    assert found["saved"] == pytest.approx(found["bound"])
    assert found["paper_saved"] == pytest.approx(found["paper_bound"])
    assert found["bound"] != pytest.approx(found["paper_bound"], abs=1e-4)


def test_what_is_lost_at_first_steps_and_changes_counts_once(program):
    """Measured it weighs as it did; at the paper's length it is as much, over fifty times the steps."""
    sparse = records(proportional(60, program, extra={1: 5.0, 2: 0.5, 45: 2.0, 50: 0.25}))
    found = compare(CPT, steps=60, dense=records([4.0, *[1.0] * 59]), sparse=sparse, **program)
    assert found["beyond_steady_seconds"] == pytest.approx({"dense": 3.0, "sparse": 7.75})
    assert found["saved"] == pytest.approx(1 - sum(r["step_seconds"] for r in sparse) / 63.0)
    assert found["paper_dense_seconds"] == pytest.approx(3003.0)
    ideal = (1 - found["paper_bound"]) * 3000
    assert found["paper_sparse_seconds"] == pytest.approx(ideal + 7.75)
    assert "first steps and changes of rung: 7.75 s beyond steady ones; in the dense run 3.00 s" in found["remarks"]


def test_rungs_without_a_settled_step_are_between_their_neighbours_and_are_named(program):
    found = compare(
        CPT, steps=60, dense=records([1.0] * 60), sparse=records(proportional(60, program, extra={})), **program
    )
    absent, guessed = (next(r for r in found["remarks"] if word in r) for word in ("too few steps", "between those"))
    assert absent.endswith("rate 0.4: their change is in no sum")
    assert guessed.endswith("rate 0.4, 0.3, 0.2")
    steady = found["steady_seconds"]
    assert steady["dense run"] == steady["0"] == 1.0
    third = operations(Fraction(3, 10), program) / operations(Fraction(0), program)
    assert steady["3/10"] == pytest.approx(third)


def test_a_program_that_fails_is_quoted(tmp_path: Path):
    failing = "import sys; print('step 1'); sys.exit('error: no such flag')"
    with pytest.raises(RuntimeError, match="must end with exit code 0, got 1; it said:\nstep 1\nerror: no such flag"):
        run_program(["--lr", "1"], log=tmp_path / "log.jsonl", program=(sys.executable, "-c", failing))


def test_a_programs_steps_are_read_and_its_evaluations_are_not(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    lines = [{"kind": "train", "step": 1}, {"kind": "validation", "step": 1}, {"kind": "train", "step": 2}]
    writing = "import sys; open(sys.argv[-1], 'w').write(sys.argv[1]); assert sys.argv[2:4] == ['--log-interval', '1']"
    text = "\n".join(map(json.dumps, lines))
    assert run_program([text], log=log, program=(sys.executable, "-c", writing)) == [lines[0], lines[2]]
