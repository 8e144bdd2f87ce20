"""Records of a run: what a window's means are, and that every sink carries every figure."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sat.training.metrics import Console, JsonLines, Meter, Record, StepFigures, TensorBoard, Totals


def figures(step: int, **changes: object) -> StepFigures:
    made = {
        "step": step,
        "loss": float(step),
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "skipped": False,
        "seconds": 0.5,
        "tokens": 100,
        "nominal_rate": 0.5,
        "omission_rates": {"attention": 0.5, "mlp": 0.49},
        "executed_flops": 2e12,
        "dense_flops": 3e12,
    }
    return StepFigures(**{**made, **changes})  # type: ignore[arg-type]


def record() -> Record:
    meter = Meter(num_devices=2)
    meter.add(figures(1))
    meter.add(figures(2, seconds=1.5))
    return meter.record()


def test_a_record_is_the_mean_of_its_window() -> None:
    made = record()
    assert (made.step, made.loss, made.step_seconds) == (2, 1.5, 1.0)
    assert made.tokens_per_second == 200 / 2.0
    assert made.executed_tflops == pytest.approx(4 / 2.0 / 2)  # 4 TFLOP in 2 s on 2 devices
    assert made.dense_equivalent_tflops == pytest.approx(6 / 2.0 / 2)


def test_the_window_starts_anew_and_totals_go_on() -> None:
    meter = Meter(num_devices=1, totals=Totals(elapsed_seconds=10.0, executed_flops=1.0, consumed_tokens=7))
    meter.add(figures(1))
    meter.record()
    meter.add(figures(2, loss=9.0))
    made = meter.record()
    assert made.loss == 9.0
    assert (made.elapsed_seconds, made.executed_flops, made.consumed_tokens) == (11.0, 1.0 + 4e12, 207)


def test_skipped_steps_are_counted_and_leave_the_loss_alone() -> None:
    meter = Meter(num_devices=1)
    meter.add(figures(1, skipped=True, loss=math.inf))
    meter.add(figures(2, loss=3.0))
    made = meter.record()
    assert (made.loss, made.skipped_steps) == (3.0, 1)
    assert "1 skipped" in made.line()


def test_a_window_of_skipped_steps_has_no_loss() -> None:
    meter = Meter(num_devices=1)
    meter.add(figures(1, skipped=True))
    assert math.isnan(meter.record().loss)


def test_totals_survive_a_checkpoint() -> None:
    totals = Totals(elapsed_seconds=1.0, executed_flops=2.0, consumed_tokens=3)
    assert Totals(**totals.state()) == totals  # type: ignore[arg-type]


def test_the_console_line_carries_what_a_line_must(capsys: pytest.CaptureFixture[str]) -> None:
    Console().record(record())
    said = capsys.readouterr().out
    for part in ("loss 1.5", "grad norm 1.5", "omission 0.500 (attention 0.500 mlp 0.490)", "100 tokens/s", "s/step"):
        assert part in said
    assert "1 TFLOP/s executed, 1.5 dense-equivalent" in said


def test_the_console_shows_validation_losses_with_perplexities(capsys: pytest.CaptureFixture[str]) -> None:
    Console().evaluation(5, {"zh/law": 2.0, "huge": 1e9}, elapsed_seconds=1.0)
    said = capsys.readouterr().out
    assert "zh/law 2.0000 (ppl 7.39)" in said and "huge" in said


def test_jsonl_carries_every_figure_and_every_domain(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "a" / "metrics.jsonl", resume_step=0)
    sink.record(record())
    sink.evaluation(2, {"zh": 1.25}, elapsed_seconds=2.0)
    first, second = (json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    assert first == {"kind": "train", **asdict(record())}
    assert second == {"kind": "validation", "step": 2, "elapsed_seconds": 2.0, "loss": {"zh": 1.25}}


def test_a_resumed_run_drops_the_lines_beyond_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, resume_step=0)
    for step in (1, 2, 3):
        sink.evaluation(step, {"zh": 1.0}, elapsed_seconds=0.0)
    JsonLines(path, resume_step=2).evaluation(3, {"zh": 0.5}, elapsed_seconds=0.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]["zh"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, resume_step=0)
    for step in (1, 2):
        sink.evaluation(step, {"zh": 1.0}, elapsed_seconds=0.0)
    path.write_bytes(path.read_bytes()[:-5])
    JsonLines(path, resume_step=2).evaluation(2, {"zh": 0.5}, elapsed_seconds=0.0)
    assert [json.loads(line)["loss"]["zh"] for line in path.read_text().splitlines()] == [1.0, 0.5]


@pytest.mark.parametrize(
    "foreign",
    ['{"text": "a corpus"}', '{"step": 1}', '{"kind": "train"}', "step 1", "[1]", '{"kind": "train", "step": null}'],
)
def test_lines_that_no_run_wrote_are_refused_and_left_alone(foreign: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path, resume_step=0).evaluation(1, {"zh": 1.0}, elapsed_seconds=0.0)
    content = path.read_text() + foreign + "\n"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"--log-jsonl must be new or hold .* figures, .*metrics.jsonl:2 has none"):
        JsonLines(path, resume_step=1)
    assert path.read_text() == content


def test_tensorboard_carries_every_figure_and_every_domain(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, resume_step=0)
    sink.record(record())
    sink.evaluation(2, {"zh": 1.25}, elapsed_seconds=2.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {f"train/{field.name}" for field in fields(Record)} - {"train/step", "train/omission_rate"}
    expected |= {"train/omission_rate_attention", "train/omission_rate_mlp", "validation/zh"}
    assert set(events.Tags()["scalars"]) == expected
    assert events.Scalars("validation/zh")[0].value == 1.25
