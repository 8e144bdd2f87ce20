"""Stages: done once, done again when anything they depend on changed, never half done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.stages import BEGUN, LOG, MARKER, Place, Resumption, Runner, Running, Stage

COUNT = "import sys; open(sys.argv[1], 'a').write('ran\\n'); print('step 1'); print('noise')"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def count(tmp_path: Path) -> Stage:
    """A stage that leaves a line in tmp_path/count whenever it runs."""
    command = (sys.executable, "-c", COUNT, str(tmp_path / "count"))
    return Stage(name="count", folder=tmp_path / "stage", command=command)


def _runner(folder: Path, *, shown: Callable[[str], bool] = lambda line: False, jobs: int = 1) -> Runner:
    return Runner(environment=os.environ, shown=shown, working_folder=folder, jobs=jobs)


def _run(stage: Stage, *, shown: Callable[[str], bool] = lambda line: False) -> bool:
    return _runner(stage.folder.parent, shown=shown).run(stage)


def _times(tmp_path: Path) -> int:
    return len((tmp_path / "count").read_text().splitlines())


def test_a_stage_that_is_done_is_not_run_again(count: Stage, tmp_path: Path) -> None:
    assert _run(count)
    assert not _run(count)
    assert _times(tmp_path) == 1


def test_a_stage_whose_command_changed_runs_again_in_an_empty_folder(count: Stage, tmp_path: Path) -> None:
    _run(count)
    (count.folder / "left over").write_text("x")
    assert _run(replace(count, command=(*count.command, "more")))
    assert not (count.folder / "left over").exists()
    assert _times(tmp_path) == 2


def test_a_stage_whose_input_file_changed_runs_again(count: Stage, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lr: 1")
    reading = replace(count, reads=(tmp_path / "config.yaml",))
    _run(reading)
    assert not _run(reading)
    (tmp_path / "config.yaml").write_text("lr: 2")
    assert _run(reading)


def test_a_stage_that_reads_a_file_that_is_not_there_is_refused(count: Stage, tmp_path: Path) -> None:
    for reads, why in (("zh.jsonl", "No such file or directory"), (".", "Is a directory")):
        with pytest.raises(ValueError, match=f"must be a file that can be read: {why}; check the path"):
            _run(replace(count, reads=(tmp_path / reads,)))
    assert not count.folder.exists()


def test_a_stage_that_is_made_with_something_else_runs_again(count: Stage) -> None:
    _run(replace(count, made_with="torch 2.13"))
    assert not _run(replace(count, made_with="torch 2.13"))
    assert _run(replace(count, made_with="torch 2.14"))


def test_a_stage_runs_again_when_one_before_it_changed(count: Stage) -> None:
    first = Stage(name="first", folder=count.folder.parent / "first", command=("true",))
    _run(replace(count, after=(first,)))
    assert not _run(replace(count, after=(first,)))
    assert _run(replace(count, after=(replace(first, command=("echo",)),)))


def test_a_stage_without_its_marker_runs_again(count: Stage, tmp_path: Path) -> None:
    _run(count)
    (count.folder / MARKER).unlink()
    assert _run(count)
    assert _times(tmp_path) == 2


def test_a_failed_stage_leaves_no_marker_and_says_how_its_log_ends(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "print('so far so good'); raise SystemExit(3)")
    stage = Stage(name="fails", folder=tmp_path / "stage", command=command)
    with pytest.raises(RuntimeError, match=r"'fails' must end with 0, it ended with 3; (?s:.*)so far"):
        _run(stage)
    assert not stage.is_done
    assert (stage.folder / LOG).read_text() == "so far so good\n"


def test_only_the_lines_asked_for_are_said_and_all_are_logged(count: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("megatron_sat.compare.stages.say", said.append)
    _run(count, shown=lambda line: line.startswith("step"))
    assert said[1:] == ["  step 1"]
    assert (count.folder / LOG).read_text() == "step 1\nnoise\n"


def test_the_marker_says_which_command_made_the_folder(count: Stage) -> None:
    _run(count)
    assert json.loads((count.folder / MARKER).read_text())["command"] == list(count.command)


def test_a_stage_that_is_made_again_leaves_another_marker(count: Stage) -> None:
    """One that reads it knows, though command and input are the same."""
    reader = Stage(name="reads", folder=count.folder.parent / "reads", command=("true",), after=(count,))
    reader = replace(reader, reads=(count.folder / MARKER,))
    _run(count)
    assert _run(reader)
    assert not _run(reader)
    (count.folder / MARKER).unlink()
    _run(count)
    assert _run(reader)


@pytest.mark.parametrize(
    ("jobs", "go"),
    [(1, "run_all([stage])"), (2, "run_all([stage])"), (1, "run_in([stage, later], places=2 * [Place()])")],
)
def test_an_interrupted_stage_ends_its_command_and_stays_undone(jobs: int, go: str, tmp_path: Path) -> None:
    """Ctrl-C reaches this process alone here, as it does under a supervisor."""
    stage = f"""
