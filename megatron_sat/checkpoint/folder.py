"""Where checkpoints lie, laid out as Megatron-LM does, and which of them are whole.

    SAVE/iter_0000100/                      one checkpoint
    SAVE/latest_checkpointed_iteration.txt  the newest, written last

A checkpoint is written under another name and renamed when it is whole, and one that has to go is renamed before it is
deleted, so a crash at any moment leaves no half of one that looks like one, and the tracker never names one that is
not there: where a checkpoint is written anew, the old one stands aside until the tracker names the new one.
Everything here runs in one process; who calls it on many ranks lets one of them do it.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_NAME = re.compile(r"iter_(\d{7,})")
_UNFINISHED = ".unfinished"
_ASIDE = ".aside"


def folder_of(root: Path, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def unfinished_of(root: Path, iteration: int) -> Path:
    """The folder that a checkpoint is written into before it has its name."""
    return root / f"iter_{iteration:07d}{_UNFINISHED}"


def iterations(root: Path) -> list[int]:
    """Iterations of the checkpoints under `root` that were written to their end, in order."""
    if not root.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(int(match[1]) for match, path in named if match and (path / "metadata.json").is_file())


def has_checkpoint(root: Path) -> bool:
    """Whether a run ever finished a checkpoint here."""
    return (root / TRACKER).is_file()


def find(root: Path, *, step: int | None) -> tuple[Path, int | None]:
    """The folder of the checkpoint of iteration `step` (None: the newest), and its iteration (None: a release).

    Raises ValueError, naming what is there, when there is none or it was never finished.
    """
    if step is None:
        step = _newest(root)
    folder = root / RELEASE if step is None else folder_of(root, step)
    aside = Path(f"{folder}{_ASIDE}")
    if not folder.exists() and (aside / "metadata.json").is_file():  # a crash between the two renames of `finish`
        folder = aside
    if not (folder / "metadata.json").is_file():
        state = "was never finished" if folder.is_dir() else "is not there"
        raise ValueError(f"--load needs a whole checkpoint, {folder} {state}; {_whole(root)}")
    return folder, step


def _newest(root: Path) -> int | None:
    tracker = root / TRACKER
    if not tracker.is_file():
        hint = _whole(root)
        if _NAME.fullmatch(root.name) and has_checkpoint(root.parent):
            hint = f"try --load {root.parent} --ckpt-step {int(root.name.removeprefix('iter_'))}"
        raise ValueError(f"--load must be a folder with {TRACKER}, {root} has none; {hint}")
    text = tracker.read_text().strip()
    if text == RELEASE:
        return None
    if not text.isdigit():
        raise ValueError(f"{tracker} must hold an iteration or '{RELEASE}', got {text[:40]!r}; {_whole(root)}")
    return int(text)


def _whole(root: Path) -> str:
    there = iterations(root)
    if not there:
        return "there is no whole checkpoint beside it: start without --load"
    return f"whole ones: {', '.join(map(str, there[-5:]))}; choose with --ckpt-step"


def begin(root: Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint into; what earlier crashes left unfinished goes."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob(f"iter_*{_UNFINISHED}"):
        shutil.rmtree(path)
    for path in root.glob(f"iter_*{_ASIDE}"):
        whole = path.with_name(path.name.removesuffix(_ASIDE))
        if whole.exists():
            _remove(path)
        else:
            path.rename(whole)
    folder = unfinished_of(root, iteration)
    folder.mkdir()
    return folder


def finish(root: Path, iteration: int, *, keep_last: int | None) -> None:
    """Give a written checkpoint its name, point the tracker at it, and drop all but the `keep_last` newest."""
    folder = folder_of(root, iteration)
    aside = Path(f"{folder}{_ASIDE}")
    if folder.exists():
        folder.rename(aside)
    unfinished_of(root, iteration).rename(folder)
    _to_disk(root)
    draft = root / f"{TRACKER}{_UNFINISHED}"
    with draft.open("w") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(root / TRACKER)
    _to_disk(root)
    if aside.exists():
        _remove(aside)
    if keep_last is not None:
        for old in [i for i in iterations(root) if i != iteration][: -(keep_last - 1) or None]:
            _remove(folder_of(root, old))


def writing_trouble(folder: Path) -> tuple[int, str] | None:
    """What the system says when a megabyte is written here: number and text; None where it goes.

    megatron.core (0.16 to 0.19) hands on that a writer failed, and of what type the error was, but not the error.
    """
    probe = folder / f"probe.{os.getpid()}{_UNFINISHED}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or 0, error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def _remove(folder: Path) -> None:
    """Delete a checkpoint: first its name, which says that it is whole."""
    doomed = Path(f"{folder}{_UNFINISHED}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _to_disk(folder: Path) -> None:
    """Force the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
