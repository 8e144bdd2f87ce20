"""`make demo`, its quick variant on less text: every stage, the report, and nothing done twice."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from examples.adapt import driver
from megatron_sat.compare.runs import METRICS, Run, read_run, steps_that_fit
from megatron_sat.compare.stages import LOG, MARKER
from megatron_sat.evaluate.result import Result
from tests.helpers.small_text import write_small_text
from tests.trip.findings import findings, result

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "demo" / "run.py"
MINUTES = 60
HIGHEST_RATE = 2.0e-3
"""lr of examples/demo/quick.yaml."""
CONTINUED = ("dense", "sat", "control")
STAGES = 16


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
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out), "--data", str(out.parent / "text")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=9 * MINUTES, cwd=out.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo that was run from another folder than the project's."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    write_small_text(folder.parent / "text")
    (folder.parent / "console.txt").write_text(_demo(folder))
    return folder


@pytest.fixture(scope="module")
def runs(out: Path) -> dict[str, Run]:
    continued = {name: read_run(out / "train" / name, name=name) for name in CONTINUED}
    return continued | {"english": read_run(out / "english", name="english")}


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Result]:
    return {path.parents[1].name: Result.load(path) for path in out.glob("evaluate/*/result/result.json")}


@pytest.mark.timeout(10 * MINUTES)
class TestQuickDemo:
    """One run of the quick demo, looked at from all sides."""

    def test_the_console_ends_with_the_table_and_who_is_ahead(self, out: Path) -> None:
        said = (out.parent / "console.txt").read_text()
        assert "step     30 | validation loss | zh" in said
        end = said.split("Dense, SAT, and dense for SAT's time\n")[1]
        assert "executed FLOPs" in end
        assert "…" not in end  # the table fits into 80 columns
        assert "equal training time" in end
        assert "512 pieces were added to 2,048; 12 of 12 proofs hold" in end
        assert "equal but for rounding" in end

    def test_the_report_has_every_model_and_the_pictures(self, out: Path) -> None:
        page = (out / "report.md").read_text()
        names = "original | extended | SAT | dense | dense for SAT's time"
        assert f"| bits a character | {names} | SAT - original |" in page
        for picture in ("curves.png", "domains.png"):
            assert f"({picture})" in page
            assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert (out / "report.html").read_text().count("data:image/png;base64,") == 2

    def test_chinese_gets_better_with_the_new_pieces_and_better_still_by_training(
        self, results: dict[str, Result]
    ) -> None:
        chinese = {name: result.languages["zh"].bits_per_character for name, result in results.items()}
        assert chinese["original"] > chinese["extended"] > max(chinese[name] for name in CONTINUED)
        tokens = {name: sum(domain.tokens for domain in result.domains.values()) for name, result in results.items()}
        assert tokens["original"] > 1.2 * tokens["extended"]

    def test_the_exported_folder_is_sats_checkpoint(self, results: dict[str, Result]) -> None:
        sat, exported = (results[name].average.bits_per_character for name in ("sat", "exported"))
        assert exported == pytest.approx(sat, abs=1e-4)
        assert abs(sat - results["dense"].average.bits_per_character) > 1e-4

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
        control = runs["control"]
        assert control.steps == steps_that_fit(runs["dense"], seconds=runs["sat"].seconds)
        for name in CONTINUED:  # all three end a step before --min-lr, a hundredth: the cosine's last bit is a parabola
            last = _last_rate(out / "train" / name)
            assert last < HIGHEST_RATE * (0.01 + (math.pi / runs[name].steps) ** 2 / 3)

    def test_all_three_go_on_with_the_english_model(self, runs: dict[str, Run]) -> None:
        """It gives English more chance than a fresh one would, ln 2560 = 7.8, and Chinese less."""
        assert runs["dense"].validations[0].loss["en"] < 7.5
        for name in CONTINUED:
            first, last = runs[name].windows[0], runs[name].windows[-1]
            assert first.loss > last.loss + 0.5

    def test_a_second_run_keeps_every_stage(self, out: Path) -> None:
        logs = {path: path.stat().st_mtime_ns for path in out.glob(f"**/{LOG}")}
        said = _demo(out)
        assert said.count("done before, kept") == len(logs) == STAGES
        assert {path: path.stat().st_mtime_ns for path in out.glob(f"**/{LOG}")} == logs


@pytest.mark.timeout(3 * MINUTES)
def test_a_demo_that_is_stopped_takes_its_commands_along(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = write_small_text(tmp_path / "text")
    demo = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out), "--data", str(text)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 2 * MINUTES
    while not (out / "english-text" / LOG).exists():  # the first stage has begun
        assert time.monotonic() < deadline
        time.sleep(0.02)
    demo.send_signal(signal.SIGTERM)
    _, said = demo.communicate(timeout=MINUTES)
    assert demo.returncode == 1
    assert said.endswith("demo: interrupted; the same command goes on where it was\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(demo.pid, 0)
    assert not (out / "report.md").exists()


def _last_rate(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line["learning_rate"] for line in lines if line["kind"] == "train"][-1]


def test_the_ladder_starts_after_two_thirds_of_the_steps(script: ModuleType, tmp_path: Path) -> None:
    for quick in (False, True):
        settings = script.demo(tmp_path, quick=quick).settings
        assert settings.steps % 3 == 0
        assert int(settings.schedule[-1]) * 3 == settings.steps * 2


def test_fresh_makes_stages_run_again_and_touches_nothing_else(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "train" / "dense"
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("{}")
    (folder / "other").write_text("")

    def stop(*_: object) -> None:
        raise RuntimeError("far enough")

    monkeypatch.setattr(driver, "travel", stop)
    with pytest.raises(RuntimeError, match="far enough"):
        script.main(["--fresh", "--out", str(tmp_path)])
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_an_export_that_is_not_sats_fails_after_the_report(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(tmp_path, exported=result("exported", zh=1, en=1))
    monkeypatch.setattr(driver, "travel", lambda course, runner: [])
    monkeypatch.setattr(driver, "read_findings", lambda course, stages: found)
    with pytest.raises(RuntimeError, match="the exported model must be SAT's, .*export is not"):
        script.main(["--out", str(tmp_path)])
    assert "NOT EQUAL" in (tmp_path / "report.md").read_text()
