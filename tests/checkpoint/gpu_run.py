"""A program for torchrun with one GPU a rank: train, hold entries, save both ways, resume in new engines, compare.

    python -m torch.distributed.run --nproc-per-node N tests/checkpoint/gpu_run.py FOLDER

Exits with an assertion where something differs.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_sat import faults
from megatron_sat.distributed import Layout, join, leave, read_launch
from megatron_sat.engines.megatron import MegatronEngine
from tests.checkpoint.runs import BF16, LATE, begin, load, save, state_bits
from tests.helpers.plain_engine import MICRO_BATCHES, batches_of, make_engine
from tests.helpers.plain_gpt import make_chunks


def chunks_on_gpu(config: TransformerConfig) -> list[nn.Module]:
    return [chunk.cuda() for chunk in make_chunks(config)]


def train(engine: MegatronEngine, layout: Layout, *, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batches = ({name: t.cuda() for name, t in batch.items()} for batch in batches_of(step, layout))
        result = engine.train_step(batches, num_micro_batches=MICRO_BATCHES // layout.dp_size)
        losses.append(result.loss)
    return losses


def held(engine: MegatronEngine) -> list[tuple[nn.Parameter, int, Tensor]]:
    weights = dict(engine.chunks[0].named_parameters())
    return [
        (weights["decoder.layers.0.mlp.linear_fc1.weight"], 0, torch.arange(0, 24, 2, device="cuda")),
        (weights["decoder.layers.0.mlp.linear_fc2.weight"], 1, torch.arange(0, 12, 2, device="cuda")),
    ]


def hold(engine: MegatronEngine) -> None:
    engine.hold(lambda: held(engine))


def check(settings: dict[str, Any], folder: Path) -> None:
    """One precision and optimizer: held entries stay, and a resumed run equals the uninterrupted one."""
    engine, layout = make_engine(build=chunks_on_gpu, **settings)
    hold(engine)
    train(engine, layout, steps=range(1))
    before = [p.detach().index_select(dim, index).clone() for p, dim, index in held(engine)]
    train(engine, layout, steps=range(1, 3))
    engine.gather_weights()
    for (parameter, dim, index), old in zip(held(engine), before, strict=True):
        assert torch.equal(parameter.detach().index_select(dim, index), old), "a held entry moved"
    save(engine, layout, folder / "at once", iteration=3)
    later = begin(engine, layout, folder / "later", iteration=3)
    want = train(engine, layout, steps=range(3, 5))
    later.finish()
    want_state = state_bits(engine)
    for way in ("at once", "later"):
        other, layout = make_engine(build=chunks_on_gpu, **settings)
        resumed = load(other, layout, folder / way)
        hold(other)
        assert resumed.tensors["sat.layers.0.mlp.kept"].tolist() == list(range(20))
        assert train(other, layout, steps=range(3, 5)) == want, f"a run resumed from what was saved {way} is another"
        assert state_bits(other) == want_state, f"a state saved {way} is another"


def main() -> None:
    torch.use_deterministic_algorithms(True)
    faults.apply_all()
    join(read_launch(), backend="nccl", timeout_minutes=2)
    ranks = dist.get_world_size()
    folder = Path(sys.argv[1])
    for name, settings in {
        "fp32": {"tp": ranks},
        "bf16": {"tp": ranks, "model": BF16},
        "distributed": {"model": BF16, "ddp": LATE},
    }.items():
        check(settings, folder / name)
    if dist.get_rank() == 0:
        sys.stdout.write("resumed on the GPU as if never stopped\n")
    leave()


if __name__ == "__main__":
    main()
