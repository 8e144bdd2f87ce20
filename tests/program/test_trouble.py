"""A full disk, a folder that cannot be written, data or settings that changed: each one clear line, nothing lost."""

import fcntl
import hashlib
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sat import pretrain
from megatron_sat.checkpoint.folder import iterations
from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.turns import TURN
from tests.helpers.killing import job
from tests.helpers.program import Text, digests, open_session, read_records, start
from tests.helpers.ranks import run_ranks

PATIENCE = 120.0
SAVES = "--save-interval 2 --train-iters 6"
DISTRIBUTED = "--use-distributed-optimizer"


def fills_up(argv: list[str]) -> int:
    """The program, on whose rank 1 no file can grow past 16 KiB from step 3 on, as on a disk that is full."""
    true = pretrain.Session.stepped

    def stepped(self: pretrain.Session, step: int, *args: object) -> None:
        true(self, step, *args)  # type: ignore[arg-type]
        if step == 3 and self.run.layout.dp_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))

    pretrain.Session.stepped = stepped  # type: ignore[method-assign, assignment]
    return pretrain.main(argv)


def weights(_: int, argv: list[str]) -> dict[str, str]:
    session = open_session(argv)
    session.train()
    return digests(session)


def test_a_full_disk_is_said_once_and_costs_what_came_after_the_last_checkpoint(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SAVES} {DISTRIBUTED} --save {tmp_path} --load {tmp_path}")
    with job(fills_up, argv, ranks=2) as running:
        assert running.wait(PATIENCE) == [4, 4], running.said()
        (line,) = [line for line in running.said().splitlines() if line.startswith("error")]
    assert line.startswith(f"error: the checkpoint of step 4 must be written to {tmp_path}, it cannot: rank 1: ")
    assert line.endswith("File too large; make room or choose another --save; that of step 2 is whole: resume from it")
    assert iterations(tmp_path) == [2]
    assert not list(tmp_path.glob("*.unfinished")), "its room is given back"
    resumed = run_ranks(weights, 2, argv)
    assert resumed == run_ranks(weights, 2, text.command(f"{SAVES} {DISTRIBUTED}"))


def loses_its_folder(argv: list[str]) -> int:
    """The program, whose folder becomes a file before the second checkpoint, as one that cannot be written."""
    true = pretrain.Session.stepped
    folder = Path(argv[argv.index("--save") + 1])

    def stepped(self: pretrain.Session, step: int, *args: object) -> None:
        true(self, step, *args)  # type: ignore[arg-type]
        if step == 4 and self.run.layout.dp_rank == 0:
            folder.rename(folder.with_name("elsewhere"))
            folder.write_text("in the way\n")

    pretrain.Session.stepped = stepped  # type: ignore[method-assign, assignment]
    return pretrain.main(argv)


def test_a_folder_that_can_no_longer_be_written_is_said_once(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SAVES} --log-interval 9 --save {tmp_path / 'save'}", without="--log-interval")
    with job(loses_its_folder, argv, ranks=2) as running:
        assert running.wait(PATIENCE) == [4, 4], running.said()
        (line,) = [line for line in running.said().splitlines() if line.startswith("error")]
    assert f"the checkpoint of step 4 must be written to {tmp_path / 'save'}, it cannot: File exists; make room" in line
    assert line.endswith("none is there yet: start again")
    assert open_checkpoint(tmp_path / "elsewhere").iteration == 2


@pytest.fixture(scope="module")
def begun(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped half-way, and the data it read."""
    folder = tmp_path_factory.mktemp("begun")
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(text.prefix("zh/poetry") + suffix, folder / f"poetry{suffix}")
    ended = start(resumed(text, folder, "--exit-interval 4"))
    assert ended.codes == [0], ended.err
    return folder


def resumed(text: Text, folder: Path, more: str = "") -> list[str]:
    data = f"--train-data-path 0.5 poetry={folder / 'poetry'} 0.5 en={text.prefix('en/technology')}"
    save = f"--save {folder / 'save'} --load {folder / 'save'}"
    return text.command(f"{SAVES} {data} {save} {more}", without="--train-data-path")


def contents(folder: Path) -> dict[str, str]:
    """Every file, but for the lock of the index caches."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def cut_short(folder: Path) -> None:
    path = folder / "poetry.bin"
    path.write_bytes(path.read_bytes()[:-100])


def of_another_tokenizer(folder: Path) -> None:
    side = json.loads((folder / "poetry.json").read_text())
    (folder / "poetry.json").write_text(json.dumps(side | {"fingerprint": "0" * 64}))


def longer(folder: Path) -> None:
    """Two documents fewer in the same file: other text under the same name."""
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"poetry{suffix}").unlink()


TROUBLE: dict[str, tuple[Callable[[Path], None] | None, str, int, str]] = {
    "data cut short": (cut_short, "", 1, "poetry.idx is corrupt: it must describe poetry.bin to its end"),
    "another tokenizer's data": (of_another_tokenizer, "", 1, "data and training must have one tokenizer"),
    "data that are gone": (longer, "", 1, "poetry.bin does not exist"),
    "another blend": (
        None,
        "--train-data-path 0.6 poetry={0}/poetry 0.4 en={1}",
        1,
        "the data of a resumed run must be as they were, shares.poetry was 0.5, got 0.6",
    ),
    "another order of the blend": (
        None,
        "--train-data-path 0.5 en={1} 0.5 poetry={0}/poetry",
        1,
        "the data of a resumed run must be as they were, order was",
    ),
    "a batch that the ranks do not divide": (
        None,
        "--micro-batch-size 3",
        1,
        "--global-batch-size (8) must be a multiple of --micro-batch-size x replicas (3 x 1); try 9",
    ),
    "ranks that the layout does not divide": (
        None,
        "--tensor-model-parallel-size 2",
        3,
        "the number of ranks (3) must be a multiple of",
    ),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_a_resume_that_does_not_fit_is_one_line_and_overwrites_nothing(
    case: str, text: Text, begun: Path, tmp_path: Path
) -> None:
    harm, more, ranks, said = TROUBLE[case]
    folder = tmp_path / "copy"
    shutil.copytree(begun, folder)
    if harm is not None:
        harm(folder)
    before = contents(folder)
    ended = start(resumed(text, folder, more.format(folder, text.prefix("en/technology"))), ranks=ranks)
    assert ended.codes == [2] * ranks
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and said in line
    assert contents(folder) == before


def test_another_number_of_ranks_goes_on(text: Text, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "copy")
    ended = start(resumed(text, tmp_path / "copy"), ranks=2)
    assert ended.codes == [0, 0], ended.err
    assert [line["step"] for line in read_records(tmp_path / "copy" / "save" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_to_queue_does(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the file trains; this one was free, and is free again."""
    monkeypatch.setenv(TURN, str(tmp_path / "turns" / "one"))
    assert start(text.command()).codes == [0]
    with (tmp_path / "turns" / "one").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
