"""The two kinds of model that can be evaluated, as one thing: what is known before it is loaded, and how to load it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sat.checkpoint.hf_model import CONFIG, load_model, read_config
from megatron_sat.checkpoint.resume import Checkpoint, open_checkpoint
from megatron_sat.convert.opening import DTYPES, model_settings, open_model
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_of_folder
from megatron_sat.evaluate.perplexity import Scorer, hugging_face_scorer, megatron_scorer
from megatron_sat.log import warn_once
from megatron_sat.sparsity.controller import sparse_modules


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that scores, on this rank."""

    score: Scorer
    part: int
    """Which replica this rank belongs to."""
    parts: int
    """Replicas."""
    together: int
    """Batches that keep it busy: more than one in a pipeline."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model before it is loaded."""

    kind: str
    """One of `result.KINDS`."""
    folder: Path
    step: int | None
    tokenizer: Tokenizer
    vocab_size: int
    """Ids that are tokens as well as rows of the model: those that probabilities are shared among."""
    longest: int
    """Positions that it has."""
    open: Callable[[str, int], Opened]
    """Of a key of `DTYPES` and the longest window; collective."""

    @property
    def start(self) -> int:
        """The token that each document begins behind: bos, or what ends a document where there is no bos."""
        return self.tokenizer.bos if self.tokenizer.bos >= 0 else self.tokenizer.eod


def megatron_model(
    load: Path,
    *,
    step: int | None = None,
    tp: int = 1,
    pp: int = 1,
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
) -> Subject:
    """A checkpoint of ours, in any layout; collective, the default process group exists.

    step: None: the newest. tokenizer_type, tokenizer_model: where its tokenizer is now; None: where it was.
    Raises ValueError for a checkpoint that is missing, does not say what it holds, or comes without its tokenizer.
    """
    checkpoint = open_checkpoint(load, step=step)
    settings = model_settings(checkpoint)
    tokenizer = _tokenizer_of(checkpoint, kind=tokenizer_type, model=tokenizer_model)
    rows = _rows_of(checkpoint, tokenizer=tokenizer, padded=settings["padded_vocab_size"])
    vocab_size = _shared(tokenizer, rows=rows, folder=load)

    def open_it(dtype: str, seq_length: int) -> Opened:
        opened = open_model(load, tp=tp, pp=pp, dtype=dtype, step=step, seq_length=seq_length)
        assert not sparse_modules(opened.chunks), "an evaluated model is dense"
        layout = opened.layout
        return Opened(
            score=megatron_scorer(opened.chunks, layout=layout, vocab_size=vocab_size),
            part=layout.dp_rank,
            parts=layout.dp_size,
            together=1 if pp == 1 else 4 * pp,
        )

    return Subject(
        kind="megatron",
        folder=load,
        step=checkpoint.iteration,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        longest=settings["max_position_embeddings"],
        open=open_it,
    )


def hugging_face_model(hf: Path) -> Subject:
    """A local folder of transformers' in safetensors; each rank holds the whole model.

    Raises ValueError for a folder without a model or without its tokenizer.
    """
    config = read_config(hf)
    for field in ("vocab_size", "max_position_embeddings"):
        if config.get(field) is None:
            raise ValueError(f"{hf / CONFIG} must have {field}, it has not; evaluate a model of text that has it")
    tokenizer = tokenizer_of_folder(hf)
    vocab_size = _shared(tokenizer, rows=config["vocab_size"], folder=hf)

    def open_it(dtype: str, seq_length: int) -> Opened:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        model = load_model(hf, dtype=DTYPES[dtype], device=device)
        score = hugging_face_scorer(model, vocab_size=vocab_size)
        return Opened(score=score, part=dist.get_rank(), parts=dist.get_world_size(), together=1)

    return Subject(
        kind="hf",
        folder=hf,
        step=None,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        longest=config["max_position_embeddings"],
        open=open_it,
    )


def _tokenizer_of(checkpoint: Checkpoint, *, kind: str | None, model: str | None) -> Tokenizer:
    """The tokenizer that a checkpoint was saved with, read from where it was, or from ``model``."""
    assert checkpoint.header is not None
    saved = checkpoint.header.config
    kind, model = kind or saved.get("tokenizer_type"), model or saved.get("tokenizer_model")
    if kind is None or model is None:
        raise ValueError(
            f"a checkpoint must say which tokenizer is its own, {checkpoint.folder} does not; give --tokenizer-type "
            "and --tokenizer-model"
        )
    if not Path(model).exists():
        raise ValueError(
            f"a checkpoint's tokenizer must be where it was, {model} does not exist; say with --tokenizer-model where "
            "it is now"
        )
    tokenizer = build_tokenizer(kind, model=model)
    wanted = checkpoint.header.tokenizer
    if wanted is not None and wanted != tokenizer.fingerprint:
        raise ValueError(
            f"the tokenizer must be the checkpoint's ({wanted[:12]}), {model} is another "
            f"({tokenizer.fingerprint[:12]}); say with --tokenizer-model where the right one is"
        )
    return tokenizer


def _rows_of(checkpoint: Checkpoint, *, tokenizer: Tokenizer, padded: int) -> int:
    """Rows without padding, as far as anybody says: config.json beside the tokenizer, from the import, or the run."""
    assert checkpoint.header is not None
    path = Path(tokenizer.path)
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file():
        return min(padded, read_config(folder)["vocab_size"])
    return min(padded, checkpoint.header.config.get("vocab_size") or padded)


def _shared(tokenizer: Tokenizer, *, rows: int, folder: Path) -> int:
    """Ids that are tokens as well as rows. Warns of tokens without a row: often a special one that nobody trained."""
    if tokenizer.vocab_size > rows:
        warn_once(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens and {folder} {rows} rows: text that "
            "needs the others is refused"
        )
    return min(tokenizer.vocab_size, rows)
