"""kill -9 of a rank at any moment, also while a checkpoint is written: the run goes on as if nothing had happened."""

import random
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_sat.checkpoint.folder import TRACKER
from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.pretrain import main
from tests.helpers.killing import a_moment, job, wait_for
from tests.helpers.program import SPARSE, Text, read_records
from tests.helpers.ranks import run_ranks

RUN = f"{SPARSE} --sat-statistics lagged --hidden-dropout 0.1 --use-distributed-optimizer --save-interval 2"
PATIENCE = 120.0
"""Seconds for anything that must happen, on a busy machine."""


def command(text: Text, folder: Path, *, steps: int, more: str = "") -> list[str]:
    flags = f"{RUN} --train-iters {steps} --eval-interval 8 --save-keep-last 2 --save {folder} --load {folder} {more}"
    return text.command(flags)


def whole(_: int, folder: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint: weights, moments, choices, random states."""
    tensors = dist_checkpointing.load_plain_tensors(str(open_checkpoint(folder).folder))
    return {name: t.contiguous().view(-1).numpy().tobytes() for name, t in tensors.items() if isinstance(t, Tensor)}


def undisturbed(text: Text, folder: Path, *, steps: int, more: str = "") -> dict[str, bytes]:
    with job(main, [*command(text, folder, steps=steps), *more.split()], ranks=2) as running:
        assert running.wait(PATIENCE) == [0, 0], running.said()
    return run_ranks(whole, 1, folder)[0]


def kill_once(argv: list[str], folder: Path, chance: random.Random) -> bool:
    """Start or go on, and kill a random rank at a random moment; False where the run came to its end before.

    Half of the moments lie inside the writing of a checkpoint, the others anywhere from the first step on.
    """
    lines = len(read_records(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else 0

    def goes_on() -> bool:
        path = folder / "metrics.jsonl"
        return path.exists() and len(path.read_bytes().splitlines()) > lines

    with job(main, argv, ranks=2) as running:
        if chance.random() < 0.5:
            wait_for(lambda: any(folder.glob("*.unfinished")), job=running, seconds=PATIENCE)
            a_moment(chance, up_to=0.1)
        else:
            wait_for(goes_on, job=running, seconds=PATIENCE)
            a_moment(chance, up_to=0.5)
        running.kill(chance.randrange(2))
        codes = running.wait(PATIENCE)
    if (folder / TRACKER).exists():
        open_checkpoint(folder)  # raises for anything that is not whole
    return codes != [0, 0]


def check_killed(text: Text, folder: Path, *, kills: int, steps: int, seed: int, more: str = "") -> dict[str, bytes]:
    """So many kills, in as many runs as they need; each run ends as the undisturbed one, which is returned.

    more: flags of the runs that are killed, under which they should end all the same.
    """
    expected = undisturbed(text, folder / "undisturbed", steps=steps)
    losses = [line["loss"] for line in read_records(folder / "undisturbed" / "metrics.jsonl")]
    chance, done, run = random.Random(seed), 0, 0
    while done < kills:
        run += 1
        at = folder / f"run{run}"
        argv = command(text, at, steps=steps, more=more)
        while done < kills and kill_once(argv, at, chance):
            done += 1
        with job(main, argv, ranks=2) as running:
            assert running.wait(PATIENCE) == [0, 0], running.said()
        assert run_ranks(whole, 1, at)[0] == expected, f"run {run}, seed {seed}, after {done} kills"
        lines = read_records(at / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert [line["loss"] for line in lines] == losses
        assert not list(at.glob("*.unfinished")) and not list(at.glob("*.aside"))
    return expected


def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one_bit_for_bit(text: Text, tmp_path: Path) -> None:
    """And one of another seed does not."""
    expected = check_killed(text, tmp_path, kills=2, steps=8, seed=1)
    other = undisturbed(text, tmp_path / "other", steps=8, more="--sat-seed 2")
    assert other.keys() == expected.keys() and other != expected


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_killed_fifty_times_ends_as_the_undisturbed_one_bit_for_bit(text: Text, tmp_path: Path) -> None:
    check_killed(text, tmp_path, kills=50, steps=60, seed=2)
