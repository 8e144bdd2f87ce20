"""Reading runs back, and how many steps fit into a time."""

from pathlib import Path

import pytest

from megatron_sat.compare.runs import METRICS, read_run, steps_that_fit
from megatron_sat.training.metrics import JsonLines, Meter, StepFigures
from tests.compare.synthetic import entries, run, write


def test_what_a_training_run_writes_is_read_back(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / METRICS, resume_step=0)
    meter = Meter(num_devices=2)
    for step in range(1, 5):
        meter.add(
            StepFigures(
                step=step,
                loss=float(step),
                grad_norm=1.0,
                learning_rate=1e-3,
                skipped=False,
                seconds=0.25,
                tokens=100,
                nominal_rate=0.5,
                omission_rates={"mlp": 0.45},
                executed_flops=1e6,
                dense_flops=2e6,
            )
        )
    sink.record(meter.record())
    sink.evaluation(4, {"zh": 3.5}, elapsed_seconds=1.0)

    read = read_run(tmp_path, name="it")

    assert (read.steps, read.seconds, read.executed_flops, read.tokens_per_second) == (4, 1.0, 4e6, 400)
    assert read.windows[0].omission_rate == {"mlp": 0.45}
    assert read.final_loss == {"zh": 3.5}


def test_a_repeated_evaluation_of_the_last_step_counts_once(tmp_path: Path) -> None:
    lines = entries()
    write(tmp_path, [*lines, lines[-1] | {"loss": {"zh": 1.0, "en": 1.0}}])
    read = read_run(tmp_path, name="twice")
    assert [point.step for point in read.validations] == list(range(10, 101, 10))
    assert read.final_loss["zh"] == 1.0


def test_steps_that_fit_follow_the_runs_own_records_between_them_and_beyond(tmp_path: Path) -> None:
    slowing = entries(steps=20)
    for line in slowing:
        line["elapsed_seconds"] = 10.0 if line["step"] == 10 else 40.0  # 1 s a step, then 3
    read = read_run(write(tmp_path, slowing), name="slowing")
    fitting = [steps_that_fit(read, seconds=s) for s in (1, 5.5, 10, 25, 39.9, 40, 80)]
    assert fitting == [1, 5, 10, 15, 19, 20, 40]


def test_the_median_step_does_not_count_a_slow_beginning(tmp_path: Path) -> None:
    slow = entries(steps=50, pace=0.2)
    for line in slow:
        line["elapsed_seconds"] += 30.0  # the first window took 32 s
    read = read_run(write(tmp_path, slow), name="slow")
    assert read.step_seconds == pytest.approx(0.8)
    assert read.median_step_seconds == pytest.approx(0.2)


def test_steps_that_fit_are_at_least_those_that_a_brute_count_finds(tmp_path: Path) -> None:
    even = run(tmp_path, "even", pace=0.3)
    for tenths in range(3, 600, 7):
        assert steps_that_fit(even, seconds=tenths / 10) == sum(3 * step <= tenths for step in range(1, 1000))


def test_a_time_without_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold one step of 'even' \(0.5 s\), got 0.4 s"):
        steps_that_fit(run(tmp_path, "even", pace=0.5), seconds=0.4)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold the metrics.jsonl of a run, it does not"):
        read_run(tmp_path, name="nothing")


@pytest.mark.parametrize("line", ['{"kind": "tra', "[]", '{"step": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, entries())
    with (tmp_path / METRICS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:21 must be a record with a kind, got"):
        read_run(tmp_path, name="torn")


def test_records_of_another_version_are_refused(tmp_path: Path) -> None:
    line = {"kind": "train", "step": 1}
    with pytest.raises(ValueError, match=r"the train records of .* must be those of this version, KeyError"):
        read_run(write(tmp_path, [line]), name="old")


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_run_without_one_kind_of_record_is_refused(tmp_path: Path, kind: str) -> None:
    lines = [line for line in entries() if line["kind"] != kind]
    with pytest.raises(ValueError, match=f"the run 'half' must have {kind} records, it has none"):
        read_run(write(tmp_path, lines), name="half")


def test_records_of_two_runs_in_one_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path, entries() + entries(steps=50))
    with pytest.raises(ValueError, match=r"the run 'two' must be in the order of steps, got"):
        read_run(tmp_path, name="two")
