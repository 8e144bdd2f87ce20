"""What a checkpoint's pickles may name: nothing that runs code.

torch's distributed format keeps its index and every object that is not a tensor as pickles, and megatron.core reads
them without restriction. So before it does, they are read here with one: the index by an unpickler that knows only the
index's own classes, the objects by torch.load(weights_only=True), which knows tensors, plain containers and what
megatron.core registered. What does not pass is refused by name. Tensors themselves cannot carry code.
"""

import io
import pickle
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

_ANOTHER = "choose another checkpoint with --ckpt-step"
_CHECKPOINT = "torch.distributed.checkpoint"
_INDEX_CLASSES = {
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.planner", "SavePlan"),
    (f"{_CHECKPOINT}.planner", "BytesIOWriteData"),
    (f"{_CHECKPOINT}.planner", "TensorWriteData"),
    (f"{_CHECKPOINT}.planner", "WriteItem"),
    (f"{_CHECKPOINT}.planner", "WriteItemType"),
    (
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCoreMetadata",
    ),  # megatron.core 0.15 wrote these two
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def _member(kind: Any, name: str) -> Any:
    """What stands in for getattr, by which Python 3.11.0 to 3.11.3 write a member of an enumeration."""
    if not isinstance(kind, EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError("builtins.getattr")
    return kind[name]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_index(folder: Path) -> Metadata:
    """The index of a distributed checkpoint: names, shapes and places of all tensors and objects.

    Raises ValueError when it is missing, unreadable, or names anything that an index has no use for.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"a checkpoint needs its index .metadata, {folder} has none; {_ANOTHER}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the index of a checkpoint may name only its own classes, {path} names {error}: loading it "
            "could run code; do not load it unless you know who wrote it, and then save it anew with the "
            "program that wrote it"
        ) from None
    except (EOFError, ValueError, IndexError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_ANOTHER}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{path} is damaged (it holds a {type(index).__name__}); {_ANOTHER}")
    return index


def check_files(folder: Path, *, index: Metadata) -> None:
    """Refuse a checkpoint of which a file is missing, cut short, or lies elsewhere. Raises ValueError."""
    needed: dict[str, int] = {}
    for info in (index.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        path = folder / name
        if Path(name).name != name:
            raise ValueError(f"a checkpoint's files must lie in its folder, {folder} names {name}; do not load it")
        if not path.is_file():
            raise ValueError(f"{path} must be there with {size} bytes, it is missing; {_ANOTHER}")
        if (has := path.stat().st_size) < size:
            raise ValueError(f"{path} must have at least {size} bytes, it has {has}; {_ANOTHER}")


def check_objects(folder: Path, *, index: Metadata) -> None:
    """Refuse a checkpoint with an object whose pickle names anything outside of torch's safe list. Raises
    ValueError."""
    objects = {name for name, kind in index.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    for entry, info in (index.storage_data or {}).items():
        if entry.fqn in objects:
            with (folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                _check_pickle(io.BytesIO(file.read(info.length)), name=f"{entry.fqn} in {folder / info.relative_path}")
    common = folder / "common.pt"  # megatron.core before 0.17
    if common.is_file():
        _check_pickle(io.BytesIO(common.read_bytes()), name=str(common))


def _check_pickle(data: io.BytesIO, *, name: str) -> None:
    try:
        torch.load(data, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"objects of a checkpoint must load with weights_only=True, {name} does not ({first}): loading "
            "it could run code; if you know who wrote it, allow its classes with "
            "torch.serialization.add_safe_globals"
        ) from None
