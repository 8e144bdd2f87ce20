"""Where stages are made: this machine, its interpreter, and the project's commands as stages of a comparison.

Which stages there are, and in which order they run, is the part of `lab` and of `trip`.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sat.compare.provenance import libraries, machine
from megatron_sat.compare.stages import LOG, Resumption, Stage

TRACKER = "latest_checkpointed_iteration.txt"
"""In the folder of a run that has saved."""
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, Slurm's wrapper and DeepSpeed's launcher say to a rank, as `distributed` reads it."""
_OF_TOKENIZERS = ("*.json", "*.model", "*.txt")
"""Files of a Hugging Face folder, small ones, that decide what its tokenizer makes of a text."""
PROGRAM = ("pretrain_sat.py",)
"""What a training run starts, after the interpreter or torchrun."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where commands run, and what they run on."""

    root: Path
    """The project's folder, in which all commands run."""
    python: str
    """The interpreter."""
    made_with: str
    """Machine and libraries: results of others are made again."""
    cores: int
    """Of this machine."""
    jobs: int
    """Stages at once, where they may."""

    def named(self, path: Path) -> str:
        """A path as commands say it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def stage(
        self, name: str, folder: Path, *command: str, after: Sequence[Stage] = (), reads: Sequence[Path] = ()
    ) -> Stage:
        """A stage that others may run beside."""
        threads = max(1, self.cores // self.jobs)
        return Stage(
            name=name,
            folder=folder,
            command=(self.python, *command),
            reads=tuple(reads),
            made_with=self.made_with,
            after=tuple(after),
            threads=threads,
        )

    def prepare(
        self, folder: Path, files: Mapping[str, Sequence[Path]], *, tokenizer: Path, after: Sequence[Stage] = ()
    ) -> Stage:
        """Token ids of text; one data set for each name, in folder/data."""
        every = [path for paths in files.values() for path in paths]
        is_made = any(tokenizer.is_relative_to(stage.folder) for stage in after)
        stage = self.stage(
            folder.name,
            folder,
            *("-m", "megatron_sat.compare.prepare", "--tokenizer", self.named(tokenizer)),
            *("--output", self.named(folder / "data")),
            *(f"{name}={self.named(path)}" for name, paths in files.items() for path in paths),
            after=after,
            reads=[*every, *([] if is_made else tokenizer_files(tokenizer))],
        )
        return replace(stage, resumption=Resumption(command=stage.command, needs=folder / LOG))

    def training(
        self,
        name: str,
        folder: Path,
        *flags: str,
        ranks: int,
        configs: Sequence[Path],
        after: Sequence[Stage],
        program: Sequence[str] = PROGRAM,
    ) -> Stage:
        """A training run in ``folder``; nothing else may use its device, for its time counts.

        configs: files of settings; what no stage before it makes decides the result.
        """
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
        stage = self.stage(
            name,
            folder,
            *(*launch, *program, "--config", *map(self.named, configs)),
            *flags,
            after=after,
            reads=[path for path in configs if not any(path.is_relative_to(stage.folder) for stage in after)],
        )
        return replace(stage, threads=max(1, self.cores // ranks))


def tokenizer_files(tokenizer: Path) -> list[Path]:
    """What decides the tokens of a text: the file itself, or what a folder holds of it."""
    if tokenizer.is_file():
        return [tokenizer]
    return sorted(path for pattern in _OF_TOKENIZERS for path in tokenizer.glob(pattern))


def this_machine(root: Path, *, jobs: int | None) -> Workshop:
    """The workshop of this process. jobs: stages at once; None: as many as cores, at most four.

    Raises ValueError for fewer than one.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}; leave it out")
    cores = cores_here()
    made_with = f"{machine()}; {libraries()}"
    return Workshop(
        root=root, python=sys.executable, made_with=made_with, cores=cores, jobs=jobs or min(4, cores)
    )


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def environment_of(own: Mapping[str, str]) -> dict[str, str]:
    """What commands find in their environment: ``own``, quiet, and without threads that spin while they wait.

    Spinning costs minutes where other programs want the cores. What a launcher said to this process is not for them:
    two at once would meet at one port. One process opens none; torchrun says to several what they need.
    """
    kept = {name: value for name, value in own.items() if name not in _LAUNCHERS}
    return {**kept, "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}


def end_well(name: str, main: Callable[[Sequence[str]], int | None], *, wrong: int = 1) -> None:
    """Run ``main`` and exit with its code; what a user can mend is one line, and stopping stops the commands too.

    wrong: the exit code of what went wrong or was interrupted.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:
        said = str(error)
    except KeyboardInterrupt:
        said = "interrupted; the same command goes on where it was"
    sys.stderr.write(f"{name}: {said}\n")
    sys.exit(wrong)
