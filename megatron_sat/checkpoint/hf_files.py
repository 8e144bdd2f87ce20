"""The files of a Hugging Face model: weights in safetensors, and what lies beside them; and folders that appear whole.

Tensors are read one at a time from files that are mapped, not loaded; written, one shard at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_sat.checkpoint.hf_layout import Shape

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
_BESIDE = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*")
_TOKENIZER = ("tokenizer*", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "vocabulary_extension.json")
_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNFINISHED = ".unfinished"


class Tensors:
    """The tensors of a model's folder by name, nothing of them loaded until asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for weights that are not there, not whole, or not safetensors."""
        self._where = _locate(folder)
        self._open: dict[Path, Any] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, path in self._where.items():
            self.shapes[name], self.dtypes[name] = self._describe(name, path=path)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error=error) from error
        return self._open[path]

    def _describe(self, name: str, *, path: Path) -> tuple[Shape, torch.dtype]:
        if name not in self._file(path).keys():  # noqa: SIM118  not a dict
            raise ValueError(f"{path} must hold {name}, as {INDEX} says, it does not; fetch it again")
        piece = self._file(path).get_slice(name)
        if piece.get_dtype() not in _DTYPES:
            raise ValueError(
                f"weights must be bf16, fp16 or fp32, {name} is {piece.get_dtype()}; import the weights before "
                "quantization"
            )
        return tuple(piece.get_shape()), _DTYPES[piece.get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._file(self._where[name]).get_tensor(name)
        return tensor


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {name: folder / file for name, file in weights.items()}
        outside = sorted({str(path) for path in found.values() if path.parent != folder})
        if outside:
            raise ValueError(f"{INDEX} must name files of its folder, it names {outside[0]}; do not import it")
        if missing := sorted({path.name for path in found.values() if not path.is_file()}):
            raise ValueError(f"{folder} must hold every file of {INDEX}, missing: {', '.join(missing)}; fetch them")
        return found
    if not single.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        way_out = "convert its .bin files, which could run code, to safetensors" if pickled else "fetch the weights"
        raise ValueError(f"{folder} must hold {SINGLE} or {INDEX}, it has neither; {way_out}")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError) as error:
        raise _damaged(single, error=error) from error


def _damaged(path: Path, *, error: Exception) -> ValueError:
    return ValueError(f"{path} must be a whole safetensors file, it is not: {error}; fetch it again")


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Shape, torch.dtype]],
    *,
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write safetensors, in shards of at most ``max_shard_bytes`` (a larger tensor is a shard alone), and the index."""
    shards, sizes = _shards(tensors, max_shard_bytes=max_shard_bytes)
    for number, names in enumerate(shards, start=1):
        part = {name: read(name).contiguous() for name in names}
        save_file(part, folder / _shard_name(number, of=len(shards)), metadata={"format": "pt"})
    if len(shards) > 1:
        weights = {name: _shard_name(n, of=len(shards)) for n, names in enumerate(shards, start=1) for name in names}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[tuple[str, Shape, torch.dtype]], *, max_shard_bytes: int
) -> tuple[list[list[str]], list[int]]:
    shards: list[list[str]] = []
    sizes: list[int] = []
    for name, shape, dtype in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        if not shards or sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    return shards, sizes


def _shard_name(number: int, *, of: int) -> str:
    return SINGLE if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"


def copy_beside(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer, everything of a model's folder but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in (*_BESIDE, *_TOKENIZER):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


@contextmanager
def whole_folder(folder: Path, *, said: str) -> Iterator[Path]:
    """A folder to write into that gets the name ``folder`` only when everything went well; else it goes.

    said: the flag that names the folder. Raises ValueError where there is something already. A process that is
    killed leaves ``.NAME.unfinished``, which the next one removes.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{said} must be a new or empty folder, {folder} is neither; choose another")
    draft = folder.parent / f".{folder.name}{_UNFINISHED}"
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
