"""Work in stages that survives interruption: a command, the folder it fills, and a marker written last.

A stage whose marker stands is not run again, unless its command, a file that it reads, what it is made with, or a
stage before it changed. One that was interrupted begins anew. What a command says goes into ``log.txt`` of its folder.
"""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sat.log import say

MARKER = "done.json"
LOG = "log.txt"


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

    @property
    def key(self) -> str:
        """Hex digest of all that the result depends on."""
        digest = hashlib.sha256(json.dumps([*self.command, self.made_with]).encode())
        for path in self.reads:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        for stage in self.after:
            digest.update(stage.key.encode())
        return digest.hexdigest()

    @property
    def is_done(self) -> bool:
        """Whether its folder holds the result of just this command on just these inputs."""
        marker = self.folder / MARKER
        return marker.is_file() and json.loads(marker.read_text())["key"] == self.key


def run_stage(
    stage: Stage, *, environment: Mapping[str, str], shown: Callable[[str], bool], working_folder: Path
) -> bool:
    """Run the stage unless it is done; returns whether it ran.

    environment: of the command, whole. shown: which of its lines are said as they come. Raises RuntimeError
    with the end of the log when the command fails, and ValueError where the folder holds something that no
    stage left; the command is ended when this process is interrupted.
    """
    if stage.is_done:
        say(f"{stage.name}: done before, kept ({stage.folder})")
        return False
    say(f"{stage.name}: {' '.join(stage.command)}")
    _empty(stage.folder)
    key = stage.key
    code = _run(stage, environment=environment, shown=shown, working_folder=working_folder)
    if code != 0:
        raise RuntimeError(
            f"the stage {stage.name!r} must end with 0, it ended with {code}; all that it said is in "
            f"{stage.folder / LOG}, which ends:\n{_tail(stage.folder / LOG)}"
        )
    fresh = stage.folder / (MARKER + ".new")
    fresh.write_text(json.dumps({"key": key, "command": stage.command}, indent=1) + "\n")
    fresh.replace(stage.folder / MARKER)
    return True


def _run(stage: Stage, *, environment: Mapping[str, str], shown: Callable[[str], bool], working_folder: Path) -> int:
    with (stage.folder / LOG).open("w") as log:
        process = subprocess.Popen(
            stage.command,
            cwd=working_folder,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if shown(line):
                    say("  " + line.rstrip())
            return process.wait()
        finally:  # an interrupted demo leaves no ranks behind
            if process.poll() is None:
                process.terminate()
                process.wait()


def _empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / LOG).exists():
        raise ValueError(f"{folder} must be empty or left by a stage, it holds other files; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _tail(path: Path, *, lines: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