import os, pathlib, signal, sys
from megatron_sat.compare.stages import Place, Runner, Stage
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
child = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
here = pathlib.Path({str(tmp_path)!r})
stage = Stage(name="long", folder=here / "stage", command=(sys.executable, "-c", child))
later = Stage(name="as long", folder=here / "later", command=(sys.executable, "-c", child))
runner = Runner(environment=os.environ, shown=lambda line: True, working_folder=here, jobs={jobs})
runner.{go}
"""
    parent = subprocess.Popen([sys.executable, "-c", stage], cwd=ROOT, stderr=subprocess.DEVNULL)
    log_file = tmp_path / "stage" / LOG
    deadline = time.monotonic() + 60
    while not (log_file.exists() and log_file.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(log_file.read_text().split()[1])
    parent.send_signal(signal.SIGINT)
    parent.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "stage" / MARKER).exists()


def _python(name: str, code: str, *, folder: Path, after: tuple[Stage, ...] = ()) -> Stage:
    return Stage(name=name, folder=folder / name, command=(sys.executable, "-c", code), after=after)


def test_stages_run_at_once_but_after_those_they_need(tmp_path: Path) -> None:
    """The two of which neither needs the other wait for each other; the third needs both."""
    meet = (
        "import pathlib, time; mine, other = (pathlib.Path(p) for p in {}); mine.touch()\n"
        "while not other.exists(): time.sleep(.01)"
    )
    first = _python("first", meet.format(("a", "b")), folder=tmp_path)
    second = _python("second", meet.format(("b", "a")), folder=tmp_path)
    third = _python("third", "import os; assert os.path.exists('a') and os.path.exists('b')", folder=tmp_path)
    _runner(tmp_path, jobs=2).run_all([replace(third, after=(first, second)), first, second])
    assert third.folder.joinpath(MARKER).exists()


def test_an_error_in_one_stage_ends_the_others(tmp_path: Path) -> None:
    stages = [
        _python("sleeps", "import time; print('sleeping', flush=True); time.sleep(60)", folder=tmp_path),
        _python("fails", "import time; time.sleep(.3); raise SystemExit(3)", folder=tmp_path),
        _python("never begins", "pass", folder=tmp_path),
    ]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="'fails' must end with 0, it ended with 3"):
        _runner(tmp_path, jobs=2).run_all(stages)
    assert time.monotonic() - began < 30
    assert not any(stage.is_done for stage in stages)
    assert not stages[2].folder.joinpath(MARKER).exists()


MEET = (
    "import os, pathlib, time; mine, other = {!r}\n"
    "pathlib.Path(mine).write_text(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + os.environ['OMP_NUM_THREADS'])\n"
    "while not os.path.exists(other): time.sleep(.01)\nprint('met')"
)
"""Leaves its place and waits for the other."""


def test_stages_in_places_run_at_once_each_on_its_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        replace(_python(name, MEET.format((name + "-", other + "-")), folder=tmp_path), threads=threads)
        for name, other, threads in (("a", "b", 7), ("b", "a", 1))
    ]
    places = [Place(device=device, at_once=2) for device in ("5", "3")]
    _runner(tmp_path, shown=lambda line: line == "met\n").run_in(stages, places=places)
    assert [(tmp_path / f"{name}-").read_text() for name in "ab"] == ["5 3", "3 1"]
    said = capsys.readouterr().out
    assert all(f"  {name}: met" in said for name in "ab")
    assert stages[0].at_once == (2,)


def test_a_place_is_given_to_the_next_stage_when_it_is_free(tmp_path: Path) -> None:
    """The first stage waits for the last one: its own place stays taken, the other one is used by all the rest."""
    waits = "import os, time\nwhile not os.path.exists('third-'): time.sleep(.01)"
    leave = "import os, pathlib; pathlib.Path('{}-').write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    names = ("first", "second", "third")
    stages = [_python("waits", waits, folder=tmp_path)]
    stages += [_python(name, leave.format(name), folder=tmp_path) for name in names]
    _runner(tmp_path).run_in(stages, places=[Place(device=device, at_once=2) for device in "xy"])
    assert [(tmp_path / f"{name}-").read_text() for name in names] == ["y", "y", "y"]


def test_stages_in_places_end_though_another_failed_and_no_other_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the first three waits until the one before it is over."""
    later = (
        "import json, os, time\n"
        "while not (os.path.exists({0!r}) and json.load(open({0!r}))['seconds']): time.sleep(.01)\n"
        "time.sleep(.3)\n"
    )
    fails = "raise SystemExit(3)"
    stages = [
        _python("one", fails, folder=tmp_path),
        _python("two", later.format(f"one/{BEGUN}") + fails, folder=tmp_path),
        _python("ends", later.format(f"two/{BEGUN}"), folder=tmp_path),
        _python("never begins", "pass", folder=tmp_path),
    ]
    with pytest.raises(RuntimeError, match="'one' must end with 0, it ended with 3"):
        _runner(tmp_path).run_in(stages, places=[Place(device=device, at_once=3) for device in "xyz"])
    assert [stage.is_done for stage in stages] == [False, False, True, False]
    assert not stages[3].folder.exists()
    said = capsys.readouterr().out
    assert "one: failed; what was begun goes on to its end, and nothing else begins" in said
    assert "the stage 'two' must end with 0" in said


