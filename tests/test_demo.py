"""`make demo`, its quick variant: every stage on two real ranks, the report, and nothing done twice."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_sat.compare.runs import METRICS, Run, read_run, steps_that_fit
from megatron_sat.compare.stages import LOG, MARKER

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "demo" / "run.py"
MINUTES = 60
CONTINUED = ("dense", "sat", "dense-for-sats-time")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["demo_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _demo(out: Path) -> str:
    """What the quick demo says on the console."""
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=9 * MINUTES, cwd=out.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo that was run from another folder than the project's."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    (folder.parent / "console.txt").write_text(_demo(folder))
    return folder


@pytest.fixture(scope="module")
def runs(out: Path) -> dict[str, Run]:
    return {name: read_run(out / name, name=name) for name in ("english", *CONTINUED)}


@pytest.mark.timeout(10 * MINUTES)
class TestQuickDemo:
    """One run of the quick demo, looked at from all sides."""

    def test_the_console_ends_with_the_table_and_who_is_ahead(self, out: Path) -> None:
        said = (out.parent / "console.txt").read_text()
        assert "step     30 | validation loss | zh" in said
        assert "executed FLOPs" in said.split("Dense, SAT, and dense for SAT's time")[1]
        assert "…" not in said  # the table fits into 80 columns
        assert "equal training time" in said

    def test_the_report_has_a_row_for_every_run_and_the_picture(self, out: Path) -> None:
        page = (out / "report.md").read_text()
        names = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
        assert names == ["run", "---", "English only", "dense", "SAT", "dense for SAT's time"]
        assert "(curves.png)" in page
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_sat_goes_down_the_ladder_and_the_others_are_dense(self, runs: dict[str, Run]) -> None:
        sat = runs["sat"]
        rates = [window.nominal_omission_rate for window in sat.windows]
        assert (rates[0], rates[-1]) == (0.5, 0.0)
        assert rates == sorted(rates, reverse=True)
        others = {window.nominal_omission_rate for n, run in runs.items() if n != "sat" for window in run.windows}
        assert others == {0.0}

    def test_sat_executes_fewer_operations_over_as_many_steps_as_dense(self, runs: dict[str, Run]) -> None:
        assert runs["sat"].steps == runs["dense"].steps == 30
        assert runs["sat"].executed_flops < 0.95 * runs["dense"].executed_flops

    def test_the_control_fills_sats_time_and_decays_fully(self, out: Path, runs: dict[str, Run]) -> None:
        control = runs["dense-for-sats-time"]
        assert control.steps == steps_that_fit(runs["dense"], seconds=runs["sat"].seconds)
        last = [_last_rate(out / name) for name in CONTINUED]
        assert max(last) < 2 * min(last)  # all three end within a step of --min-lr

    def test_all_three_go_on_with_the_english_model(self, runs: dict[str, Run]) -> None:
        """It gives Chinese less chance than a fresh one would, ln 4096 = 8.3, and dense keeps its English."""
        dense = runs["dense"].validations[0].loss
        assert dense["en"] < 7.0 < dense["zh"]
        for name in CONTINUED:
            assert runs[name].windows[0].loss > 8.5
            assert runs[name].final_loss["zh"] < runs["english"].final_loss["zh"] - 1

    def test_a_second_run_keeps_every_stage(self, out: Path) -> None:
        logs = {path: path.stat().st_mtime_ns for path in out.glob(f"*/{LOG}")}
        said = _demo(out)
        assert said.count("done before, kept") == len(logs) == 8
        assert {path: path.stat().st_mtime_ns for path in out.glob(f"*/{LOG}")} == logs


@pytest.mark.timeout(3 * MINUTES)
def test_a_demo_that_is_stopped_takes_its_commands_along_and_goes_on_later(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 2 * MINUTES
    while not (out / "zh-dev" / LOG).exists():  # the second stage has begun
        assert time.monotonic() < deadline
        time.sleep(0.02)
    demo.send_signal(signal.SIGTERM)
    _, said = demo.communicate(timeout=MINUTES)
    assert demo.returncode == 1
    assert said.endswith("demo: interrupted; the same command goes on where it was\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(demo.pid, 0)
    assert (out / "zh-train" / MARKER).exists()
    assert not (out / "zh-dev" / MARKER).exists()


def _last_rate(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line["learning_rate"] for line in lines if line["kind"] == "train"][-1]


def test_the_ladder_starts_after_two_thirds_of_the_steps(script: ModuleType) -> None:
    for plan in (script.FULL, script.QUICK):
        assert plan.chinese_steps % 3 == 0
        start = plan.sat[plan.sat.index("--sat-schedule-start") + 1]
        assert int(start) * 3 == plan.chinese_steps * 2


def test_progress_is_what_a_training_run_says_of_its_steps(script: ModuleType) -> None:
    assert script.is_progress("step     10 | loss 7.1875 | grad norm 0.519\n")
    assert script.is_progress("step     10 | validation loss | zh 11.8\n")
    assert script.is_progress("runs/demo/zh-dev/data_text_document: 286 documents, 100,828 tokens\n")
    assert not script.is_progress("  warnings.warn(\n")
    assert not script.is_progress("│ 1-20  │     20 │ 0    │\n")


def test_fresh_makes_stages_run_again_and_touches_nothing_else(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "done.json").write_text("{}")
    (tmp_path / "dense" / "other").write_text("")
    monkeypatch.setattr(script, "compare", lambda plan, out: (plan, out))
    seen = []
    monkeypatch.setattr(script, "report", lambda comparison, out: seen.append((*comparison, out)))
    script.main(["--fresh", "--out", str(tmp_path)])
    assert seen == [(script.FULL, tmp_path, tmp_path)]
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == ["other"]
