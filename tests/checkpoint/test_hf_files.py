"""Safetensors read and written, and folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sat.checkpoint.hf_files import INDEX, SINGLE, Tensors, copy_beside, whole_folder, write_tensors

WEIGHTS = {f"w{i}": torch.full((4, 4), float(i)).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(5)}


def _write(folder: Path, *, max_shard_bytes: int) -> None:
    named = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in WEIGHTS.items()]
    write_tensors(folder, named, read=WEIGHTS.__getitem__, max_shard_bytes=max_shard_bytes)


@pytest.mark.parametrize("max_shard_bytes, files", [(10**9, 1), (100, 3), (1, 5)])
def test_what_is_written_in_shards_is_read_back_bit_for_bit(tmp_path, max_shard_bytes, files):
    _write(tmp_path, max_shard_bytes=max_shard_bytes)
    found = Tensors(tmp_path)

    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / INDEX).is_file() == (files > 1)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in WEIGHTS.items())
    assert found.dtypes == {name: tensor.dtype for name, tensor in WEIGHTS.items()}
    assert found.shapes == dict.fromkeys(WEIGHTS, (4, 4))


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    alive: list[str] = []
    seen = 0

    def read(name: str) -> torch.Tensor:
        nonlocal seen
        alive.append(name)
        done = len(list(tmp_path.glob("*.safetensors")))  # files finished before this tensor is asked for
        seen = max(seen, len(alive) - done)
        return WEIGHTS[name]

    named = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in WEIGHTS.items()]
    write_tensors(tmp_path, named, read=read, max_shard_bytes=1)
    assert seen == 1


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold model.safetensors or .*index.json, it has neither; fetch"):
        Tensors(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="which could run code, to safetensors"):
        Tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    _write(tmp_path, max_shard_bytes=1)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: model-00002-of-00005.safetensors"):
        Tensors(tmp_path)


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="must name files of its folder"):
        Tensors(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(ValueError, match="x.safetensors must hold b, as .* says, it does not"):
        Tensors(tmp_path)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_file_cut_short_is_refused(tmp_path, indexed):
    _write(tmp_path, max_shard_bytes=1 if indexed else 10**9)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be a whole safetensors file, it is not"):
        Tensors(tmp_path)


def test_quantized_weights_are_refused(tmp_path):
    save_file({"w": torch.zeros(4, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="weights must be bf16, fp16 or fp32, w is I8"):
        Tensors(tmp_path)


def test_configuration_and_tokenizer_are_copied_and_weights_are_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    for name in [*names, SINGLE, "README.md", "modeling_evil.py"]:
        (source / name).write_text("x")
    copy_beside(source, tmp_path / "target")
    assert {path.name for path in (tmp_path / "target").iterdir()} == names


def test_a_folder_appears_when_all_is_written(tmp_path):
    target = tmp_path / "new"
    with whole_folder(target, said="--save") as draft:
        (draft / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (target / "file").read_text() == "x"


def _write_and_fail(folder: Path) -> None:
    with whole_folder(folder, said="--save") as draft:
        (draft / "file").write_text("x")
        raise KeyboardInterrupt


def test_nothing_is_left_where_writing_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _write_and_fail(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_does_not_come_back(tmp_path):
    left = tmp_path / ".new.unfinished"
    left.mkdir()
    (left / "half").write_text("x")
    with whole_folder(tmp_path / "new", said="--save") as draft:
        (draft / "file").write_text("x")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "mine").write_text("x")
    with (
        pytest.raises(ValueError, match="--save must be a new or empty folder"),
        whole_folder(tmp_path, said="--save"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "x"
