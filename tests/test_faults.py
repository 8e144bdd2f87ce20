"""Each fault is shown as the library has it, then gone with its repair."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils as dataset_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.optimizer import DistributedOptimizer, distrib_optimizer
from megatron.core.optimizer import optimizer as plain_optimizer
from megatron.core.tensor_parallel import CheckpointWithoutOutput, vocab_parallel_cross_entropy

from megatron_sat import faults
from megatron_sat.distributed import initialize_model_parallel
from megatron_sat.faults import FAULTS, Fault
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.ranks import run_ranks

DISTRIBUTED: dict[str, Any] = {"ddp": {"use_distributed_optimizer": True}}


def named(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def undo() -> None:
    """Give this (forked) process the library as it is, whatever its parent repaired."""
    for owner, function in (
        (DistributedOptimizer, "state_dict"),
        (DistributedOptimizer, "_set_main_param_and_optimizer_states"),
        (plain_optimizer.MegatronOptimizer, "__init__"),
        (dataset_utils, "compile_helpers"),
        (CheckpointWithoutOutput, "__init__"),
    ):
        setattr(owner, function, inspect.unwrap(getattr(owner, function)))
    param_and_grad_buffer._coalescing_manager = dist._coalescing_manager  # itself a wrapper: torch's contextmanager
    filesystem_async._results_queue = None
    if named("parameter groups told apart without their rates").present():
        for module in (plain_optimizer, distrib_optimizer):
            module.param_group_identifier_keys = module.param_group_identifier_keys[:4]
    faults._applied.clear()


def repair(*names: str) -> None:
    undo()
    for name in names:
        step = named(name).repair
        assert step is not None
        step()


def fresh_state(rank: int, *names: str) -> float:
    repair(*names)
    engine, layout = make_engine(**DISTRIBUTED)
    if names:
        engine._optimizer.state_dict()
    else:
        with pytest.raises(AssertionError):
            engine._optimizer.state_dict()
    return train(engine, layout, steps=range(2))[-1][0]


def test_a_fresh_distributed_optimizer_has_a_state_only_with_the_repair() -> None:
    repaired = run_ranks(fresh_state, 1, "fresh distributed state")
    assert repaired == run_ranks(fresh_state, 1), "and the repair does not change how it trains"


def reloaded(rank: int, folder: str, *names: str) -> tuple[int, list[tuple[float, float]]]:
    """Save, load into a new engine, train on. Returns how many step tensors there are, and the steps."""
    repair("fresh distributed state", "checkpoint writer's manager process", *names)
    engine, layout = make_engine(**DISTRIBUTED)
    steps = train(engine, layout, steps=range(2))
    how = {"with_optimizer": True, "content_metadata": engine.content_metadata}
    dist_checkpointing.save(engine.sharded_state_dict(is_loading=False, **how), folder)
    other, layout = make_engine(**DISTRIBUTED)
    state = dist_checkpointing.load(other.sharded_state_dict(is_loading=True, **how), folder)
    other.load_state_dict(state, with_optimizer=True)
    inner = other._optimizer.chained_optimizers[0].optimizer
    tensors = len({id(entry["step"]) for entry in inner.state.values()})
    return tensors - len(inner.state), steps + train(other, layout, steps=range(2, 4))


def uninterrupted(rank: int) -> list[tuple[float, float]]:
    engine, layout = make_engine(**DISTRIBUTED)
    return train(engine, layout, steps=range(4))


def test_a_distributed_optimizer_can_be_loaded_only_with_the_repair(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'step'"):
        run_ranks(reloaded, 2, str(tmp_path))
    missing, steps = run_ranks(reloaded, 2, str(tmp_path), "loaded distributed state")[0]
    assert missing == 0, "every parameter counts its own steps"
    assert steps == run_ranks(uninterrupted, 2)[0]


def shared_steps(rank: int) -> list[int]:
    """How many step tensors a torch AdamW has after Megatron's load_state_dict, without and with the
    repair."""
    counts = []
    for names in ((), ("loaded distributed state",)):
        repair("fresh distributed state", *names)
        engine, _ = make_engine(**DISTRIBUTED)
        wrapper = engine._optimizer.chained_optimizers[0]
        wrapper.load_state_dict(wrapper.state_dict())
        for parameter in list(wrapper.model_param_group_index_map):
            if names:
                tensors = wrapper._get_main_param_and_optimizer_states(parameter)
                wrapper._set_main_param_and_optimizer_states(parameter, tensors)
        counts.append(len({id(entry["step"]) for entry in wrapper.optimizer.state.values()}))
    return counts


def test_a_loaded_adam_shares_one_step_tensor_without_the_repair() -> None:
    shared, own = run_ranks(shared_steps, 1)[0]
    assert shared == 1 < own


def saving_starts(rank: int, folder: str, *names: str) -> bool:
    """Whether saving asks for a process of its own."""
    repair("fresh distributed state", *names)
    asked = []
    true = filesystem_async.mp.get_context

    def get_context(method: str) -> Any:
        asked.append(method)
        return true("fork" if method == "spawn" else method)  # fork: the fault without its seconds

    filesystem_async.mp.get_context = get_context
    engine, _ = make_engine()
    state = engine.sharded_state_dict(is_loading=False, with_optimizer=False, content_metadata=engine.content_metadata)
    dist_checkpointing.save(state, folder)
    return "spawn" in asked


def test_saving_spawns_a_manager_process_only_without_the_repair(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert run_ranks(saving_starts, 1, str(tmp_path / "a")) == [True]
    assert run_ranks(saving_starts, 1, str(tmp_path / "b"), "checkpoint writer's manager process") == [False]


def paired(rank: int, *names: str) -> list[float]:
    """The max_lr of the body's and the embedding's group after a load of rates 1 and 2."""
    repair(*names)
    shared = {
        "wd_mult": 1.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "min_lr": 0.0,
    }
    groups = [{**shared, "max_lr": rate, "params": []} for rate in (1.0, 2.0)]
    load = plain_optimizer.MegatronOptimizer._filter_and_reorder_param_groups
    return [group["max_lr"] for group in load(groups, [dict(group) for group in groups])]


def test_groups_of_different_rates_are_told_apart_with_the_repair_and_by_newer_versions() -> None:
    fault = named("parameter groups told apart without their rates")
    assert run_ranks(paired, 1) == [[2.0, 2.0] if fault.present() else [1.0, 2.0]]
    assert run_ranks(paired, 1, fault.name) == [[1.0, 2.0]]


def sgd_again(rank: int, *names: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Two steps with SGD after a load of what two steps gave, and the same without the load."""
    repair("checkpoint writer's manager process", *names)
    settings: dict[str, Any] = {"optim": {"optimizer": "sgd"}}
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(2))
    how = {"with_optimizer": True, "content_metadata": engine.content_metadata}
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(engine.sharded_state_dict(is_loading=False, **how), folder)
        other, layout = make_engine(**settings)
        state = dist_checkpointing.load(other.sharded_state_dict(is_loading=True, **how), folder)
    other.load_state_dict(state, with_optimizer=True)
    return train(other, layout, steps=range(2, 4)), train(engine, layout, steps=range(2, 4))


