"""Extend a tokenizer, prove it, resize its model, check the loss, write it all: the whole of tools/extend_vocab.py."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sat.log import say, table
from megatron_sat.vocab.candidates import Documents, read_candidates, train_candidates
from megatron_sat.vocab.characters import has_chinese
from megatron_sat.vocab.checks import Fertility, Proof, fertilities, require
from megatron_sat.vocab.embeddings import new_rows, padded, padding_row
from megatron_sat.vocab.extension import Extension, extend, known_texts
from megatron_sat.vocab.form import Form
from megatron_sat.vocab.loss import load_encoder, load_model, loss_per_character
from megatron_sat.vocab.model_files import check_rows, grow, read_config, resize_model
from megatron_sat.vocab.report import REPORT
from megatron_sat.vocab.source import read_source
from megatron_sat.vocab.write import staged, write_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What becomes of the model's rows."""

    folder: Path
    """A Hugging Face folder with safetensors."""
    init: str = "subtoken-mean"
    """One of embeddings.INITS."""
    match_norms: bool = False
    """Give new rows the norm of the rows they were made from; measured to be worse (docs/vocabulary.md)."""
    pad_to: int = 128
    """Rows are a multiple of this times `tensor_parallel`."""
    tensor_parallel: int = 1
    seed: int = 1234
    """Of the inits that draw."""
    loss_characters: int = 20_000
    """Chinese characters of held-out text that the loss is measured on, at least 1."""
    max_loss_increase: float = 1.2
    """Nats a character that the loss may be worse by before the first step, at least 0."""

    def __post_init__(self) -> None:
        if self.loss_characters < 1:
            raise ValueError(f"--loss-characters must be at least 1, got {self.loss_characters}; try 20000")
        if not self.max_loss_increase >= 0:
            raise ValueError(f"--max-loss-increase must be at least 0, got {self.max_loss_increase}; try 1.2")


def extend_vocabulary(
    tokenizer: str | Path,
    *,
    add: int,
    output: str | Path,
    documents: Documents,
    held_out: Mapping[str, Sequence[str]],
    ready_model: str | Path | None,
    coverage: float,
    model: ModelSettings | None,
) -> dict[str, Any]:
    """Do it all; returns the report that also lies in the output as `REPORT`.

    tokenizer: a SentencePiece model or a Hugging Face folder. documents: texts to train candidates on, unless
    `ready_model` has them. held_out: texts by domain for proofs, fertility and loss, seen by no trainer. model: None
    leaves the model out.
    Raises ValueError, and leaves nothing behind, where a proof or the loss fails.
    """
    if add < 1:
        raise ValueError(f"--add must be at least 1, got {add}; the paper adds 33000")
    source = read_source(tokenizer)
    with staged(output) as folder:
        if ready_model is None:
            candidates = train_candidates(documents, add=add, known=known_texts(source), coverage=coverage)
        else:
            candidates = read_candidates(ready_model)
        extension = extend(source, candidates=candidates, add=add)
        say(
            f"{extension.first_id:,} old and {add:,} new pieces from {len(candidates):,} candidates; "
            f"{len(extension.plan.between):,} stand between, {len(extension.plan.dropped):,} were dropped"
        )
        report = _proven(extension, held_out=held_out)
        write_tokenizer(extension, source=source, target=folder)
        if model is not None:
            report["model"] = _resize(extension, settings=model, target=folder)
        _check_as_loaded(extension, folder=folder, held_out=held_out)
        if model is not None:
            report["loss_per_character"] = _check_loss(extension, settings=model, target=folder, held_out=held_out)
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"wrote {output}")
    return report


