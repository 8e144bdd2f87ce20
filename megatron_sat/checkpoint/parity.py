"""Do two models compute the same? The gate of import, export and ``verify``, and the loss that a first step must show.

Both models read the same real text (`SAMPLE`); hidden states are taken at the places of `hf_names.POINTS`, behind the
embedding, every attention, MLP and layer, the final norm, and the logits, so that a report names the first place that
differs. In fp32 logits must be within 1e-4 of each other, in bf16 the likeliest next token must be the same for 99 %
of the tokens; no padding row may ever be the likeliest.

`Recorded` is what Hugging Face's model loses on that text, token by token. `check_first_loss` holds the first step of a
training run to it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_sat.checkpoint.hf_names import LAYER, POINTS
from megatron_sat.distributed import Layout

SAMPLE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season
of Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing
before us. Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I
thought I would sail about a little and see the watery part of the world.

def greatest_common_divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a

學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。
3.14159 + 2.71828 = 5.85987; 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89. Alle Menschen werden Brüder. Liberté, égalité."""
"""Public-domain English and Chinese, a function of Euclid's, numbers."""
SAMPLE_TOKENS = 256
MAX_DELTA = 1e-4
"""Largest difference of fp32 logits."""
MIN_SAME_TOP = 0.99
"""Share of tokens whose likeliest successor must be the same in bf16."""
FIRST_LOSS_TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Nats a token that rounding may make."""
_DIFFERS: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""A hidden state differs when the largest difference is above this share of its largest value."""
_MODULES_WITH_BIAS = ("attention", "MLP")
RECORDED = "recorded_loss.json"
"""Where an import leaves a `Recorded`."""
Trace = dict[str, Tensor]
"""By the name of a place, in the order of the computation: [s, h] in fp32 on the CPU; "logits": [s, rows]."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How far two models are from each other on one text."""

    layout: str
    dtype: torch.dtype
    max_delta: float
    """Of the logits."""
    same_top: float
    """Share of tokens with the same likeliest successor."""
    padding_predicted: int
    """Tokens for which Megatron finds a padding row likeliest."""
    reference_loss: float
    loss: float
    """Nats a token; Megatron's over all rows, as in training."""
    first: tuple[str, float] | None
    """The first place that differs, and by which share; None if all agree."""

    @property
    def passed(self) -> bool:
        agree = self.max_delta <= MAX_DELTA if self.dtype == torch.float32 else self.same_top >= MIN_SAME_TOP
        return agree and not self.padding_predicted

    def __str__(self) -> str:
        first = "" if self.first is None else f"; first place that differs: {self.first[0]} (by {self.first[1]:.1e})"
        padding = f"; a padding row is likeliest {self.padding_predicted} times" if self.padding_predicted else ""
        return (
            f"{self.layout}, {str(self.dtype).removeprefix('torch.')}: largest difference of logits "
            f"{self.max_delta:.1e}, same top token {self.same_top:.1%}, loss {self.loss:.4f} (Hugging Face "
            f"{self.reference_loss:.4f}){padding}{first}"
        )


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Hugging Face's loss on `SAMPLE`, to be compared with the first loss of a training run."""

    ids: list[int]
    """[n + 1] tokens of the text."""
    losses: list[float]
    """[n] nats of each token after the first, in fp32."""
    padded_losses: list[float]
    """[n] the same where the softmax counts the padding rows too, as in training: each has the mean logit."""
    padded_vocab_size: int
    """Rows of Megatron's embedding."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def load(path: Path) -> "Recorded":
        """Raises ValueError for a file that `save` did not write."""
        try:
            return Recorded(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} must be a recorded loss, it is not: {error}; import the model again") from error

    def expected(self, seq_length: int) -> float:
        """The mean loss, padding counted, on the first ``seq_length`` tokens: a causal model sees no further."""
        losses = self.padded_losses[:seq_length]
        return sum(losses) / len(losses)

    def batch(self, seq_length: int, *, micro_batch_size: int) -> dict[str, Tensor]:
        """The text as one micro-batch: tokens, labels, position_ids, loss_mask [b, s]; what is too short is masked."""
        used = min(seq_length, len(self.losses))
        tokens, labels = (torch.zeros(micro_batch_size, seq_length, dtype=torch.long) for _ in range(2))
        mask = torch.zeros(micro_batch_size, seq_length)
        tokens[:, :used] = torch.tensor(self.ids[:used])
        labels[:, :used] = torch.tensor(self.ids[1 : used + 1])
        mask[:, :used] = 1.0
        positions = torch.arange(seq_length).expand(micro_batch_size, -1).contiguous()
        return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}


def check_first_loss(recorded: float, *, measured: float, tolerance: float, override: bool = False) -> str:
    """The line for the log at step 0. Raises ValueError where the losses are apart, unless ``override``.

    recorded, measured: nats a token on the same text, of Hugging Face's model and of the run about to start.
    """
    line = f"step      0 | loss on the imported model's sample {measured:.4f}, Hugging Face's {recorded:.4f}"
    if math.isfinite(measured) and abs(measured - recorded) <= tolerance:
        return line
    if override:
        return f"{line}: apart by {abs(measured - recorded):.4f}, as --allow-first-loss-apart permits"
    raise ValueError(
        f"the first loss must be Hugging Face's {recorded:.4f} within {tolerance} nats, got {measured:.4f}: the model "
        "that would be trained is not the one that was imported; check the model's flags against its model.yaml, run "
        "tools/convert_checkpoint.py verify, or pass --allow-first-loss-apart"
    )


def sample(encode: Callable[[str], list[int]], *, vocab_size: int, longest: int) -> list[int]:
    """Tokens of `SAMPLE`, at most ``longest``. Raises ValueError for a tokenizer whose ids the model has not."""
    ids = encode(SAMPLE)[: min(longest, SAMPLE_TOKENS)]
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer must be the model's, it gives id {max(ids)} and the model has {vocab_size} rows; "
            "put the tokenizer of this model beside it"
        )
    return ids


def record(trace: Trace, *, ids: Sequence[int], padded_vocab_size: int) -> Recorded:
    """Token by token, what Hugging Face's traced model loses."""
    logits = trace["logits"]
    padding = logits.mean(-1, keepdim=True).expand(-1, padded_vocab_size - logits.shape[-1])
    return Recorded(
        ids=list(ids),
        losses=_losses(logits, ids).tolist(),
        padded_losses=_losses(torch.cat([logits, padding], dim=-1), ids).tolist(),
        padded_vocab_size=padded_vocab_size,
    )


