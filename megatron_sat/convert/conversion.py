"""Hugging Face in, Hugging Face out, and the proof that nothing changed: what tools/convert_checkpoint.py runs.

    SAVE/release/            the weights, a distributed checkpoint that any layout opens with --finetune
    SAVE/model.yaml          the model's flags, for --config
    SAVE/hf/                 config.json, generation_config.json and tokenizer files as they came
    SAVE/recorded_loss.json  what Hugging Face's model loses on `parity.SAMPLE`

A folder appears when it is whole and has passed the gate, or not at all. Import and export are the work of one process;
`verify_model` takes the ranks it is given and goes through the layouts that fit them.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat import log
from megatron_sat.checkpoint import parity, traces
from megatron_sat.checkpoint.header import Header
from megatron_sat.checkpoint.hf_config import (
    config_of,
    differences,
    dimensions_of,
    features_of,
    padded,
    refuse_unlike,
    settings_of,
)
from megatron_sat.checkpoint.hf_export import SHARD_BYTES, export_weights
from megatron_sat.checkpoint.hf_files import copy_beside, whole_folder
from megatron_sat.checkpoint.hf_import import import_weights
from megatron_sat.checkpoint.hf_model import CONFIG, load_model, read_config, unpack_gguf, write_config
from megatron_sat.checkpoint.hf_names import NAMES, Row
from megatron_sat.checkpoint.resume import Checkpoint, open_checkpoint
from megatron_sat.cli import as_yaml
from megatron_sat.convert.opening import DTYPES, model_settings, one_rank, open_model
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_of_folder

MODEL_FILE = "model.yaml"
BESIDE = "hf"
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
"""Tensor and pipeline sizes that `verify_model` goes through, where ranks and model allow."""


def import_model(
    hf: Path,
    save: Path,
    *,
    tp: int = 1,
    divisible_by: int = 128,
    dtype: str | None = None,
    gate: str | None = "fp32",
    table: Sequence[Row] = NAMES,
) -> None:
    """Import the model of a folder, or of a GGUF file, into ``save``, a new folder.

    tp: tensor-parallel size to pad the vocabulary for; its divisors fit as well. dtype: convert the weights to it;
    None keeps theirs. gate: precision in which the two models are compared at TP=1; None: they are not, and no loss is
    recorded.
    Raises ValueError for a model that we cannot compute, a folder that is not whole, and a gate that fails.
    """
    with one_rank(), whole_folder(save, said="--save") as draft, _unpacked(hf) as source:
        config = read_config(source)
        rows = padded(config["vocab_size"], divisible_by=divisible_by, tp=tp)
        settings = settings_of(config, padded_vocab_size=rows)
        _refuse_layout(settings, tp=tp)
        copy_beside(source, draft / BESIDE)
        tokenizer = tokenizer_of_folder(draft / BESIDE)
        settings |= _named(tokenizer, folder=save.resolve() / BESIDE)
        log.say(f"importing {hf}: {config['model_type']}, {config['vocab_size']} tokens in {rows} rows")
        import_weights(
            source,
            draft,
            features=features_of(config),
            dims=dimensions_of(config, padded_vocab_size=rows),
            header=Header(iteration=0, consumed_train_samples=0, tokenizer=tokenizer.fingerprint, config=settings),
            dtype=None if dtype is None else DTYPES[dtype],
            table=table,
        )
        (draft / MODEL_FILE).write_text(as_yaml(settings), encoding="utf-8")
        if gate is not None:
            _gate(draft, source, dtype=gate, records=draft / parity.RECORDED)
    log.say(f"imported to {save}: pretrain_sat.py --config {save / MODEL_FILE} --load {save} --finetune ...")


def export_model(
    load: Path,
    hf: Path,
    *,
    step: int | None = None,
    like: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    gate: str | None = "fp32",
    table: Sequence[Row] = NAMES,
) -> None:
    """Export a checkpoint, imported or of a run, to ``hf``, a new folder.

    step: which one; None: the newest. like: folder with the model's config.json and tokenizer; None: what the import
    kept, found through the --tokenizer-model that was saved with the weights. dtype, gate: as in `import_model`.
    Raises ValueError for a checkpoint that is not of the model that ``like`` describes, and a gate that fails.
    """
    with one_rank(), whole_folder(hf, said="--hf") as draft:
        checkpoint = open_checkpoint(load, step=step)
        settings = model_settings(checkpoint)
        refuse_unlike(settings)
        config = _write_beside(draft, checkpoint=checkpoint, settings=settings, like=like)
        log.say(f"exporting {checkpoint.folder}: {config['model_type']}, {config['vocab_size']} tokens")
        export_weights(
            checkpoint,
            draft,
            features=features_of(config),
            dims=dimensions_of(config, padded_vocab_size=settings["padded_vocab_size"]),
            dtype=None if dtype is None else DTYPES[dtype],
            max_shard_bytes=max_shard_bytes,
            table=table,
        )
        if gate is not None:
            _gate(load, draft, dtype=gate, step=step)
    log.say(f"exported to {hf}")


def verify_model(
    load: Path, hf: Path, *, dtypes: Sequence[str] = ("fp32",), step: int | None = None
) -> list[parity.Report]:
    """Compare a checkpoint with a Hugging Face folder in every layout of `LAYOUTS` that fits; collective.

    Returns the reports; each is said as it comes. Raises ValueError at the end if one did not pass.
    """
    reports = []
    for dtype in dtypes:
        reference, ids = _reference(hf, dtype=dtype)
        for tp, pp in _fitting(model_settings(open_checkpoint(load, step=step)), ranks=dist.get_world_size()):
            reports.append(_compared(load, hf, reference=reference, ids=ids, dtype=dtype, tp=tp, pp=pp, step=step))
    for report in reports:
        parity.refuse(report)
    return reports


# -- the gate


def _gate(load: Path, hf: Path, *, dtype: str, step: int | None = None, records: Path | None = None) -> None:
    """Compare at TP=1. Raises ValueError. records: where to write the reference's loss, by fp32 logits."""
    reference, ids = _reference(hf, dtype=dtype)
    if records is not None:
        exact = reference if dtype == "fp32" else _reference(hf, dtype="fp32")[0]
        rows = model_settings(open_checkpoint(load))["padded_vocab_size"]
        parity.record(exact, ids=ids, padded_vocab_size=rows).save(records)
    parity.refuse(_compared(load, hf, reference=reference, ids=ids, dtype=dtype, tp=1, pp=1, step=step))


