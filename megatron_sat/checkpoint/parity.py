"""Do two models compute the same? The gate of import, export and ``verify``, and the loss that a first step must show.

Both models read the same real text (`SAMPLE`); hidden states are taken at the places of `hf_names.POINTS`, behind the
embedding, every attention, MLP and layer, the final norm, and the logits, so that a report names the first place that
differs. In fp32 logits must be within 1e-4 of each other (on a GPU, where that is more, within 2e-5 of the largest), in
bf16 the likeliest next token must be the same for 99 % of the tokens; no padding row may ever be the likeliest.

`Recorded` is what Hugging Face's model loses on that text, token by token. `check_first_loss` holds the first step of a
training run to it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sat.checkpoint.traces import Trace

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
GPU_SHARE = 2e-5
"""On a GPU also this share of the largest logit: a fused product adds in another order there than its parts do."""
MIN_SAME_TOP = 0.99
"""Share of tokens whose likeliest successor must be the same in bf16."""
FIRST_LOSS_TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Nats a token that rounding may make."""
_DIFFERS: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""A hidden state differs when the largest difference is above this share of its largest value."""
RECORDED = "recorded_loss.json"
"""Where an import leaves a `Recorded`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How far two models are from each other on one text."""

    layout: str
    dtype: torch.dtype
    max_delta: float
    """Of the logits."""
    allowed: float
    """In fp32."""
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
        agree = self.max_delta <= self.allowed if self.dtype == torch.float32 else self.same_top >= MIN_SAME_TOP
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
    reference: Trace,
    found: Trace,
    *,
    ids: Sequence[int],
    vocab_size: int,
    dtype: torch.dtype,
    layout: str,
    on_gpu: bool = False,
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
        allowed=max(MAX_DELTA, GPU_SHARE * theirs.abs().max().item() if on_gpu else 0.0),
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
            f"the two models must compute the same: fp32 logits within {report.allowed:.1g}, or {MIN_SAME_TOP:.0%} "
            f"equal top tokens in bf16, and no padding predicted; got {report}. A conversion that "
            "differs is ours to mend: report the model; --skip-gate goes on at your own risk"
        )


def _distance(theirs: Tensor, ours: Tensor) -> float:
    return ((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def _losses(logits: Tensor, ids: Sequence[int]) -> Tensor:
    return F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none")
