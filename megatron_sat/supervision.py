"""Keep a job alive: start it again when it fails, from its last checkpoint, as long as it gets further.

A failure after which a new checkpoint is there costs nothing but time, so only failures in a row without one are
counted, and waited for longer and longer. What trying again cannot mend is not tried again: a command that cannot be
obeyed, a step that cannot be trusted. Asked to make room (SIGTERM, SIGUSR1, Ctrl-C) the job is asked in turn, by its
`stop` file, which also reaches ranks behind a launcher that passes no signals on and swallows exit codes.

Nothing of torch is imported: this process waits, and should weigh nothing.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_sat.checkpoint.folder import iterations

STOP_FILE = "stop"
"""As `training.requests` has it; a test compares."""
FINAL = {0: "it is at its end", 2: "it cannot be obeyed", 3: "a step cannot be trusted"}
"""Exit codes of `pretrain_sat.py` after which another try is of no use."""
ASKED_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LONGEST_WAIT = 600.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often, and after how long, a job is started again."""

    tries: int = 5
    """Failures in a row without a new checkpoint, at least 1, after which it is given up."""
    backoff_seconds: float = 10.0
    """Wait after the first of them, at least 0; doubled after each, up to ten minutes."""
    grace_seconds: float = 300.0
    """What a job that is asked to end gets to save, at least 0, before it is terminated."""
    requeue_exit_code: int = 75
    """Returned when it was asked to make room."""

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"--tries must be at least 1, got {self.tries}; leave it out")
        for name in ("backoff_seconds", "grace_seconds"):
            if not getattr(self, name) >= 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 0, got {getattr(self, name)}; leave it out")

    def wait_after(self, failures: int) -> float:
        """Seconds before the next try."""
        return min(LONGEST_WAIT, self.backoff_seconds * 2 ** (failures - 1)) if failures else 0.0


def folder_of(command: Sequence[str]) -> Path:
    """The folder of --save in a command that goes on from it. Raises ValueError where it would not."""
    said = {flag: _value(command, flag) for flag in ("--save", "--load")}
    if said["--save"] is None or said["--load"] != said["--save"]:
        raise ValueError(
            "a supervised command needs --save DIR --load DIR, the same folder, to go on where it was, got "
            + ", ".join(f"{flag} {value or 'not given'}" for flag, value in said.items())
            + "; add them, or name the folder with supervise.py --folder where a file of settings does"
        )
    return Path(said["--save"])


def _value(command: Sequence[str], flag: str) -> str | None:
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


class Supervisor:
    """One job, from its first start to its end."""

    def __init__(self, command: Sequence[str], *, folder: Path, patience: Patience, say: Callable[[str], None]) -> None:
        self._command, self._folder, self._patience, self._say = list(command), folder, patience, say
        self._asked: float | None = None

    def run(self) -> int:
        """Until it is done, given up, or asked to make room. Returns the exit code."""
        failures = 0
        with self._listening():
            while True:
                before = self._newest()
                code = self._once()
                if self._asked is not None:
                    self._say(f"asked to make room: step {self._newest()} is saved, the job ended with {code}")
                    return self._patience.requeue_exit_code
                if code in FINAL:
                    self._say(f"the job ended with {code}: {FINAL[code]}")
                    return code
                failures = 1 if self._newest() != before else failures + 1
                if failures >= self._patience.tries and self._newest() == before:
                    self._say(f"given up after {failures} failures at step {before}, the last with {code}")
                    return code if code > 0 else 1
                wait = self._patience.wait_after(failures)
                self._say(f"the job ended with {code} at step {self._newest()}; it is started again in {wait:g} s")
                self._sleep(wait)
                if self._asked is not None:
                    return self._patience.requeue_exit_code

    def _once(self) -> int:
        job = subprocess.Popen(self._command, start_new_session=True)  # Ctrl-C is ours to pass on
        stop = self._folder / STOP_FILE
        try:
            while True:
                try:
                    return job.wait(0.2)
                except subprocess.TimeoutExpired:
                    pass
                if self._asked is None:
                    continue
                if time.monotonic() - self._asked > self._patience.grace_seconds:
                    job.terminate()
                elif not stop.exists() and self._folder.is_dir():
                    stop.touch()
        finally:
            stop.unlink(missing_ok=True)

    def _newest(self) -> int:
        return max(iterations(self._folder), default=0)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._asked is None and time.monotonic() < end:
            time.sleep(0.1)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in ASKED_BY}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = self._asked or time.monotonic()