def _reference(hf: Path, *, dtype: str) -> tuple[traces.Trace, list[int]]:
    """What Hugging Face's model computes on rank 0, told to all, and for which tokens; the model is gone afterwards."""
    config = read_config(hf)
    tokens = parity.sample(
        tokenizer_of_folder(hf).encode, vocab_size=config["vocab_size"], longest=config["max_position_embeddings"]
    )
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        try:
            told[0] = traces.trace_hugging_face(load_model(hf, dtype=DTYPES[dtype], device=device), tokens)
        except ValueError as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0], tokens


def _compared(
    load: Path, hf: Path, *, reference: traces.Trace, ids: Sequence[int], dtype: str, tp: int, pp: int, step: int | None
) -> parity.Report:
    opened = open_model(load, tp=tp, pp=pp, dtype=dtype, step=step, seq_length=len(ids))
    found = traces.trace_megatron(opened.chunks, ids, layout=opened.layout)
    report = parity.compare(
        reference,
        found,
        ids=ids,
        vocab_size=read_config(hf)["vocab_size"],
        dtype=DTYPES[dtype],
        layout=f"TP={tp}, PP={pp}",
        on_gpu=torch.cuda.is_available(),
    )
    log.say(str(report))
    return report


def _fitting(settings: dict[str, Any], *, ranks: int) -> list[tuple[int, int]]:
    """The layouts that the model can be cut into, on so many ranks; the others are replicas."""
    return [
        (tp, pp)
        for tp, pp in LAYOUTS
        if ranks % (tp * pp) == 0 and not settings["num_layers"] % pp and not _uncuttable(settings, tp=tp)
    ]


def _uncuttable(settings: dict[str, Any], *, tp: int) -> list[str]:
    groups = settings.get("num_query_groups") or settings["num_attention_heads"]
    parts = {"query groups": groups, "MLP width": settings["ffn_hidden_size"], "rows": settings["padded_vocab_size"]}
    return [f"{count} {name}" for name, count in parts.items() if count % tp]


def _refuse_layout(settings: dict[str, Any], *, tp: int) -> None:
    if broken := _uncuttable(settings, tp=tp):
        raise ValueError(
            f"--tensor-model-parallel-size must divide the model, {tp} does not divide {' and '.join(broken)}; "
            "choose a smaller one"
        )


# -- what lies beside the weights


@contextmanager
def _unpacked(hf: Path) -> Iterator[Path]:
    """A folder with safetensors: the one given, or a passing one made of a GGUF file."""
    if hf.suffix != ".gguf":
        yield hf
        return
    with tempfile.TemporaryDirectory() as folder:
        log.say(f"dequantizing {hf.name} to fp32, the whole model in memory")
        unpack_gguf(hf, Path(folder))
        yield Path(folder)


def _named(tokenizer: Tokenizer, *, folder: Path) -> dict[str, str]:
    """The settings that name a tokenizer which will lie in ``folder``."""
    if tokenizer.kind == "sentencepiece":
        return {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(folder / "tokenizer.model")}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}


def _write_beside(
    draft: Path, *, checkpoint: Checkpoint, settings: dict[str, Any], like: Path | None
) -> dict[str, Any]:
    """Write configuration and tokenizer of an export; returns the former. Raises ValueError for another model's."""
    assert checkpoint.header is not None
    saved = checkpoint.header.config
    kept = _folder_of(saved.get("tokenizer_model")) if like is None else like
    if kept is not None:
        copy_beside(kept, draft)
    if not (draft / CONFIG).is_file():
        if like is not None or saved.get("tokenizer_model") is None:
            raise ValueError(f"--like must be a model's folder with {CONFIG}, {like} is not; name another")
        tokenizer = build_tokenizer(saved["tokenizer_type"], model=saved["tokenizer_model"])
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}
        known = {name: token if token >= 0 else None for name, token in ends.items()}
        write_config(draft, config=config_of(settings, vocab_size=tokenizer.vocab_size) | known)
    config = read_config(draft)
    if wrong := differences(config, settings=settings):
        lines = "".join(f"\n  {line}" for line in wrong)
        raise ValueError(
            f"{CONFIG} must describe the model of {checkpoint.folder}, that of {kept} does not:{lines}\n"
            "give the right folder with --like"
        )
    return config


def _folder_of(tokenizer_model: str | None) -> Path | None:
    """The folder of a run's tokenizer; None where it has gone."""
    if tokenizer_model is None or not Path(tokenizer_model).exists():
        return None
    path = Path(tokenizer_model)
    return path if path.is_dir() else path.parent