def _proven(extension: Extension, *, held_out: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    proofs = extension.prove([text for texts in held_out.values() for text in texts])
    table("proofs", ("holds", "statement", "tried on"), [_proof_row(proof) for proof in proofs])
    require(proofs)
    found = fertilities(extension.old, extension.new[0], domains=held_out)
    table("tokens a character", ("domain", "characters", "before", "after"), [_fertility_row(f) for f in found])
    return {
        "old_tokens": extension.first_id,
        "new_tokens": len(extension.plan.additions),
        "between": extension.plan.between,
        "dropped": extension.plan.dropped,
        "proofs": [asdict(proof) for proof in proofs],
        "tokens_per_character": [asdict(fertility) for fertility in found],
    }


def _proof_row(proof: Proof) -> tuple[str, str, str]:
    return ("yes" if proof.holds else "NO", proof.statement, proof.tried_on)


def _fertility_row(found: Fertility) -> tuple[str, str, str, str]:
    return (found.domain, f"{found.characters:,}", f"{found.before:.3f}", f"{found.after:.3f}")


def _resize(extension: Extension, *, settings: ModelSettings, target: Path) -> dict[str, Any]:
    """Write the model with its new rows."""
    check_rows(settings.folder, tokens=extension.first_id)
    rows = padded(extension.vocab_size, multiple=settings.pad_to, tensor_parallel=settings.tensor_parallel)

    def resize(weight: Tensor) -> Tensor:
        old = weight[: extension.first_id]
        generator = torch.Generator().manual_seed(settings.seed)
        added = new_rows(
            old,
            subtokens=extension.subtokens,
            init=settings.init,
            match_norms=settings.match_norms,
            generator=generator,
        )
        return grow(weight, added=added, padding=padding_row(old), first=extension.first_id, rows=rows)

    resize_model(settings.folder, target=target, rows=rows, resize=resize)
    say(f"model: {rows:,} rows, {rows - extension.vocab_size:,} of them padding; new rows by {settings.init}")
    return {"rows": rows, "init": settings.init, "match_norms": settings.match_norms, "seed": settings.seed}


def _check_as_loaded(extension: Extension, *, folder: Path, held_out: Mapping[str, Sequence[str]]) -> None:
    """The folder gives everybody who loads it the ids that were proven."""
    encode = load_encoder(folder)
    loaded = Form(name="AutoTokenizer", encode=encode, decode=extension.new[0].decode)
    texts = [text for domain in held_out.values() for text in domain if "<" not in text]  # a special token is one there
    require([_agreement(extension.new[0], loaded, texts=[" 中文", "a b", *texts])])


def _agreement(proven: Form, loaded: Form, *, texts: Sequence[str]) -> Proof:
    offenders = [repr(text[:40]) for text in texts if proven.encode(text) != loaded.encode(text)]
    return Proof(
        statement="AutoTokenizer loads what was proven", tried_on=f"{len(texts):,} texts", offenders=offenders
    )


def _check_loss(
    extension: Extension, *, settings: ModelSettings, target: Path, held_out: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Compare nats a character of held-out Chinese before and after. Raises ValueError where they rise too much."""
    texts = _chinese(held_out, characters=settings.loss_characters)
    start = start_token(read_config(settings.folder))
    before, after = (
        loss_per_character(load_model(folder), encode=form.encode, start=start, texts=texts)
        for folder, form in ((settings.folder, extension.old), (target, extension.new[0]))
    )
    count = sum(map(len, texts))
    say(f"loss on {count:,} characters of held-out Chinese: {before:.4f} nats a character before, {after:.4f} after")
    if not after - before <= settings.max_loss_increase:
        raise ValueError(
            f"the loss a character may rise by --max-loss-increase ({settings.max_loss_increase}) at most, it rises "
            f"from {before:.4f} to {after:.4f}; choose another --init, or raise the limit"
        )
    return {"characters": count, "before": before, "after": after}


def start_token(config: Mapping[str, Any]) -> int:
    """The token that a text begins after: bos, or eos where a model has no bos. Raises ValueError without either."""
    for name in ("bos_token_id", "eos_token_id"):
        found = config.get(name)
        if found is not None:
            return int(found[0] if isinstance(found, list) else found)
    raise ValueError("config.json must have bos_token_id or eos_token_id, it has neither; add one")


def _chinese(held_out: Mapping[str, Sequence[str]], *, characters: int) -> list[str]:
    """About so many characters of texts with Chinese, in turn from each domain."""
    lists = [[text for text in texts if has_chinese(text)] for texts in held_out.values()]
    chosen: list[str] = []
    room = characters
    for order in range(max(map(len, lists), default=0)):
        for texts in lists:
            if order < len(texts) and room > 0:
                chosen.append(texts[order][:room])
                room -= len(chosen[-1])
    return chosen
