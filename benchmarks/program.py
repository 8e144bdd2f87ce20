"""What the benchmarks run: the program at the widths of known models, on random ids, and where a result comes from."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat import cli, distributed
from megatron_sat.build import Run, build_run
from megatron_sat.compare.provenance import provenance
from megatron_sat.config import Config
from megatron_sat.data.batch import Batch
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.model.flops import ModelShape, shape_of
from megatron_sat.training.reading import Reader

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "tiny": "--hidden-size 128 --num-attention-heads 8 --ffn-hidden-size 352",
    "smollm2-135m": (
        "--hidden-size 576 --num-attention-heads 9 --group-query-attention --num-query-groups 3"
        " --ffn-hidden-size 1536"
    ),
    "small": "--hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 2048",
    "tinyllama-1.1b": (
        "--hidden-size 2048 --num-attention-heads 32 --group-query-attention --num-query-groups 4"
        " --ffn-hidden-size 5632"
    ),
    "llama-2-7b": "--hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008",
    "llama-2-13b": "--hidden-size 5120 --num-attention-heads 40 --ffn-hidden-size 13824",
}
VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a step computes."""

    model: str
    """A key of `MODELS`: its widths."""
    layers: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    vocabulary: int = VOCABULARY
    replicas: int = 1
    """Data-parallel ranks, each with so many micro-batches."""

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch_size * self.seq_length

    def __str__(self) -> str:
        batch = f"{self.micro_batches}x{self.micro_batch_size}x{self.seq_length} tokens"
        replicas = f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.model}, {self.layers} layers, {batch}{replicas}"


def random_text(folder: Path, size: Size) -> str:
    """The prefix of a prepared data set of random ids in ``folder``, as long as one global batch needs."""
    generator = torch.Generator().manual_seed(1)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(size.global_batch_size + 2):
            ids = torch.randint(0, size.vocabulary - 1, (size.seq_length + 1,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(map(str, ids))}) + "\n")
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=size.vocabulary)
    prefix, options = str(folder / "ids"), TextOptions(append_eod=True)
    prepare([str(folder / "text.jsonl")], output_prefix=prefix, tokenizer=tokenizer, options=options, workers=1)
    return prefix


def flags(size: Size, *, data: str, cuda: bool, steps: int, method: str, more: str = "") -> list[str]:
    """The command line of pretrain_sat.py that trains ``size`` for ``steps`` steps; method: its --sat-* flags."""
    line = f"""
        {MODELS[size.model]} --num-layers {size.layers} --seq-length {size.seq_length}
        --max-position-embeddings {size.seq_length} --swiglu --normalization RMSNorm --disable-bias-linear
        --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --micro-batch-size {size.micro_batch_size} --global-batch-size {size.global_batch_size} --train-iters {steps}
        --lr 1e-6 --lr-decay-style constant --num-workers 0 --tokenizer-type NullTokenizer
        --vocab-size {size.vocabulary} --train-data-path {data} {method} {"--bf16" if cuda else ""} {more}
    """
    return line.split()


PAPER = "--sat-importance maxip --sat-selection sampling --sat-selection-interval 1"
"""How the paper chooses: what was measured, whatever the program's defaults are."""
CONSTANT = f"--sat-schedule constant --sat-omission-rate 0.5 {PAPER}"
"""For benchmarks that put schedules of their own in the place of the run's."""


@contextmanager
def built(argv: list[str]) -> Iterator[Run]:
    """What pretrain_sat.py builds for ``argv``, on this rank; its model-parallel groups are gone afterwards."""
    launch = distributed.read_launch()
    config = parsed(argv, world_size=launch.world_size)
    distributed.join(launch, backend=config.parallel.backend, timeout_minutes=10)
    try:
        yield build_run(config)
    finally:
        parallel_state.destroy_model_parallel()


def first_batches(run: Run, count: int) -> list[Batch]:
    """This rank's first micro-batches of training."""
    assert run.datasets.train is not None
    size = run.config.training.micro_batch_size
    reader = Reader(layout=run.layout, device=run.device, micro_batch_size=size)
    return list(islice(reader.train(run.datasets.train, consumed_samples=0, num_workers=0), count))


def parsed(argv: list[str], *, world_size: int = 1) -> Config:
    """The configuration of so many ranks. Leaves the program, with a line, for what cannot be obeyed."""
    return cli.parse(argv, world_size=world_size, cuda=torch.cuda.is_available())


def model_shape(config: Config, *, vocabulary: int) -> ModelShape:
    """The shape of a configuration's model. vocabulary: before it is padded."""
    rows = config.model.rows(build_tokenizer("NullTokenizer", vocab_size=vocabulary).vocab_size, tp=1)
    transformer = TransformerConfig(**config.transformer)
    return shape_of(transformer, padded_vocab_size=rows, seq_length=config.model.seq_length)


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def about() -> dict[str, str]:
    """Where a result comes from: command, commit, machine, versions."""
    words = ["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]
    found = provenance(ROOT, command=shlex.join(words))
    return {"device": device_name(), **vars(found)}


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """A result and where it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about(), **found}, indent=1) + "\n")
