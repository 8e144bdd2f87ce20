"""Which Adam DeepSpeed steps: its own for the host where all ranks can have it, else torch's, and it says why."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from megatron_sat import log
from megatron_sat.engines import zero_adam
from megatron_sat.engines.deepspeed import library
from tests.checkpoint.runs import load, save
from tests.engines.test_megatron import LOSS, NORM
from tests.helpers.plain_engine import bits, train
from tests.helpers.ranks import run_ranks
from tests.helpers.zero_engine import load_library, make_zero_engine, needs_deepspeed, zero_weights

pytestmark = needs_deepspeed

SAVED = 3
"""Steps before the checkpoint: .9 to the 4th, with which a resumed run begins, is another by multiplication."""
ON_HOST: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    load_library()


class Compiled:
    """What DeepSpeed compiles, slowly: powers of the betas by multiplication in fp32, by pow after a jump."""

    def create_adam(self, _: int, lr: float, beta1: float, beta2: float, *rest: Any) -> int:
        self.step, self.powers = 0, [np.float32(1.0), np.float32(1.0)]
        return 0

    def increment(self, step: int, betas: tuple[float, float]) -> None:
        if step == self.step + 1:
            self.powers = [power * np.float32(beta) for power, beta in zip(self.powers, betas, strict=True)]
        elif step != self.step:
            self.powers = [np.power(np.float32(beta), np.float32(step)) for beta in betas]
        self.step = step


class HostAdam(torch.optim.Optimizer):
    """DeepSpeedCPUAdam as it counts and keeps its state, without a compiler."""

    def __init__(self, groups: Any, *, adamw_mode: bool, **how: Any) -> None:
        super().__init__(groups, how)
        self.adam_w_mode, self.opt_id, self.ds_opt_adam = adamw_mode, 0, Compiled()
        self.ds_opt_adam.create_adam(0, how["lr"], *how["betas"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                assert isinstance(state["step"], int), "what is compiled takes no tensor"
                state["step"] += 1
                self.ds_opt_adam.increment(state["step"], group["betas"])
                self._update(p, state, group)

    def _update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        rest1, rest2 = (float(np.float32(1) - power) for power in self.ds_opt_adam.powers)
        state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        denominator = state["exp_avg_sq"].sqrt() / rest2**0.5 + group["eps"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / rest1)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be there without a compiler."""
    monkeypatch.setattr(library().ops.adam, "DeepSpeedCPUAdam", HostAdam)
    monkeypatch.setattr(zero_adam, "_compiled_everywhere", lambda _: None)


class Run(NamedTuple):
    """What a rank computed and said."""

    said: str
    steps: list[tuple[float, float]]
    """Loss and norm of each."""
    weights: dict[str, bytes]
    """At the end."""


def trains(rank: int, stage: int, root: Path | None) -> Run:
    """Eight steps; with a root, a checkpoint after `SAVED` of them."""
    engine, layout = make_zero_engine(stage, file=ON_HOST)
    steps = train(engine, layout, steps=range(SAVED))  # type: ignore[arg-type]
    if root is not None:
        save(engine, layout, root, iteration=SAVED)  # type: ignore[arg-type]
    steps += train(engine, layout, steps=range(SAVED, 8))  # type: ignore[arg-type]
    return Run(engine.describe(), steps, bits(zero_weights(engine)))


def goes_on(rank: int, stage: int, root: Path) -> Run:
    """The others of them, from the checkpoint."""
    engine, layout = make_zero_engine(stage, file=ON_HOST)
    load(engine, layout, root)  # type: ignore[arg-type]
    steps = train(engine, layout, steps=range(SAVED, 8))  # type: ignore[arg-type]
    return Run(engine.describe(), steps, bits(zero_weights(engine)))


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_both_train_alike_and_a_resumed_run_is_the_same(
    stage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zero_adam, "_compiled_everywhere", lambda _: "no compiler, rank 0")
    torchs = run_ranks(trains, 2, stage, None)[0]
    assert torchs.said.startswith("optimizer: torch's AdamW (DeepSpeed's for the host: no compiler, rank 0) in Deep")
    assert torchs.said.endswith(f", ZeRO {stage}, optimizer in the host's memory")
    pretend(monkeypatch)
    theirs, *_ = run_ranks(trains, 2, stage, tmp_path)
    assert theirs.said.startswith("optimizer: DeepSpeed's AdamW for the host in DeepSpeed ")
    assert max(abs(a - b) for (a, _), (b, _) in zip(theirs.steps, torchs.steps, strict=True)) < LOSS
    assert max(abs(a - b) for (_, a), (_, b) in zip(theirs.steps, torchs.steps, strict=True)) < NORM
    later, *_ = run_ranks(goes_on, 2, stage, tmp_path)
    assert (later.steps, later.weights) == (theirs.steps[SAVED:], theirs.weights), "bit for bit"


