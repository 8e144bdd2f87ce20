"""What a session does at each moment of the loop. The program as a whole is tested in tests/program."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.training import loop
from megatron_sat.training.metrics import StepFigures
from tests.helpers.program import LADDER, Text, open_session, prepare_text, read_records, start, trained
from tests.helpers.ranks import run_ranks

SHORT = "--train-iters 3"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return prepare_text(tmp_path_factory.mktemp("text"))


def test_without_a_folder_a_run_leaves_nothing_behind(text: Text, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in text.folder.iterdir()} | {"index-cache"}
    assert start(text.command(SHORT)).codes == [0]
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in text.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "without"), [("--eval-iters 0", "--eval-iters"), ("", "--valid-data-path")], ids=["no pass", "no text"]
)
def test_a_run_without_evaluations_trains_all_the_same(flags: str, without: str, text: Text, tmp_path: Path) -> None:
    run = trained(text.command(f"{SHORT} --eval-interval 1 {flags}", without=without), tmp_path / "metrics.jsonl")
    assert (len(run.losses), run.validation) == (3, [])


def test_an_evaluation_reads_so_many_global_batches_or_what_there_is(text: Text) -> None:
    """Of 8 samples: one pass reads 4 micro-batches; a hundred read all there are, fillers among them."""

    def counts(_: int, argv: list[str]) -> dict[str, tuple[int, int]]:
        return {name: (len(b), b.num_samples) for name, b in open_session(argv).valid.items()}

    (once,) = run_ranks(counts, 1, text.command("--eval-iters 1", without="--eval-iters"))
    assert once["religion"] == (4, 8)
    (all_there_is,) = run_ranks(counts, 1, text.command("--eval-iters 100", without="--eval-iters"))
    micro_batches, samples = all_there_is["religion"]
    assert 8 < samples < 800
    assert micro_batches == -(-samples // 2)


def hurried(rank: int, argv: list[str]) -> int:
    """Rank 0's clock runs a minute at each look, the other's stands still."""
    looks = iter(range(0, 6000, 60))
    loop.time.monotonic = (lambda: float(next(looks))) if rank == 0 else (lambda: 0.0)  # type: ignore[assignment]
    session = open_session(argv)
    session.train()
    return session.progress.iteration


def test_all_ranks_stop_when_rank_0_says_that_time_is_up(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--exit-duration-in-mins 2 --save {tmp_path}")
    assert run_ranks(hurried, 2, argv) == [3, 3]
    assert open_checkpoint(tmp_path).iteration == 3


def totals(_: int, argv: list[str]) -> tuple[float, list[float]]:
    session = open_session(argv)
    seen: list[float] = []
    true = session.meter.add

    def told(figures: StepFigures) -> None:
        seen.append(figures.seconds)
        true(figures)

    session.meter.add = told  # type: ignore[method-assign]
    session.train()
    return session.meter.totals.elapsed_seconds, seen


def test_a_steps_time_is_rank_0s_on_all_ranks_and_adds_up(text: Text, tmp_path: Path) -> None:
    (one, seconds), (two, same) = run_ranks(totals, 2, text.command(f"{SHORT} --save {tmp_path}"))
    assert (one, seconds) == (two, same)
    assert one == pytest.approx(sum(seconds))
    header = open_checkpoint(tmp_path).header
    assert header is not None
    assert header.extra["totals"]["elapsed_seconds"] == one


def test_a_checkpoint_carries_the_configuration_and_what_decides_the_samples(text: Text, tmp_path: Path) -> None:
    assert start(text.command(f"{SHORT} {LADDER} --sat-schedule-start 2 --save {tmp_path}")).codes == [0]
    header = open_checkpoint(tmp_path).header
    assert header is not None
    assert (header.iteration, header.consumed_train_samples) == (3, 24)
    assert header.config["sat_omission_rate"] == "0.5"
    assert header.data["--train-iters x --global-batch-size"] == 24
    assert header.data["--seed"] == 1234
    assert sum(header.data["shares"].values()) == pytest.approx(1.0)
    assert set(header.data["shares"]) == {"poetry", "en"}


def test_a_run_says_where_it_saves_and_from_where_it_goes_on(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SHORT} --save {tmp_path} --load {tmp_path}")
    first, second = start([*argv, "--exit-interval", "2"]), start(argv)
    assert f"{tmp_path} holds no checkpoint: this run starts afresh" in first.out
    assert f"step      2 | saved to {tmp_path}" in first.out
    assert f"resumed from {tmp_path}/iter_0000002 at step 2" in second.out


def test_a_resumed_run_says_which_of_the_methods_settings_it_changes(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SHORT} {LADDER} --sat-schedule-start 2 --save {tmp_path} --load {tmp_path}")
    assert start([*argv, "--exit-interval", "1"]).codes == [0]
    changed = start([*argv, "--exit-interval", "2", "--sat-temperature", "0.1"])
    assert changed.codes == [0], changed.err
    assert "note: sat_temperature was 0.05 in the checkpoint's run and is 0.1 from here on" in changed.out
    assert "in the checkpoint's run" not in start([*argv, "--sat-temperature", "0.1"]).out


def test_the_last_checkpoints_are_kept_and_the_others_go(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--train-iters 4 --save {tmp_path} --save-interval 1 --save-keep-last 2")
    assert start(argv).codes == [0]
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000003", "iter_0000004"}


@pytest.mark.parametrize("flag", ["--no-save-optim", "--no-save-rng"])
def test_a_checkpoint_leaves_out_what_it_is_told_to(flag: str, text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SHORT} --save {tmp_path} --load {tmp_path}")
    assert start([*argv, "--exit-interval", "2", flag]).codes == [0]
    opened = open_checkpoint(tmp_path)
    assert any(key.startswith("optimizer.") for key in opened.shapes) == (flag != "--no-save-optim")
    assert any(key.startswith("sat_rng.") for key in opened.shapes) == (flag != "--no-save-rng")
    again = start(argv)
    if flag == "--no-save-optim":
        assert again.codes == [2]
        assert "the checkpoint has no optimizer state; pass --no-load-optim" in again.err
        again = start([*argv, "--no-load-optim"])
    assert again.codes == [0], again.err


def drawn(_: int, argv: list[str]) -> bytes:
    """The state of torch's generator when training would begin."""
    with redirect_stdout(io.StringIO()):
        open_session(argv)
    return torch.get_rng_state().numpy().tobytes()


