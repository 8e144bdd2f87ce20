"""Faults of the libraries under us: each in one place, with the versions that have it and when our repair may go.

`FAULTS` is the whole list. A repair replaces one function of the library by one that calls it (`__wrapped__` is the
library's own), and only where the installed version has the fault and nothing installed avoids it. What cannot be
repaired from outside stands in the list too, with the way around it. Call `apply_all` before training; entry points do.
"""

import functools
import importlib.util
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer import optimizer as plain_optimizer
from megatron.core.tensor_parallel import random as recomputation
from packaging.specifiers import SpecifierSet


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a library."""

    name: str
    """Short and unique."""
    library: str
    """Distribution that has it."""
    versions: str
    """Versions of it that have the fault, as a requirement specifier."""
    what: str
    """What goes wrong."""
    until: str
    """When the repair may go; for a fault without one, the way around it."""
    only_if: Callable[[], bool] = lambda: True
    """Whether what is installed beside it leaves the fault in force."""
    repair: Callable[[], None] | None = None
    """Replaces the faulty function; None where nothing can be done from outside."""

    def present(self) -> bool:
        """Whether this installation has the fault."""
        return SpecifierSet(self.versions).contains(version(self.library), prereleases=True) and self.only_if()


_applied: set[str] = set()


def apply_all() -> list[str]:
    """Repair what is present and not yet repaired. Returns the names of what this call repaired."""
    repaired = []
    for fault in FAULTS:
        if fault.repair is not None and fault.name not in _applied and fault.present():
            fault.repair()
            _applied.add(fault.name)
            repaired.append(fault.name)
    return repaired


def explain() -> list[str]:
    """One line a fault of the whole list, present here or not, for the docs."""
    return [f"{f.name} ({f.library} {f.versions}): {f.what}; {f.until}" for f in FAULTS]


def _torch_adam() -> bool:
    return not distrib_optimizer.HAVE_APEX_OR_TE


def _fresh_distributed_state() -> None:
    true = distrib_optimizer.DistributedOptimizer.state_dict

    @functools.wraps(true)
    def state_dict(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for main in group["params"]:  # what AdamW's first step would make
                    moments = {
                        "exp_avg": torch.zeros_like(main.data),
                        "exp_avg_sq": torch.zeros_like(main.data),
                    }
                    self.optimizer.state[main] = {"step": torch.tensor(0.0), **moments}
        return true(self)

    distrib_optimizer.DistributedOptimizer.state_dict = state_dict


def _loaded_distributed_state() -> None:
    true = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(true)
    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        true(self, model_param, {**tensors, "step": state["step"]})

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _results_queue() -> None:
    # the queue that a manager process would serve; saving puts and gets in the same process, in the background too,
    # where what a writer tells its rank comes through a pipe (checkpoint/background.py)
    filesystem_async._results_queue = queue.Queue()


def _group_identifiers() -> None:
    known = plain_optimizer.param_group_identifier_keys
    wider = (*known, *(key for key in ("max_lr", "min_lr") if key not in known))
    plain_optimizer.param_group_identifier_keys = wider
    distrib_optimizer.param_group_identifier_keys = wider


def _momentum_to_load() -> None:
    true = plain_optimizer.MegatronOptimizer.__init__

    def momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
        for group in optimizer.param_groups:
            for main in group["params"]:
                if group["momentum"] and not optimizer.state[main]:
                    optimizer.state[main]["momentum_buffer"] = torch.zeros_like(main.data)

    @functools.wraps(true)
    def init(self: Any, optimizer: Any, config: Any, init_state_fn: Any = None) -> None:
        lacks = init_state_fn is None and isinstance(optimizer, torch.optim.SGD)
        true(self, optimizer, config, momentum if lacks else init_state_fn)

    plain_optimizer.MegatronOptimizer.__init__ = init


def _no_transformer_engine() -> bool:
    return not recomputation.HAVE_TE


def _recomputed_norms() -> None:
    true = recomputation.CheckpointWithoutOutput.__init__

    @functools.wraps(true)
    def init(self: Any, fp8: Any = False) -> None:
        true(self, fp8 or None)

    recomputation.CheckpointWithoutOutput.__init__ = init


def _no_makefile() -> bool:
    return importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None


def _compiled_helpers() -> None:
    true = dataset_utils.compile_helpers

    @functools.wraps(true)
    def compile_helpers() -> None:
        """The wheel's helpers are compiled already."""

    dataset_utils.compile_helpers = compile_helpers


