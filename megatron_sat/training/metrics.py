"""What a training run says about itself: one record every few steps, to the console, a JSONL file and TensorBoard.

`Meter` gathers steps into a `Record`; the sinks write it. Executed FLOPs are the plan's: of the neurons that took part,
with recomputation and choosing; dense-equivalent ones are those of a dense step over the same tokens (``model.flops``).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_sat import log


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One update, as the loop hands it over."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    seconds: float
    tokens: int
    nominal_rate: float
    """The schedule's omission rate."""
    omission_rates: Mapping[str, float]
    """By kind of module, what was really left out."""
    executed_flops: float
    """Of the whole model over the global batch."""
    dense_flops: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """A window of updates: means, but for what only its last step can tell."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    nominal_omission_rate: float
    omission_rate: dict[str, float]
    step_seconds: float
    tokens_per_second: float
    executed_tflops: float
    """TFLOP/s a device, of what was computed."""
    dense_equivalent_tflops: float
    """TFLOP/s a device, had every neuron been computed in the same time."""
    elapsed_seconds: float
    """Training time since step 1, evaluations and checkpoints left out, earlier runs of a resumed job counted in."""
    executed_flops: float
    """Total since step 1."""
    consumed_tokens: int
    skipped_steps: int

    def line(self) -> str:
        """The record for a person."""
        rates = " ".join(f"{kind} {rate:.3f}" for kind, rate in self.omission_rate.items())
        return (
            f"step {self.step:>6} | loss {self.loss:.4f} | grad norm {self.grad_norm:.3f}"
            f" | lr {self.learning_rate:.2e}"
            f" | omission {self.nominal_omission_rate:.3f} ({rates or 'dense'})"
            f" | {self.tokens_per_second:,.0f} tokens/s"
            f" | {self.executed_tflops:.3g} TFLOP/s executed, {self.dense_equivalent_tflops:.3g} dense-equivalent"
            f" | {self.step_seconds:.3f} s/step" + (f" | {self.skipped_steps} skipped" if self.skipped_steps else "")
        )


@dataclass(kw_only=True)
class Totals:
    """What adds up over a run and goes through its checkpoints."""

    elapsed_seconds: float = 0.0
    executed_flops: float = 0.0
    consumed_tokens: int = 0

    def state(self) -> dict[str, float]:
        return asdict(self)


@dataclass(kw_only=True)
class Meter:
    """Collects steps and gives a `Record` of those since the last one."""

    num_devices: int
    totals: Totals = field(default_factory=Totals)
    _window: list[StepFigures] = field(default_factory=list)

    def add(self, figures: StepFigures) -> None:
        self._window.append(figures)
        self.totals.elapsed_seconds += figures.seconds
        self.totals.executed_flops += figures.executed_flops
        self.totals.consumed_tokens += figures.tokens

    def record(self) -> Record:
        """The window's record; the window starts anew. Needs at least one step."""
        window, last = self._window, self._window[-1]
        self._window = []
        seconds = max(sum(f.seconds for f in window), 1e-9)
        taken = [f for f in window if not f.skipped]
        device_seconds = seconds * self.num_devices * 1e12
        return Record(
            step=last.step,
            loss=sum(f.loss for f in taken) / len(taken) if taken else math.nan,
            grad_norm=last.grad_norm,
            learning_rate=last.learning_rate,
            nominal_omission_rate=last.nominal_rate,
            omission_rate=dict(last.omission_rates),
            step_seconds=seconds / len(window),
            tokens_per_second=sum(f.tokens for f in window) / seconds,
            executed_tflops=sum(f.executed_flops for f in window) / device_seconds,
            dense_equivalent_tflops=sum(f.dense_flops for f in window) / device_seconds,
            elapsed_seconds=self.totals.elapsed_seconds,
            executed_flops=self.totals.executed_flops,
            consumed_tokens=self.totals.consumed_tokens,
            skipped_steps=len(window) - len(taken),
        )


class Sink(Protocol):
    """Takes records of training and losses of evaluations."""

    def record(self, record: Record) -> None: ...

    def evaluation(self, step: int, losses: Mapping[str, float], *, elapsed_seconds: float) -> None: ...


class Console:
    """Rank 0's console."""

    def record(self, record: Record) -> None:
        log.say(record.line())

    def evaluation(self, step: int, losses: Mapping[str, float], *, elapsed_seconds: float) -> None:
        said = " | ".join(f"{name} {loss:.4f} (ppl {math.exp(min(loss, 700)):.2f})" for name, loss in losses.items())
        log.say(f"step {step:>6} | validation loss | {said}")


class JsonLines:
    """One JSON object a line: {"kind": "train" | "validation", "step": ..., ...}. Made on one rank only."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Lines of steps after ``resume_step``, left by a run that got further than its checkpoint, go first.

        Raises ValueError for a file of anything else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # what a crash left of it
        steps = [_step_of(line, at=f"{path}:{number}") for number, line in enumerate(lines, start=1)]
        kept = [line for line, step in zip(lines, steps, strict=True) if step <= resume_step]
        fresh = path.with_suffix(path.suffix + ".new")
        fresh.write_text("".join(kept))
        fresh.replace(path)
        self._path = path

    def record(self, record: Record) -> None:
        self._write({"kind": "train", **asdict(record)})

    def evaluation(self, step: int, losses: Mapping[str, float], *, elapsed_seconds: float) -> None:
        self._write({"kind": "validation", "step": step, "elapsed_seconds": elapsed_seconds, "loss": dict(losses)})

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _step_of(line: str, *, at: str) -> int:
    """The step of an earlier line. Raises ValueError for one that no run wrote."""
    try:
        entry = json.loads(line)
        if entry["kind"] in ("train", "validation"):
            return int(entry["step"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--log-jsonl must be new or hold an earlier run's figures, {at} has none; choose another file")


class TensorBoard:
    """Scalars under train/ and validation/. Made on one rank only."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def record(self, record: Record) -> None:
        figures = asdict(record)
        rates = figures.pop("omission_rate")
        step = figures.pop("step")
        for name, value in figures.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        for kind, rate in rates.items():
            self._writer.add_scalar(f"train/omission_rate_{kind}", rate, step)
        self._writer.flush()

    def evaluation(self, step: int, losses: Mapping[str, float], *, elapsed_seconds: float) -> None:
        for name, loss in losses.items():
            self._writer.add_scalar(f"validation/{name}", loss, step)
        self._writer.flush()


def open_sinks(
    *, jsonl: str | None, tensorboard: str | None, resume_step: int, beside: Callable[[], None]
) -> list[Sink]:
    """Rank 0's console and files, figures after the resumed step taken out; none elsewhere. Collective.

    beside: writes what else a run leaves behind, on rank 0. Raises ValueError on all ranks for what cannot be written.
    """
    sinks: list[Sink] = []
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            sinks.append(Console())
            if jsonl is not None:
                sinks.append(JsonLines(Path(jsonl), resume_step=resume_step))
            if tensorboard is not None:
                sinks.append(TensorBoard(Path(tensorboard), resume_step=resume_step))
            beside()
        except OSError as error:
            what = f"what a run leaves behind must be writable, {error.filename} is not: {error.strerror}"
            problem[0] = f"{what}; choose another --save, --log-jsonl or --tensorboard-dir"
        except ValueError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ValueError(problem[0])
    return sinks
