"""Saving: a checkpoint gets its name when it is whole, and old ones go when they are told to."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sat.checkpoint import saving
from megatron_sat.checkpoint.folder import TRACKER, iterations
from megatron_sat.checkpoint.resume import open_checkpoint
from tests.checkpoint.runs import BF16, LATE, save, to_the_end
from tests.helpers.plain_engine import make_engine
from tests.helpers.ranks import run_ranks


def test_saving_changes_nothing(tmp_path: Path) -> None:
    settings = {"ddp": LATE, "model": BF16}
    assert run_ranks(to_the_end, 2, settings, tmp_path) == run_ranks(to_the_end, 2, settings, None)


def crash(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1)
    true = saving.dist_checkpointing.save  # type: ignore[attr-defined]

    def dies(*args: Any, **kwargs: Any) -> None:
        true(*args, **kwargs)
        raise OSError("no space left")

    saving.dist_checkpointing.save = dies  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="no space"):
        save(engine, layout, root, iteration=2)
    saving.dist_checkpointing.save = true  # type: ignore[attr-defined]


def save_three(rank: int, root: Path, keep_last: int | None) -> None:
    engine, layout = make_engine()
    for iteration in (2, 3, 4):
        save(engine, layout, root, iteration=iteration, keep_last=keep_last)
    save(engine, layout, root, iteration=4, keep_last=keep_last)  # again: replaced


def test_a_crash_while_saving_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    run_ranks(crash, 2, tmp_path)
    assert iterations(tmp_path) == [1]
    assert open_checkpoint(tmp_path).iteration == 1
    run_ranks(save_three, 1, tmp_path, None)
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"iter_000000{i}" for i in (1, 2, 3, 4)),
        TRACKER,
    ], "nothing unfinished is left"


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (9, [2, 3, 4])])
def test_the_last_checkpoints_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    run_ranks(save_three, 1, tmp_path, keep)
    assert iterations(tmp_path) == left
    assert open_checkpoint(tmp_path).iteration == 4


def keep_none(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1, keep_last=0)


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--save-keep-last must be at least 1, got 0"):
        run_ranks(keep_none, 1, tmp_path)
