"""The first loss of a run that goes on with an imported model, held to the one that Hugging Face's model has."""

from itertools import repeat
from pathlib import Path

import torch

from megatron_sat.checkpoint.parity import FIRST_LOSS_TOLERANCE, RECORDED, Recorded, check_first_loss
from megatron_sat.data.batch import cut_for_context_parallel
from megatron_sat.distributed import Layout
from megatron_sat.engines.base import Engine


def check_import(
    load: Path,
    *,
    engine: Engine,
    layout: Layout,
    device: torch.device,
    seq_length: int,
    micro_batch_size: int,
    num_micro_batches: int,
    dtype: torch.dtype,
    override: bool,
) -> str | None:
    """The line for the log; None where the import recorded no loss. Collective; nothing is trained.

    load: the folder that an import wrote. num_micro_batches: 1, or as many as an interleaved pipeline passes on at a
    time; all are the same. Raises ValueError where the losses are apart and ``override`` is not given.
    """
    path = load / RECORDED
    if not path.exists():
        return None
    recorded = Recorded.load(path)
    batch = recorded.batch(seq_length, micro_batch_size=micro_batch_size)
    mine = cut_for_context_parallel(
        {name: tensor.to(device) for name, tensor in batch.items()}, cp_rank=layout.cp_rank, cp_size=layout.cp_size
    )
    measured = engine.evaluate(repeat(mine), num_micro_batches=num_micro_batches).loss
    return check_first_loss(
        recorded.expected(seq_length), measured=measured, tolerance=FIRST_LOSS_TOLERANCE[dtype], override=override
    )
