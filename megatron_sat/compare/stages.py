"""Work in stages that survives interruption: a command, the folder it fills, and a marker written last.

A stage whose marker stands is not run again, unless its command, a file that it reads, what it is made with, or a
stage before it changed. One that was interrupted begins anew, or goes on where its command can. What a command says
goes into ``log.txt`` of its folder. Stages that need each other's results are run one after the other; others may
run at once, wherever there is room, or each in a place of its own.
"""

import hashlib
import json
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sat.log import say
from megatron_sat.turns import TURN

MARKER = "done.json"
BEGUN = "begun.json"
LOG = "log.txt"
_LEFT = ".to-be-removed"
"""How a folder is called from when it is given up until it is deleted: a dot, its name, and this."""


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """How an interrupted stage goes on."""

    command: tuple[str, ...]
    """Program and arguments, instead of the stage's own."""
    needs: Path
    """What an interrupted command must have left for that; without it the stage begins anew."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stage runs, and beside how many."""

    device: str | None = None
    """CUDA_VISIBLE_DEVICES of the command; None: what the runner's environment says."""
    at_once: int = 1
    """Stages in all such places together. Those on a device share the cores out among them."""
    turn: Path | None = None
    """The places with this file take turns: a stage begins, and trains when no other one of theirs does."""

    def threads(self, own: int) -> int:
        """OMP_NUM_THREADS of a stage that alone would have ``own``."""
        return own if self.device is None else max(1, own // self.at_once)


ALONE = Place()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command and what its result depends on."""

    name: str
    """What the console calls it."""
    folder: Path
    """What it fills, its own alone; emptied before the command begins."""
    command: tuple[str, ...]
    """Program and arguments."""
    reads: tuple[Path, ...] = ()
    """Files whose content decides the result. Folders and missing files are errors."""
    made_with: str = ""
    """Whatever else decides the result, such as the versions of libraries."""
    after: tuple["Stage", ...] = ()
    """Stages whose results it uses."""
    resumption: Resumption | None = None
    """None: an interrupted one begins anew."""
    threads: int = 1
    """OMP_NUM_THREADS of the command and all that it starts, where it has the machine to itself."""

    @property
    def key(self) -> str:
        """Hex digest of all that the result depends on. Raises ValueError for a file that cannot be read."""
        digest = hashlib.sha256(json.dumps([*self.command, self.made_with]).encode())
        for path in self.reads:
            digest.update(_content_digest(path))
        for stage in self.after:
            digest.update(stage.key.encode())
        return digest.hexdigest()

    @property
    def is_done(self) -> bool:
        """Whether its folder holds the result of just this command on just these inputs."""
        return _key_in(self.folder / MARKER) == self.key

    @property
    def seconds(self) -> float:
        """How long the command took that made the result; the stage is done."""
        return float(_content(self.folder / MARKER)["seconds"])

    @property
    def at_once(self) -> tuple[int, ...]:
        """How many stages were run at once when this one was, itself counted; the stage is done.

        Several numbers where it was interrupted and went on beside more or fewer.
        """
        return tuple(_content(self.folder / MARKER).get("at_once", [1]))  # of older results: they were alone


class Running:
    """The commands at work, so that whoever gives up can end them."""

    def __init__(self) -> None:
        self._lock, self._processes, self._stopped = threading.Lock(), set[subprocess.Popen[str]](), False

    def begin(self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
        """Start a command in ``folder``; what it says, errors too, is to be read from it."""
        with self._lock:
            if self._stopped:
                raise RuntimeError("a stage may not begin when others are being ended; start again")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._processes.add(process)
            return process

    def end(self, process: subprocess.Popen[str]) -> None:
        """Make sure that it is over."""
        if process.poll() is None:
            process.terminate()
            process.wait()
        with self._lock:
            self._processes.discard(process)

    def stop(self) -> None:
        """End all, and let none begin."""
        with self._lock:
            self._stopped = True
            processes = tuple(self._processes)
        for process in processes:
            process.terminate()


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs stages, all in the same way."""

    environment: Mapping[str, str]
    """Of the commands, whole but for the number of threads and the device of a place."""
    shown: Callable[[str], bool]
    """Which of a command's lines are said as they come."""
    working_folder: Path
    """Where commands run."""
    jobs: int = 1
    """Stages at once, where `run_all` is asked for several."""
    running: Running = field(default_factory=Running)

    def run(self, stage: Stage, *, place: Place = ALONE) -> bool:
        """Run the stage unless it is done; returns whether it ran.

        Raises RuntimeError with the end of the log when the command fails, and ValueError where the folder holds
        something that no stage left; the command is ended when this process is interrupted.
        """
        if stage.is_done:
            say(f"{stage.name}: done before, kept ({stage.folder})")
            return False
        key = stage.key
        resumption = stage.resumption
        resumed = resumption is not None and _key_in(stage.folder / BEGUN) == key and resumption.needs.exists()
        command = resumption.command if resumption is not None and resumed else stage.command
        say(f"{stage.name}: {'going on: ' if resumed else ''}{shlex.join(command)}")
        earlier: dict[str, Any] = _content(stage.folder / BEGUN) if resumed else {"seconds": 0.0, "at_once": []}
        at_once = sorted({*earlier.get("at_once", [1]), place.at_once})
        state: dict[str, Any] = {"key": key, "at_once": at_once}
        if not resumed:
            _empty(stage.folder)
            (stage.folder / LOG).touch()
        _write(stage.folder / BEGUN, state | {"seconds": earlier["seconds"]})
        began = time.monotonic()
        code = None
        try:
            code = self._run(command, stage=stage, place=place)
        finally:
            state["seconds"] = round(earlier["seconds"] + time.monotonic() - began, 3)
            _write(stage.folder / BEGUN, state)
        if code != 0:
            raise RuntimeError(
                f"the stage {stage.name!r} must end with 0, it ended with {code}; all that it said is in "
                f"{stage.folder / LOG}, which ends:\n{_tail(stage.folder / LOG)}"
            )
        ended = datetime.now(UTC).isoformat()  # so that the same made again leaves another marker
        _write(stage.folder / MARKER, state | {"command": stage.command, "ended": ended})
        return True

    def run_all(self, stages: Sequence[Stage]) -> None:
        """Run stages, ``jobs`` at once, each when those of them that it is after are done.

        The first error ends the others. Raises what `run` raises.
        """
        if self.jobs == 1:
            for stage in stages:
                self.run(stage)
            return
        waiting, working, done = list(stages), dict[Future[bool], Stage](), set[Stage]()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or working:
                    for stage in [s for s in waiting if done.issuperset(set(s.after) & set(stages))]:
                        waiting.remove(stage)
                        working[pool.submit(self.run, stage)] = stage
                    for finished in wait(working, return_when=FIRST_COMPLETED).done:
                        finished.result()
                        done.add(working.pop(finished))
            except BaseException:
                self.running.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run_in(self, stages: Sequence[Stage], *, places: Sequence[Place]) -> None:
        """Run stages in their order, each in the place that is free first, one at a time in each place.

        Of these stages none is after another. When one fails, none begins any more, and those that were begun end as
        they will: hours of training are kept. An interruption ends all. Raises what `run` raises, of the first that
        failed, once all have ended; what others failed of is said.
        """
        assert not any(set(stage.after) & set(stages) for stage in stages)
        if len(places) == 1:
            for stage in stages:
                self.run(stage, place=places[0])
            return
        waiting, free = deque(stages), deque(places)
        working, errors = dict[Future[bool], tuple[Stage, Place]](), list[BaseException]()
        with ThreadPoolExecutor(len(places)) as pool:
            try:
                while working or (waiting and not errors):
                    while waiting and free and not errors:
                        stage, place = waiting.popleft(), free.popleft()
                        working[pool.submit(self.run, stage, place=place)] = (stage, place)
                    for finished in wait(working, return_when=FIRST_COMPLETED).done:
                        stage, place = working.pop(finished)
                        free.append(place)
                        if (error := finished.exception()) is not None:
                            errors.append(error)
                            say(f"{stage.name}: failed; what was begun goes on to its end, and nothing else begins")
            except BaseException:
                self.running.stop()
                raise
        for other in errors[1:]:
            say(str(other))
        if errors:
            raise errors[0]

    def _run(self, command: Sequence[str], *, stage: Stage, place: Place) -> int:
        whose = f"  {stage.name}: " if place.at_once > 1 or place.turn else "  "
        with (stage.folder / LOG).open("a") as log:
            environment = {**self.environment, "OMP_NUM_THREADS": str(place.threads(stage.threads))}
            if place.device is not None:
                environment["CUDA_VISIBLE_DEVICES"] = place.device
            if place.turn is not None:
                environment[TURN] = str(place.turn)
            process = self.running.begin(command, environment=environment, folder=self.working_folder)
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    if self.shown(line):
                        say(whose + line.rstrip())
                return process.wait()
            finally:  # whoever interrupts this leaves no ranks behind
                self.running.end(process)


def _write(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _key_in(path: Path) -> str | None:
    return _content(path)["key"] if path.is_file() else None


def _content_digest(path: Path) -> bytes:
    """sha256 of a file, computed again only when it changed: keys of later stages ask for it many times."""
    try:
        state = path.stat()
        return _digest(path, size=state.st_size, changed=state.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read: {error.strerror}; check the path") from error


@cache
def _digest(path: Path, *, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _empty(folder: Path) -> None:
    """Moved aside first: what an interruption leaves half deleted would be taken for somebody's files."""
    if folder.exists() and any(folder.iterdir()) and not (folder / LOG).exists():
        raise ValueError(f"{folder} must be empty or left by a stage, it holds other files; choose another folder")
    aside = folder.with_name(f".{folder.name}{_LEFT}")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        if folder.exists():
            folder.rename(aside)
            shutil.rmtree(aside)
        folder.mkdir(parents=True)
    except OSError as error:
        raise RuntimeError(
            f"{folder} must be an empty folder when its stage begins, it cannot be made one: {error}; remove or mend "
            "what that names"
        ) from error


def _tail(path: Path, *, lines: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
