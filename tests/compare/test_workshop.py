"""The machine's workshop, what commands find in their environment, and how a program ends."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sat.compare.stages import Stage
from megatron_sat.compare.workshop import cores_here, end_well, environment_of, this_machine, tokenizer_files


def test_a_workshop_is_made_with_this_machine_and_its_libraries(tmp_path: Path) -> None:
    shop = this_machine(tmp_path, jobs=None)
    assert "CPU cores" in shop.made_with or "GPU" in shop.made_with
    assert "torch" in shop.made_with
    assert (shop.cores, shop.jobs) == (cores_here(), min(4, cores_here()))
    assert this_machine(tmp_path, jobs=7).jobs == 7


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_stage_at_a_time_is_refused(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--jobs must be at least 1, got {jobs}; leave it out"):
        this_machine(tmp_path, jobs=jobs)


def test_paths_are_said_from_the_projects_folder(tmp_path: Path) -> None:
    shop = this_machine(tmp_path, jobs=1)
    assert shop.named(tmp_path / "a" / "b") == "a/b"
    assert shop.named(Path("/elsewhere")) == "/elsewhere"


def test_text_is_prepared_again_when_its_tokenizer_changed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "model.safetensors"):
        (folder / name).write_text("x")
    text, shop = tmp_path / "zh.jsonl", this_machine(tmp_path, jobs=1)
    text.write_text("{}")
    found = shop.prepare(tmp_path / "text", {"zh": [text]}, tokenizer=folder)
    assert {path.name for path in found.reads} == {"zh.jsonl", "tokenizer.json", "merges.txt", "tokenizer.model"}
    before = found.key
    (folder / "merges.txt").write_text("other")
    assert found.key != before
    assert tokenizer_files(folder / "tokenizer.model") == [folder / "tokenizer.model"]


def test_a_tokenizer_that_an_earlier_stage_makes_is_not_read_before_it_is_there(tmp_path: Path) -> None:
    """The key of the stage is the same before and after."""
    vocabulary = Stage(name="vocabulary", folder=tmp_path / "vocabulary", command=("true",))
    text, shop = tmp_path / "zh.jsonl", this_machine(tmp_path, jobs=1)
    text.write_text("{}")

    def key() -> str:
        made = vocabulary.folder / "model"
        return shop.prepare(tmp_path / "text", {"zh": [text]}, tokenizer=made, after=[vocabulary]).key

    before = key()
    (vocabulary.folder / "model").mkdir(parents=True)
    (vocabulary.folder / "model" / "tokenizer.json").write_text("x")
    assert key() == before


def test_commands_keep_the_environment_and_do_not_spin() -> None:
    found = environment_of({"HOME": "/home", "OMP_WAIT_POLICY": "ACTIVE"})
    assert found == {"HOME": "/home", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}


def test_commands_do_not_hear_what_a_launcher_said_to_the_harness() -> None:
    """Two at once would meet at one port, and the second would take itself for another rank."""
    said = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    found = environment_of({"HOME": "/home", **said, "MASTER_ADDR": "host", "MASTER_PORT": "29500"})
    assert set(found) == {"HOME", "OMP_WAIT_POLICY", "PYTHONWARNINGS"}


@pytest.fixture(autouse=True)
def signals() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("x must be y"), "tool: x must be y"),
        (RuntimeError("a stage"), "tool: a stage"),
        (KeyboardInterrupt(), "tool: interrupted; the same command goes on where it was"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(argv: Sequence[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        end_well("tool", fails, wrong=2)
    assert ended.value.code == 2
    assert capsys.readouterr().err == said + "\n"


def test_a_termination_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    def waits(argv: Sequence[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 10)

    with pytest.raises(SystemExit) as ended:
        end_well("tool", waits)
    assert ended.value.code == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("code", [None, 0, 1])
def test_the_exit_code_is_the_programs(code: int | None) -> None:
    with pytest.raises(SystemExit) as ended:
        end_well("tool", lambda argv: code)
    assert ended.value.code == code