def _waited_for() -> None:
    true = param_and_grad_buffer._coalescing_manager

    @functools.wraps(true)
    @contextmanager
    def coalescing(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        runs_ahead = async_ops and torch.distributed.get_backend(group) != "gloo"
        with true(group, device=device, async_ops=runs_ahead) as works:
            yield works  # without works in it, waiting for it is nothing

    param_and_grad_buffer._coalescing_manager = coalescing


FAULTS: tuple[Fault, ...] = (
    Fault(
        name="fresh distributed state",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="DistributedOptimizer.state_dict asserts (len(steps) == 1) before the first step with torch's "
        "AdamW, so that neither an untrained model can be saved nor any checkpoint be loaded into a new "
        "process",
        until="may go when a fresh DistributedOptimizer over torch's AdamW gives its state_dict",
        only_if=_torch_adam,
        repair=_fresh_distributed_state,
    ),
    Fault(
        name="loaded distributed state",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="loading a DistributedOptimizer over torch's AdamW raises KeyError 'step', writes in place on "
        "leaves that require a gradient, and leaves one step tensor shared by all parameters: it would count "
        "n times an update and break the bias correction silently",
        until="may go when a resumed DistributedOptimizer over torch's AdamW equals an uninterrupted one",
        only_if=_torch_adam,
        repair=_loaded_distributed_state,
    ),
    Fault(
        name="checkpoint writer's manager process",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="even a synchronous save spawns a manager process a rank (2 s and more) that imports the main "
        "script anew, runs it where it has no __main__ guard, and outlives os._exit",
        until="may go when a synchronous save starts no process; --async-save does without one too, megatron.core's "
        "own callers of a writer (AsyncCallsQueue) do not",
        repair=_results_queue,
    ),
    Fault(
        name="parameter groups told apart without their rates",
        library="megatron-core",
        versions=">=0.16.1,<0.17",
        what="loading pairs parameter groups by weight decay alone: with --decoupled-lr the embedding's "
        "group takes the learning rate of the body, or the other way round",
        until="may go with 0.16: 0.19 pairs by max_lr and min_lr too",
        repair=_group_identifiers,
    ),
    Fault(
        name="SGD cannot be loaded",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="--optimizer sgd gets no function that makes its state, and loading a checkpoint calls it: "
        "TypeError: 'NoneType' object is not callable",
        until="may go when a resumed run with SGD equals an uninterrupted one",
        repair=_momentum_to_load,
    ),
    Fault(
        name="compile_helpers exits",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="datasets.utils.compile_helpers calls make in a wheel that ships the compiled helper and no "
        "Makefile, and exits the process",
        until="may go when compile_helpers returns from a wheel",
        only_if=_no_makefile,
        repair=_compiled_helpers,
    ),
    Fault(
        name="recomputed norms ask for Transformer Engine",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="CheckpointWithoutOutput takes fp8=False for fp8: --recompute-modules layernorm raises "
        "NameError 'FP8GlobalStateManager' where Transformer Engine is not installed",
        until="may go when norms are recomputed without Transformer Engine",
        only_if=_no_transformer_engine,
        repair=_recomputed_norms,
    ),
    Fault(
        name="coalesced collectives of gloo crash",
        library="torch",
        versions=">=2.6",
        what="asynchronous coalesced collectives of the gloo backend (--overlap-param-gather and "
        "--overlap-grad-reduce on a CPU) corrupt the heap about once in 5,000 steps: SIGSEGV, or 'free(): "
        "invalid pointer'",
        until="they are waited for where they are started; may go when two ranks gather 50,000 times without a crash",
        repair=_waited_for,
    ),
    Fault(
        name="fused cross entropy rounds its gradient",
        library="megatron-core",
        versions=">=0.16.1,<0.20",
        what="cross_entropy_loss_fusion with the native implementation rounds the gradient of the logits to "
        "bf16 whatever their type: 4e-3 off in fp32",
        until="leave --cross-entropy-loss-fusion out unless the model is bf16",
    ),
)
"""Every fault that we know of and meet."""