def test_stages_that_need_each_other_do_not_run_in_places(count: Stage) -> None:
    with pytest.raises(AssertionError):
        _runner(count.folder.parent).run_in([count, replace(count, after=(count,))], places=[Place()])


def test_a_stage_that_goes_on_beside_others_says_that_it_was_alone_before(tmp_path: Path) -> None:
    first = "import pathlib; pathlib.Path('stage/part').write_text('first '); raise SystemExit(1)"
    resumption = Resumption(command=(sys.executable, "-c", GO_ON), needs=tmp_path / "stage" / "part")
    stage = Stage(name="s", folder=tmp_path / "stage", command=(sys.executable, "-c", first), resumption=resumption)
    with pytest.raises(RuntimeError, match="must end with 0"):
        _run(stage)
    _runner(tmp_path).run_in([stage], places=[Place(device="0", at_once=4)])
    assert stage.at_once == (1, 4)


def test_a_result_that_does_not_say_how_many_ran_was_alone(count: Stage) -> None:
    _run(count)
    marker = count.folder / MARKER
    content = json.loads(marker.read_text())
    assert content.pop("at_once") == [1]
    marker.write_text(json.dumps(content))
    assert count.at_once == (1,)


def test_an_interrupted_stage_that_does_not_say_how_many_ran_was_alone(tmp_path: Path) -> None:
    first = "import pathlib; pathlib.Path('stage/part').write_text('first '); raise SystemExit(1)"
    resumption = Resumption(command=(sys.executable, "-c", GO_ON), needs=tmp_path / "stage" / "part")
    stage = Stage(name="s", folder=tmp_path / "stage", command=(sys.executable, "-c", first), resumption=resumption)
    two = Place(device="0", at_once=2)
    with pytest.raises(RuntimeError, match="must end with 0"):
        _runner(tmp_path).run(stage, place=two)
    begun = stage.folder / BEGUN
    content = json.loads(begun.read_text())
    assert content.pop("at_once") == [2]
    begun.write_text(json.dumps(content))
    _runner(tmp_path).run(stage, place=two)
    assert stage.at_once == (1, 2)


def test_nothing_begins_once_all_are_being_ended(tmp_path: Path) -> None:
    running = Running()
    running.stop()
    with pytest.raises(RuntimeError, match="may not begin when others are being ended"):
        running.begin(["true"], environment={}, folder=tmp_path)


GO_ON = "import pathlib; p = pathlib.Path('stage/part'); p.write_text(p.read_text() + 'second ')"


@pytest.mark.parametrize(("left", "text"), [(True, "first second "), (False, "first ")])
def test_an_interrupted_stage_goes_on_with_what_its_command_left(left: bool, text: str, tmp_path: Path) -> None:
    """Without what the other command needs the stage begins anew, and fails again."""
    first = "import pathlib; pathlib.Path('stage/part').write_text('first '); raise SystemExit(1)"
    needs = tmp_path / "stage" / ("part" if left else "checkpoint")
    resumption = Resumption(command=(sys.executable, "-c", GO_ON), needs=needs)
    stage = Stage(name="s", folder=tmp_path / "stage", command=(sys.executable, "-c", first), resumption=resumption)
    with pytest.raises(RuntimeError, match="must end with 0"):
        _run(stage)
    if left:
        assert _run(stage)
    else:
        with pytest.raises(RuntimeError, match="must end with 0"):
            _run(stage)
    assert (tmp_path / "stage" / "part").read_text() == text


def test_a_stage_whose_settings_changed_does_not_go_on(tmp_path: Path) -> None:
    first = "import pathlib; pathlib.Path('stage/part').write_text('first '); raise SystemExit(1)"
    resumption = Resumption(command=(sys.executable, "-c", GO_ON), needs=tmp_path / "stage" / "part")
    stage = Stage(name="s", folder=tmp_path / "stage", command=(sys.executable, "-c", first), resumption=resumption)
    for attempt in (stage, replace(stage, made_with="other")):
        with pytest.raises(RuntimeError, match="must end with 0"):
            _run(attempt)
    assert (tmp_path / "stage" / "part").read_text() == "first "


def test_a_command_gets_its_stages_threads(tmp_path: Path) -> None:
    code = "import os; assert os.environ['OMP_NUM_THREADS'] == '3'"
    assert _run(replace(_python("threads", code, folder=tmp_path), threads=3))


def test_the_time_of_a_stage_stands_in_its_marker(tmp_path: Path) -> None:
    stage = _python("sleeps", "import time; time.sleep(.2)", folder=tmp_path)
    _run(stage)
    assert 0.2 < stage.seconds < 30
    assert json.loads((stage.folder / BEGUN).read_text())["seconds"] == stage.seconds
