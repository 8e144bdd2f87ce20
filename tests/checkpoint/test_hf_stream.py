"""Pieces that are made when their turn comes, in a checkpoint that megatron.core itself opens."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_sat.checkpoint import trust
from megatron_sat.checkpoint.hf_stream import Piece, read_tensor, write_checkpoint
from tests.helpers.ranks import run_ranks

LAYERS = torch.arange(24.0).reshape(3, 4, 2)
WORDS = torch.arange(10.0, dtype=torch.bfloat16).reshape(5, 2)


def _pieces(made: list[str]) -> list[Piece]:
    def make(name: str, tensor: torch.Tensor) -> torch.Tensor:
        made.append(name)
        return tensor

    layers = [
        Piece(key="layers", whole=(3, 4, 2), dtype=torch.float32, make=lambda n=n: make(f"{n}", LAYERS[n]), layer=n)
        for n in range(3)
    ]
    words = Piece(key="words", whole=(5, 2), dtype=torch.bfloat16, make=lambda: make("words", WORDS))
    return [*layers, words]


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, _pieces([]), objects={"state/shard_0_1": None}, common={"iteration": 7}, advance=int)
    return tmp_path


def _load(rank: int, folder: str) -> dict[str, torch.Tensor]:
    """Half of the rows of every layer, as two TP ranks would ask."""
    ask = {
        "layers": ShardedTensor.from_rank_offsets("layers", torch.empty(3, 2, 2), (1, rank, 2)),
        "words": ShardedTensor.from_rank_offsets("words", torch.empty(5, 2, dtype=torch.bfloat16), replica_id=rank),
    }
    return dist_checkpointing.load(ask, folder)


def test_megatron_opens_it_cut_for_two_ranks(folder):
    first, second = run_ranks(_load, 2, str(folder))
    assert torch.equal(torch.cat([first["layers"], second["layers"]], dim=1), LAYERS)
    assert torch.equal(first["words"], WORDS)
    assert first["iteration"] == 7


def test_each_piece_is_made_once_and_counted(tmp_path):
    made: list[str] = []
    counted: list[int] = []
    write_checkpoint(tmp_path, _pieces(made), objects={}, common={}, advance=lambda: counted.append(1))
    assert sorted(made) == ["0", "1", "2", "words"] and len(counted) == 4


def test_no_piece_is_made_before_the_one_in_front_is_on_disk(tmp_path):
    size = 2**20
    written: list[int] = []

    def make() -> torch.Tensor:
        written.append(sum(path.stat().st_size for path in tmp_path.glob("*.distcp")))
        return torch.zeros(size // 4)

    pieces = [Piece(key="w", whole=(9, size // 4), dtype=torch.float32, make=make, layer=n) for n in range(9)]
    write_checkpoint(tmp_path, pieces, objects={}, common={}, advance=int)
    assert all(already >= number * size for number, already in enumerate(written))


def test_a_layer_is_read_alone_and_a_tensor_whole(folder):
    index = trust.read_index(folder)
    assert torch.equal(read_tensor(folder, index=index, key="layers", layer=1), LAYERS[1])
    assert torch.equal(read_tensor(folder, index=index, key="layers", layer=None), LAYERS)
    assert torch.equal(read_tensor(folder, index=index, key="words", layer=None), WORDS)


def test_it_passes_the_check_of_what_its_pickles_may_name(folder):
    index = trust.read_index(folder)
    trust.check_files(folder, index=index)
    trust.check_objects(folder, index=index)