def test_sgd_can_be_loaded_only_with_the_repair() -> None:
    with pytest.raises(RuntimeError, match="TypeError: 'NoneType' object is not callable"):
        run_ranks(sgd_again, 1)
    loaded, uninterrupted = run_ranks(sgd_again, 1, "SGD cannot be loaded")[0]
    assert loaded == uninterrupted


def compiles(rank: int, *names: str) -> str:
    repair(*names)
    try:
        dataset_utils.compile_helpers()
    except SystemExit:
        return "exit"
    return "returned"


def test_compile_helpers_exits_only_without_the_repair() -> None:
    assert run_ranks(compiles, 1) == ["exit"]
    assert run_ranks(compiles, 1, "compile_helpers exits") == ["returned"]


def recomputed_norms(rank: int, *names: str) -> tuple[list[float], list[float]]:
    """Losses of three steps that keep what norms gave, and of three that recompute it."""
    repair(*names)
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    kept, recomputed = (train(*make_engine(model=model), steps=range(3)) for model in ({}, recompute))
    return [loss for loss, _ in kept], [loss for loss, _ in recomputed]


def test_norms_are_recomputed_without_transformer_engine_only_with_the_repair() -> None:
    with pytest.raises(RuntimeError, match="NameError: name 'FP8GlobalStateManager' is not defined"):
        run_ranks(recomputed_norms, 1)
    kept, recomputed = run_ranks(recomputed_norms, 1, "recomputed norms ask for Transformer Engine")[0]
    assert recomputed == pytest.approx(kept, rel=1e-6)  # gradients of a residual add up in another order