def test_a_resumed_run_is_told_apart_where_powers_are_carried_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(zero_adam, "_repeat_after_resume", lambda _: None)
    (whole,) = run_ranks(trains, 1, 2, tmp_path)
    (later,) = run_ranks(goes_on, 1, 2, tmp_path)
    assert later.weights != whole.weights


def asks(_: int, stage: int, file: dict[str, Any]) -> str:
    engine, _layout = make_zero_engine(stage, file=file)
    return engine.describe()


def test_nothing_is_compiled_for_state_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Any) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(zero_adam, "_compiled_everywhere", never)
    ((said),) = run_ranks(asks, 1, 2, {})
    assert said.startswith("optimizer: torch's AdamW in DeepSpeed") and said.endswith("ZeRO 2")
    with pytest.raises(RuntimeError, match="AssertionError: asked"):
        run_ranks(asks, 1, 2, ON_HOST)


class Builder:
    """DeepSpeed's builder of the operation, which cannot build."""

    error_log = "no vectors"

    def __init__(self, error: Exception | None = None, *, fits: bool = True) -> None:
        self.error, self.fits = error, fits

    def is_compatible(self, *, verbose: bool) -> bool:
        return self.fits

    def load(self, *, verbose: bool) -> None:
        if self.error is not None:
            raise self.error


def package(builder: Builder, *, installed: bool = False) -> Any:
    return SimpleNamespace(
        ops=SimpleNamespace(op_builder=SimpleNamespace(CPUAdamBuilder=lambda: builder)),
        git_version_info=SimpleNamespace(installed_ops={"cpu_adam": installed}),
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with all that is needed; its folder of compiled things."""
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "true")
    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda name, verbose: str(tmp_path))
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    return tmp_path


def reason(_: int, theirs: Any) -> str | None:
    return zero_adam._compiled_everywhere(theirs)


FAILURES = (
    RuntimeError("Error building extension\n 'cpu_adam'"),
    ImportError("Error building extension 'cpu_adam'"),
    OSError("Error building extension 'cpu_adam'"),
    subprocess.SubprocessError("Error building extension 'cpu_adam'"),
)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_fails_to_compile_is_said(error: Exception, machine: Path) -> None:
    said = "it cannot be compiled: Error building extension 'cpu_adam', rank 0"
    assert run_ranks(reason, 1, package(Builder(error))) == [said]


def test_what_is_missing_is_said_before_anything_is_compiled(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder(AssertionError("compiled"))  # type: ignore[arg-type]
    why = zero_adam._why_not
    unfit = Builder(fits=False)
    assert why(package(unfit), unfit) == "it says that it does not fit this machine: no vectors"
    (machine / "lock").touch()
    assert why(package(builder), builder) == (
        f"another process compiles it, or was killed while it did: delete {machine / 'lock'}"
    )
    monkeypatch.delattr(cpp_extension, "FileBaton")  # torch 2.14 has a lock that ends with its holder
    assert why(package(builder), builder) is None
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "no-such-compiler")
    assert why(package(builder), builder) == "no compiler, no-such-compiler is not there"
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert why(package(builder), builder) == "ninja is not there to compile it"
    assert why(package(builder, installed=True), builder) is None


def test_the_wait_for_a_compiler_is_announced_once_a_machine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "say", said.append)
    builder = Builder()
    assert zero_adam._why_not(package(builder), builder) is None
    (machine / "cpu_adam.so").touch()
    assert zero_adam._why_not(package(builder), builder) is None
    assert said == ["DeepSpeed's Adam for the host's memory is compiled now, once for this machine: a minute or two"]


def one_cannot(rank: int) -> str | None:
    return zero_adam._compiled_everywhere(package(Builder(ImportError("gone") if dist.get_rank() == 1 else None)))


def test_where_one_rank_cannot_no_rank_does(machine: Path) -> None:
    assert run_ranks(one_cannot, 2) == ["it cannot be compiled: gone, rank 1"] * 2


def test_where_all_can_all_do(machine: Path) -> None:
    assert run_ranks(reason, 2, package(Builder())) == [None, None]
