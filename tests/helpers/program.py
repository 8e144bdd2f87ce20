"""The program in a test: a little of the shipped text, a tiny Llama, and `main` on forked ranks."""

import contextlib
import hashlib
import io
import json
import lzma
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_sat import cli
from megatron_sat.build import build_run
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.pretrain import Session, main
from megatron_sat.training.state import whole_visits
from tests.helpers.command_line import PAPER
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import global_name

EXCERPT = Path(__file__).parents[2] / "examples" / "data"
TOKENIZER = EXCERPT / "tokenizer.model"
DOCUMENTS = {"zh/poetry": 60, "zh/religion": 2, "en/technology": 2}
"""Domain to how many of its documents are taken: thousands of tokens of each."""
LLAMA = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --seq-length 32 --max-position-embeddings 32 --swiglu --normalization RMSNorm
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8 --train-iters 7
--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --lr-warmup-init 5e-4
--weight-decay 0.1 --clip-grad 1.0 --log-interval 1 --eval-iters 2 --num-workers 0 --make-vocab-size-divisible-by 64
--tokenizer-type SentencePieceTokenizer
"""
LADDER = f"--sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 3 --sat-rungs 2 {PAPER}"
"""Over 7 steps: rate .5 in 1-3, .25 in 4, 0 from 5 on."""
SPARSE = f"{LADDER} --sat-selection-groups 2"
"""A choice that does not depend on the tensor-parallel size, 1 or 2."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Data sets that are prepared once and only read by the tests."""

    folder: Path

    def prefix(self, domain: str) -> str:
        """The data set of a key of `DOCUMENTS`."""
        return str(self.folder / domain.replace("/", "."))

    def command(self, more: str = "", *, without: str = "") -> list[str]:
        """A command line that trains `LLAMA`: ``more`` behind it, the settings of ``without`` left out."""
        data = f"--tokenizer-model {TOKENIZER} --data-cache-path {self.folder / 'index-cache'}"
        data += f" --train-data-path poetry={self.prefix('zh/poetry')} en={self.prefix('en/technology')}"
        data += f" --valid-data-path religion={self.prefix('zh/religion')} en={self.prefix('en/technology')}"
        left_out, kept, drops = set(without.split()), [], False
        for word in shlex.split(LLAMA + data):
            drops = word in left_out if word.startswith("--") else drops
            kept += [] if drops else [word]
        return kept + shlex.split(more)


def prepare_text(folder: Path) -> Text:
    """Take some documents of the shipped text and prepare them."""
    tokenizer = build_tokenizer("SentencePieceTokenizer", model=str(TOKENIZER))
    text = Text(folder=folder)
    for domain, number in DOCUMENTS.items():
        with lzma.open(EXCERPT / f"{domain}.dev.jsonl.xz", "rt") as file:
            lines = file.readlines()[:number]
        source = Path(f"{text.prefix(domain)}.jsonl")
        source.write_text("".join(lines))
        options = TextOptions(append_eod=True)
        prepare([str(source)], output_prefix=text.prefix(domain), tokenizer=tokenizer, options=options, workers=1)
    return text


class Ended(NamedTuple):
    """How the program ended on all ranks together."""

    codes: list[int]
    out: str
    err: str


def start(argv: list[str], *, ranks: int = 1) -> Ended:
    """`main` on so many forked ranks."""
    codes, outs, errs = zip(*run_ranks(_main, ranks, argv), strict=True)
    return Ended(list(codes), "".join(outs), "".join(errs))


def _main(_: int, argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def open_session(argv: list[str]) -> Session:
    """What `main` builds, on a rank that already runs, for a look inside."""
    return Session(build_run(cli.parse(argv, world_size=dist.get_world_size(), cuda=False)))


class Trained(NamedTuple):
    """What a run computed."""

    losses: list[float]
    """Of each step that was logged."""
    norms: list[float]
    """Of the gradient, likewise."""
    validation: list[dict[str, float]]
    """By domain, of each evaluation."""
    visits: dict[str, list[int]]
    """By "kind.layer", how often each unit of the whole layer was kept."""
    weights: dict[str, str]
    """By rank and global name, a digest of the bytes of a parameter."""


def trained(argv: list[str], jsonl: Path, *, ranks: int = 1) -> Trained:
    """Train, and read the run's figures back from ``jsonl``."""
    found = run_ranks(_train, ranks, [*argv, "--log-jsonl", str(jsonl)])
    steps, passes = read_records(jsonl), read_records(jsonl, kind="validation")
    return Trained(
        losses=[record["loss"] for record in steps],
        norms=[record["grad_norm"] for record in steps],
        validation=[record["loss"] for record in passes],
        visits=found[0][0],
        weights={f"{rank} {name}": bits for rank, (_, mine) in enumerate(found) for name, bits in mine.items()},
    )


def each_once(folder: Path, command: Callable[..., list[str]]) -> Callable[..., Trained]:
    """(flags, ranks) to the run of their command line, made when first asked for; its figures lie in ``folder``.

    What else is given by name goes to ``command``.
    """

    @cache
    def run(flags: str, ranks: int = 1, **more: str) -> Trained:
        return trained(command(flags, **more), folder / f"{len(list(folder.iterdir()))}.jsonl", ranks=ranks)

    return run


def _train(_: int, argv: list[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
    session = open_session(argv)
    session.train()
    visits = whole_visits(session.run.controller.selectors, layout=session.run.layout)
    return {name: row.tolist() for name, row in visits.items()}, digests(session)


def digests(session: Session) -> dict[str, str]:
    """Every parameter of this rank by global name: equal only if bit-identical."""
    engine: Any = session.run.engine
    engine.gather_weights()
    with engine.whole() if hasattr(engine, "whole") else contextlib.nullcontext():  # ZeRO-3 gathers for a while
        return {
            global_name(name, chunk): hashlib.sha256(
                parameter.detach().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for chunk in engine.chunks
            for name, parameter in chunk.named_parameters()
        }


def read_records(jsonl: Path, *, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl of one kind, in order."""
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