def compare(
    reference: Trace, found: Trace, *, ids: Sequence[int], vocab_size: int, dtype: torch.dtype, layout: str
) -> Report:
    """Megatron's trace beside Hugging Face's. vocab_size: rows of the latter; the others are padding."""
    theirs, ours = reference["logits"], found["logits"][:, :vocab_size]
    delta = (theirs - ours).abs().max().item()
    far = ((name, _distance(reference[name], found[name][..., : reference[name].shape[-1]])) for name in reference)
    first = next(((name, share) for name, share in far if not share <= _DIFFERS[dtype]), None)
    return Report(
        layout=layout,
        dtype=dtype,
        max_delta=delta if math.isfinite(delta) else math.inf,
        same_top=(theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
        padding_predicted=int((found["logits"].argmax(-1) >= vocab_size).sum()),
        reference_loss=_losses(theirs, ids).mean().item(),
        loss=_losses(found["logits"], ids).mean().item(),
        first=first,
    )


def refuse(report: Report) -> None:
    """Raise ValueError for a report that did not pass."""
    if not report.passed:
        raise ValueError(
            f"the two models must compute the same: fp32 logits within {MAX_DELTA}, or {MIN_SAME_TOP:.0%} equal top "
            f"tokens in bf16, and no padding predicted; got {report}. A conversion that "
            "differs is ours to mend: report the model; --skip-gate goes on at your own risk"
        )


def _distance(theirs: Tensor, ours: Tensor) -> float:
    return ((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def _losses(logits: Tensor, ids: Sequence[int]) -> Tensor:
    return F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none")


# -- taking the traces


@torch.no_grad()
def trace_hugging_face(model: nn.Module, ids: Sequence[int]) -> Trace:
    """What one of transformers' models computes for a text."""
    modules = dict(model.named_modules())
    found: Trace = {}
    places = {}
    count = 1 + max(int(name.rsplit(".", 1)[1]) for name in modules if _is_layer(name))
    for label, theirs, _ in POINTS:
        for number in range(count if LAYER in theirs else 1):
            places[label.replace(LAYER, str(number))] = modules[theirs.replace(LAYER, str(number))]
    with _listening(places, lambda name, out: found.__setitem__(name, _plain(_first(out)[0]))):
        model(torch.tensor([list(ids)], device=next(model.parameters()).device), use_cache=False)
    return _in_order(found)


def _is_layer(name: str) -> bool:
    head, _, number = name.rpartition(".")
    return number.isdigit() and head == "model.layers"


@torch.no_grad()
def trace_megatron(chunks: Sequence[nn.Module], ids: Sequence[int], *, layout: Layout) -> Trace:
    """What our model computes for the text, in any layout without context parallelism; collective.

    Every rank gets the trace of the whole model.
    """
    found: Trace = {}
    places: dict[str, nn.Module] = {}
    for chunk in chunks:
        places |= _places(chunk)
        chunk.eval()

    def keep(name: str, out: Any) -> None:
        value = _first(out)
        if name.endswith(_MODULES_WITH_BIAS) and out[1] is not None:
            value = value + out[1]  # Megatron adds it together with the residual
        found[name] = _plain(value[:, 0])

    with _listening(places, keep):
        _run(chunks, ids)
    everyone: list[Any] = [None] * layout.model_group.size()
    dist.all_gather_object(everyone, (layout.tp_rank, found), group=layout.model_group)
    merged: Trace = {}
    for _, part in everyone:
        merged |= part
    heads = {rank: part["logits"] for rank, part in everyone if "logits" in part}
    merged["logits"] = torch.cat([heads[rank] for rank in sorted(heads)], dim=-1)
    return _in_order(merged)


def _places(chunk: nn.Module) -> dict[str, nn.Module]:
    while hasattr(chunk, "module"):  # inside of Float16Module
        chunk = cast(nn.Module, chunk.module)
    model = cast(GPTModel, chunk)
    found: dict[str, nn.Module] = {}
    for label, _, ours in POINTS:
        if LAYER not in ours:
            if (module := _submodule(model, ours)) is not None:
                found[label] = module
            continue
        for here, layer in enumerate(model.decoder.layers):
            module = _submodule(model, ours.replace(LAYER, str(here)))
            assert module is not None
            found[label.replace(LAYER, str(layer.layer_number - 1))] = module
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """A module that this pipeline stage has, or None."""
    for name in path.split("."):
        found = getattr(model, name, None)
        if found is None:
            return None
        model = found
    return model


def _run(chunks: Sequence[nn.Module], ids: Sequence[int]) -> None:
    """One forward of all pipeline stages."""
    device = next(chunks[0].parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    positions = torch.arange(len(ids), device=device)[None]

    def step(_: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        return chunk(tokens, positions, None), lambda output, non_loss_data=True: None

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(()) for _ in chunks],
        model=list(chunks),
        num_microbatches=1,
        seq_length=len(ids),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


@contextmanager
def _listening(places: Mapping[str, nn.Module], hear: Callable[[str, Any], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, out: hear(name, out)

    handles = [module.register_forward_hook(hook(name)) for name, module in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _plain(value: Tensor) -> Tensor:
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True)  # Megatron adds the residual in place


def _in_order(found: Trace) -> Trace:
    """By the order of the computation: embedding, layers by number, and in a layer as `POINTS` has them."""
    order = [label for label, _, _ in POINTS]

    def place(name: str) -> tuple[int, int, int]:
        number = next((int(word) for word in name.split() if word.isdigit()), None)
        row = order.index(name if number is None else name.replace(str(number), LAYER, 1))
        return (0, 0, row) if row == 0 else (2, 0, row) if number is None else (1, number, row)

    return {name: found[name] for name in sorted(found, key=place)}