def test_random_states_are_the_checkpoints_unless_told_otherwise(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SHORT} --hidden-dropout 0.1 --save {tmp_path} --load {tmp_path}")
    fresh = run_ranks(drawn, 1, argv)
    assert start([*argv, "--exit-interval", "2"]).codes == [0]
    resumed = run_ranks(drawn, 1, argv)
    assert resumed != fresh
    assert run_ranks(drawn, 1, [*argv, "--no-load-rng"]) == fresh


def test_every_rank_reads_its_own_samples_and_all_read_each_once(text: Text) -> None:
    def read(_: int, argv: list[str]) -> list[tuple[int, ...]]:
        micro_batches = open_session(argv).batches(0)
        return [tuple(row) for _ in range(4) for row in next(micro_batches)["tokens"].tolist()]

    argv = text.command("--global-batch-size 16")
    (alone,) = run_ranks(read, 1, [*argv, "--micro-batch-size", "4"])
    one, two = run_ranks(read, 2, argv)
    assert not set(one) & set(two)
    assert set(one) | set(two) == set(alone)
    assert len(set(alone)) == 16


def test_losses_are_logged_as_means_over_the_window(text: Text, tmp_path: Path) -> None:
    each = trained(text.command(), tmp_path / "each.jsonl")
    windows = trained(text.command("--log-interval 3", without="--log-interval"), tmp_path / "windows.jsonl")
    assert windows.losses == pytest.approx([sum(each.losses[:3]) / 3, sum(each.losses[3:6]) / 3, each.losses[6]])
    assert [line["step"] for line in read_records(tmp_path / "windows.jsonl")] == [3, 6, 7]
    assert windows.weights == each.weights
