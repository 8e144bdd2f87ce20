"""Foreign checkpoints: code is refused before it can run, damage before it can confuse."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_sat.checkpoint import resume, trust
from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.checkpoint.trust import read_index
from tests.checkpoint.runs import save
from tests.helpers.plain_engine import make_engine
from tests.helpers.ranks import run_ranks

RAN: list[str] = []


class Evil:
    """Unpickling it runs a function of its author's choice."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return RAN.append, ("code ran",)


class Shell:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return eval, ("1 + 1",)


def save_one(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    run_ranks(save_one, 1, root)
    return root


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(root, checkpoint) of a checkpoint that may be spoilt."""
    root = tmp_path / "copy"
    shutil.copytree(good, root)
    return root, root / "iter_0000001"


def test_a_good_checkpoint_opens(good: Path) -> None:
    assert open_checkpoint(good).iteration == 1


def test_an_index_that_names_a_function_is_refused_before_it_runs(copy: tuple[Path, Path]) -> None:
    root, folder = copy
    (folder / ".metadata").write_bytes(pickle.dumps(Shell()))
    with pytest.raises(ValueError, match=r"\.metadata names builtins.eval: loading it could run code"):
        open_checkpoint(root)


def test_a_dotted_name_does_not_slip_through_an_allowed_module(copy: tuple[Path, Path]) -> None:
    root, folder = copy
    # protocol 4 looks "os.system" up inside the module
    stolen = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x04true\x85R."
    assert stolen[4 : 4 + 0x27] == b"torch.distributed.checkpoint.filesystem"
    (folder / ".metadata").write_bytes(stolen)
    with pytest.raises(ValueError, match="filesystem.os.system: loading it could run code"):
        open_checkpoint(root)


def test_torch_gives_its_dtypes_and_nothing_else(copy: tuple[Path, Path]) -> None:
    root, folder = copy
    (folder / ".metadata").write_bytes(b"ctorch\nload\n.")
    with pytest.raises(ValueError, match=r"names torch.load: loading it could run code"):
        open_checkpoint(root)


class Member:
    """As Python 3.11.0 to 3.11.3 write a member of an enumeration; and as somebody else might use that way."""

    def __init__(self, kind: Any, name: str) -> None:
        self.reduced = getattr, (kind, name)

    def __reduce__(self) -> Any:
        return self.reduced


def test_a_member_of_an_allowed_enumeration_is_read_by_name(copy: tuple[Path, Path]) -> None:
    kind = metadata._MEM_FORMAT_ENCODING
    (copy[1] / ".metadata").write_bytes(pickle.dumps(Member(kind, "TORCH_CONTIGUOUS_FORMAT")))
    with pytest.raises(ValueError, match="is damaged .it holds a _MEM_FORMAT_ENCODING"):  # but it was read
        read_index(copy[1])


@pytest.mark.parametrize(("kind", "name"), [(metadata._MEM_FORMAT_ENCODING, "mro"), (metadata.Metadata, "__init__")])
def test_getattr_reads_nothing_but_members(kind: Any, name: str, copy: tuple[Path, Path]) -> None:
    (copy[1] / ".metadata").write_bytes(pickle.dumps(Member(kind, name)))
    with pytest.raises(ValueError, match="names builtins.getattr: loading it could run code"):
        read_index(copy[1])


def test_an_object_that_names_a_function_is_refused_before_it_runs(copy: tuple[Path, Path]) -> None:
    root, folder = copy
    index = trust.read_index(folder)
    place = _spoil_object(folder, index)
    RAN.clear()
    with pytest.raises(ValueError, match=f"must load with weights_only=True, .*{place}.* does not"):
        open_checkpoint(root)
    assert not RAN


def _spoil_object(folder: Path, index: Any) -> str:
    """Put a pickle that runs code where a checkpoint keeps its plain values; where that is."""
    if (folder / "common.pt").is_file():
        torch.save({"iteration": Evil()}, folder / "common.pt")
        return "common.pt"
    entry = MetadataIndex("common_state/shard_0_1")
    info = index.storage_data[entry]
    path = folder / info.relative_path
    with path.open("ab") as file:
        offset = file.tell()
        torch.save([{"iteration": Evil()}], file)
        length = file.tell() - offset
    index.storage_data[entry] = type(info)(info.relative_path, offset, length)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return "common_state"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / ".metadata").unlink(), "needs its index .metadata, .* has none"),
        (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"), r"\.metadata is damaged"),
        (
            lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})),
            "is damaged .it holds a dict.; choose",
        ),
        (
            lambda folder: (folder / "__0_0.distcp").unlink(),
            r"__0_0.distcp must be there with \d+ bytes, it is missing",
        ),
        (
            lambda folder: (folder / "__0_0.distcp").write_bytes(b"short"),
            r"__0_0.distcp must have at least \d+ bytes, it has 5; choose another",
        ),
        (
            lambda folder: (folder / "metadata.json").unlink(),
            "iter_0000001 was never finished; there is no whole",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong(
    spoil: Callable[[Path], Any], message: str, copy: tuple[Path, Path]
) -> None:
    root, folder = copy
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(root)


@pytest.mark.parametrize("complaint", [CheckpointingException, AttributeError])  # 0.16.1 fails in its own complaint
def test_plain_values_that_this_megatron_cannot_read_are_refused(
    complaint: type[Exception], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer(folder: str) -> dict[str, Any]:
        raise complaint("no common.pt")

    monkeypatch.setattr(resume.dist_checkpointing, "load_common_state_dict", newer)
    with pytest.raises(ValueError, match=r"its plain values are not \(no common.pt\); load it with the version that"):
        open_checkpoint(good)


def test_files_outside_of_the_folder_are_refused(copy: tuple[Path, Path]) -> None:
    root, folder = copy
    index = trust.read_index(folder)
    entry, info = next(iter(index.storage_data.items()))
    index.storage_data[entry] = type(info)("../../secret", info.offset, info.length)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"must lie in its folder, .* names ../../secret; do not load it"):
        open_checkpoint(root)


def refused_on_all(rank: int, root: Path) -> str:
    try:
        open_checkpoint(root)
    except ValueError as error:
        return str(error)
    return "opened"


def test_every_rank_refuses_alike(copy: tuple[Path, Path]) -> None:
    root, folder = copy
    (folder / ".metadata").unlink()
    one, two = run_ranks(refused_on_all, 2, root)
    assert one == two
    assert "has none" in one
