"""An evaluation from a model and texts to what is written: result.json, table.md, chart.png.

Runs on one rank or on many; every rank gets the result, rank 0 writes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat import log
from megatron_sat.checkpoint.hf_files import whole_folder
from megatron_sat.evaluate.chart import draw_chart
from megatron_sat.evaluate.result import Domain, Result, check_comparable, columns, markdown, remarks, rows
from megatron_sat.evaluate.windows import Window, batches_of, check_sizes, windows_of
from megatron_sat.evaluation.models import Opened, Subject
from megatron_sat.evaluation.texts import Limits, Texts, read_texts

SEQ_LENGTH = 2048
"""Tokens of a window where nothing is said; fewer where the model has fewer positions."""
RESULT, TABLE, CHART = "result.json", "table.md", "chart.png"


def evaluate(
    subject: Subject,
    data: Mapping[str, Sequence[str]],
    *,
    name: str,
    key: str = "text",
    seq_length: int | None = None,
    stride: int | None = None,
    dtype: str = "fp32",
    limits: Limits,
    micro_batch_size: int = 4,
    beside: Sequence[Result] = (),
) -> Result:
    """Score every domain; collective, the default process group exists.

    data: domain to paths. name: what tables call the model. seq_length: None: `SEQ_LENGTH`. stride: None: half of it.
    beside: results that this one must compare with.
    Raises ValueError for texts, sizes and models that cannot be used, and for losses that are not finite.
    """
    seq_length = min(SEQ_LENGTH, subject.longest) if seq_length is None else seq_length
    stride = max(1, seq_length // 2) if stride is None else stride
    check_sizes(seq_length, stride=stride, longest=subject.longest)
    if micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size must be at least 1, got {micro_batch_size}; leave it out")
    texts = read_texts(data, tokenizer=subject.tokenizer, key=key, limits=limits)
    _require_rows(texts, subject=subject)
    result = Result(
        name=name,
        model=str(subject.folder),
        kind=subject.kind,
        step=subject.step,
        seq_length=seq_length,
        stride=stride,
        dtype=dtype,
        tokenizer=subject.tokenizer.fingerprint,
        domains={domain: _unscored(found) for domain, found in texts.items()},
    )
    check_comparable([*beside, result])
    opened = subject.open(dtype, seq_length)
    log.say(
        f"{name}: {len(texts)} domains, windows of {seq_length} tokens, stride {stride}, {dtype}, each document behind "
        f"token {subject.start}; replicas: {opened.parts}"
    )
    domains = {}
    for domain, found in texts.items():
        windows = [
            window
            for ids in found.documents
            for window in windows_of(ids, start=subject.start, seq_length=seq_length, stride=stride)
        ]
        nats = _score(windows, opened=opened, size=micro_batch_size, said=domain)
        domains[domain] = _scored(domain, result.domains[domain], nats=nats)
    return replace(result, domains=domains)


def _require_rows(texts: Mapping[str, Texts], *, subject: Subject) -> None:
    highest = {domain: max(int(ids.max()) for ids in found.documents) for domain, found in texts.items()}
    for place, found in {"what a document begins behind": subject.start, **highest}.items():
        if found >= subject.vocab_size:
            raise ValueError(
                f"ids of text must be rows of the model, of which {subject.folder} has {subject.vocab_size}, {place} "
                f"has id {found}; put the tokenizer of this model beside it"
            )


def _score(windows: Sequence[Window], *, opened: Opened, size: int, said: str) -> float:
    """Nats of all windows on all ranks."""
    dealt = batches_of(windows, size=size, together=opened.together, part=opened.part, parts=opened.parts)
    total = 0.0
    with log.progress(len(windows), f"evaluating {said}") as advance:
        for batches in dealt:
            total += opened.score(batches)
            advance(min(len(windows), opened.parts * sum(len(batch.tokens) for batch in batches)))
    summed = torch.tensor(total, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(summed)
    return summed.item()


def _unscored(texts: Texts) -> Domain:
    return Domain(
        documents=len(texts.documents), tokens=texts.tokens, characters=texts.characters, bytes=texts.bytes, nats=0.0
    )


def _scored(name: str, domain: Domain, *, nats: float) -> Domain:
    if not math.isfinite(nats):
        raise ValueError(
            f"the loss of a model must be finite, on {name} it is {nats}; take --dtype fp32, or another checkpoint"
        )
    domain = replace(domain, nats=nats)
    log.say(f"{name}: {domain.measures.bits_per_character:.4f} bits per character, {domain.characters:,} characters")
    return domain


def show(results: Sequence[Result]) -> None:
    """The table on the console. Raises ValueError for results that do not compare."""
    log.table("evaluation", columns(results), rows(results))
    for remark in remarks(results):
        log.say(f"- {remark}")


def write(results: Sequence[Result], folder: Path) -> None:
    """Write the last of the results, and table and chart of all. Raises ValueError for such as do not compare."""
    (folder / TABLE).write_text(markdown(results), encoding="utf-8")
    draw_chart(results, folder / CHART)
    results[-1].save(folder / RESULT)


@contextmanager
def output_folder(folder: Path) -> Iterator[Path | None]:
    """A folder to write into, on rank 0, which gets its name when all is well; None on other ranks. Collective.

    Raises ValueError on every rank where there is something already.
    """
    with ExitStack() as stack:
        draft = None
        told: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                draft = stack.enter_context(whole_folder(folder, said="--output"))
            except (ValueError, OSError) as error:
                told[0] = error
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise told[0]
        yield draft