def works_under_way(rank: int, *names: str) -> tuple[int, list[float]]:
    """How many collectives are still to be waited for where they were started, and what they give."""
    repair(*names)
    group = dist.group.WORLD
    gathered, mine = torch.zeros(2), torch.tensor([float(rank)])
    with param_and_grad_buffer._coalescing_manager(group, async_ops=True) as works:
        dist.all_gather_into_tensor(gathered, mine, group=group, async_op=True)
    under_way = len(works.works)
    works.wait()
    return under_way, gathered.tolist()


def test_coalesced_collectives_of_gloo_run_ahead_only_without_the_repair() -> None:
    assert run_ranks(works_under_way, 2) == [(1, [0.0, 1.0])] * 2
    assert run_ranks(works_under_way, 2, "coalesced collectives of gloo crash") == [(0, [0.0, 1.0])] * 2


def fused_gradient(rank: int) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient between the fused and the plain cross entropy, in
    fp32."""
    layout = initialize_model_parallel(tp=1, pp=1, cp=1, virtual_pp=None, seed=1)
    logits = torch.randn(4, 2, 32, requires_grad=True)
    target = torch.randint(0, 32, (4, 2))
    plain = vocab_parallel_cross_entropy(logits.clone(), target)
    fused = fused_vocab_parallel_cross_entropy(logits.clone(), target, layout.tp_group)
    (want,) = torch.autograd.grad(plain.sum(), logits)
    (got,) = torch.autograd.grad(fused.sum(), logits)
    return (plain - fused).abs().max().item(), ((got - want) / want).abs().max().item()


def test_the_fused_cross_entropy_still_rounds_its_gradient_to_bf16() -> None:
    loss, gradient = run_ranks(fused_gradient, 1)[0]
    assert loss < 1e-6
    assert 1e-3 < gradient < 4e-3
    assert named("fused cross entropy rounds its gradient").present()


def applied(rank: int) -> tuple[list[str], list[str]]:
    undo()
    return faults.apply_all(), faults.apply_all()


def test_repairs_are_made_once_and_only_where_the_fault_is() -> None:
    first, second = run_ranks(applied, 1)[0]
    assert first == [fault.name for fault in FAULTS if fault.present() and fault.repair]
    assert second == []


def elsewhere(rank: int) -> list[str]:
    undo()
    distrib_optimizer.HAVE_APEX_OR_TE = True  # as with Transformer Engine's Adam
    return faults.apply_all()


def test_an_optional_package_that_avoids_a_fault_leaves_the_library_alone() -> None:
    (repaired,) = run_ranks(elsewhere, 1)
    assert not {"fresh distributed state", "loaded distributed state"} & set(repaired)
    assert "compile_helpers exits" in repaired


def test_other_versions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for theirs in ("0.15.0", "0.20.1"):
        monkeypatch.setattr(faults, "version", lambda library, theirs=theirs: theirs)
        assert not any(fault.present() for fault in FAULTS)


def test_the_list_explains_every_fault_in_a_line() -> None:
    lines = faults.explain()
    assert len(lines) == len(FAULTS) == len({fault.name for fault in FAULTS})
    assert all(fault.what in line and fault.until in line for fault, line in zip(FAULTS, lines, strict=True))


def test_the_docs_tell_every_fault_and_no_other() -> None:
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [f.name for f in FAULTS]
    assert all(f"{f.library} {f.versions}" in text for f in FAULTS)
    assert all(f.what[1:] in text for f in FAULTS)
    assert all(f.until in text for f in FAULTS)
