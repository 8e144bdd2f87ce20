"""`--sat-sparse-reduce` through the whole program: two replicas train bit for bit as without it, and send less."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.wire import counted
from megatron_sat.sparsity.controller import Controller, Entry
from tests.helpers.program import SPARSE, Text, open_session, read_records, trained
from tests.helpers.ranks import run_ranks

LESS = "--sat-sparse-reduce"
SHARDED = "--use-distributed-optimizer"
OVERLAPPED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30000"
OURS = "--sat-gqa head --sat-statistics lagged --sat-selection-interval 2 --sat-omitted-neurons frozen"
CASES = {
    "all-reduce": (2, ""),
    "sharded, overlapped, bf16": (2, f"{OVERLAPPED} --bf16"),
    "sharded, TP 2 x DP 2, biases": (
        4,
        f"--tensor-model-parallel-size 2 --sequence-parallel {SHARDED} --add-qkv-bias",
    ),
    "all-reduce, overlapped, what the paper has not": (
        2,
        f"--overlap-grad-reduce --ddp-bucket-size 30000 {OURS}",
    ),
    "sharded, CP 2, gathered weights": (2, f"--context-parallel-size 2 {SHARDED} --sat-weights gather"),
    "all-reduce, recorded layers": (2, "--layer-graphs"),
}
FAST = ("sharded, overlapped, bf16", "all-reduce, overlapped, what the paper has not")
TIMES = ("time", "seconds", "tokens_per_second", "tflops", "memory")
"""Parts of names under which a log has what differs from run to run."""


def figures(jsonl: Path) -> list[dict[str, Any]]:
    """The log's steps without what a clock measured."""
    records = read_records(jsonl)
    return [{k: v for k, v in record.items() if not any(part in k for part in TIMES)} for record in records]


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES])
def test_two_replicas_train_bit_for_bit_as_with_the_full_reduction(case: str, text: Text, tmp_path: Path) -> None:
    """Over three rungs, the last of them dense, with evaluations in between."""
    ranks, flags = CASES[case]
    command = text.command(f"{SPARSE} {flags} --eval-interval 2")
    full = trained(command, tmp_path / "full.jsonl", ranks=ranks)
    sparse = trained([*command, LESS], tmp_path / "sparse.jsonl", ranks=ranks)
    assert sparse == full
    assert len(sparse.validation) == 4
    assert figures(tmp_path / "sparse.jsonl") == figures(tmp_path / "full.jsonl")
    assert "omission_rate" in figures(tmp_path / "full.jsonl")[0]


def test_a_run_resumed_inside_a_rung_is_the_uninterrupted_one(text: Text, tmp_path: Path) -> None:
    command = text.command(f"{SPARSE} {LESS} {OVERLAPPED}")
    whole = trained(command, tmp_path / "whole.jsonl", ranks=2)
    saved = [*command, "--save", str(tmp_path / "saved"), "--save-interval", "2"]
    first = trained([*saved, "--exit-interval", "2"], tmp_path / "first.jsonl", ranks=2)
    rest = trained([*saved, "--load", str(tmp_path / "saved")], tmp_path / "rest.jsonl", ranks=2)
    assert first.losses + rest.losses == whole.losses
    assert (len(first.losses), rest.weights) == (2, whole.weights)


# -- what is sent


def sent(_: int, argv: list[str]) -> tuple[list[int], int, int]:
    """Bytes of each step; elements of the matrices that are cut, and of everything else."""
    session = open_session(argv)
    engine: Any = session.run.engine
    matrices = [p for c in engine.chunks for n, p in c.named_parameters() if "linear_" in n and p.dim() == 2]
    everything = sum(p.numel() for c in engine.chunks for p in c.parameters())
    layers = sum(p.numel() for p in matrices)
    found: list[int] = []
    true = engine.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        with counted(engine._wrapped) as wire:
            result = true(*args, **kwargs)
        found.append(wire.bytes)
        return result

    engine.train_step = step
    session.train()
    return found, layers, everything - layers


@pytest.mark.parametrize("flags", ["", OVERLAPPED], ids=["all-reduce", "sharded"])
def test_of_the_layers_weights_half_is_sent_at_half_the_rate_and_all_on_a_dense_rung(flags: str, text: Text) -> None:
    for found, layers, others in run_ranks(sent, 2, text.command(f"{SPARSE} {LESS} {flags}")):
        shares = [(step / 4 - others) / layers for step in found]
        assert all(0.45 < share <= 0.55 for share in shares[:3])
        assert 0.55 < shares[3] < 0.8  # a quarter left out of each selection group, of few heads half
        assert all(1.0 <= share < 1.01 for share in shares[4:])  # padding of shards


# -- what is left out is zero, and all that is not zero is named


def zeros(_: int, argv: list[str]) -> list[tuple[int, int]]:
    """By reduction of a matrix or bias that is cut: gradients other than zero, outside of what is filled and inside."""
    session = open_session(argv)
    engine, controller = session.run.engine, session.run.controller
    assert session.run.config.sparse_reduce
    found = []
    for group in (g for c in engine._wrapped for g in c.bucket_groups):  # type: ignore[attr-defined]

        def look(*args: Any, group: Any = group, start: Any = group.start_grad_sync, **kwargs: Any) -> None:
            for parameter, dim, index in controller.filled_entries():
                if parameter in group.params:
                    gradient = parameter.main_grad != 0  # type: ignore[attr-defined]
                    inside = gradient.index_select(dim, index)
                    found.append((int(gradient.sum() - inside.sum()), int(inside.sum())))
                    assert bool((index.diff() > 0).all())
            start(*args, **kwargs)

        group.start_grad_sync = look
    session.train()
    return found


@pytest.mark.parametrize("flags", ["", "--sat-gqa head --add-qkv-bias"])
def test_outside_of_what_is_filled_gradients_are_exactly_zero(flags: str, text: Text) -> None:
    argv = text.command(f"{SPARSE} {LESS} {flags} --train-iters 4")
    for found in run_ranks(zeros, 2, argv):
        assert len(found) == 3 * 4 * (5 if "bias" in flags else 4)  # sparse steps, layers, matrices and biases
        assert {outside for outside, _ in found} == {0}
        assert all(inside for _, inside in found)


@pytest.fixture
def without_shared_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: Controller) -> Iterator[Entry]:
        for module, selector in self._modules:
            if selector.choice is not None:
                yield from module.entries(selector.choice.index)

    monkeypatch.setattr(Controller, "filled_entries", alone)


def test_rows_that_units_share_would_be_missed_if_they_were_not_named(
    text: Text, tmp_path: Path, without_shared_rows: None
) -> None:
    """Keys and values under heads that leave singly: filled, though they belong to no unit alone."""
    command = text.command(f"{SPARSE} --sat-gqa head --train-iters 4")
    full = trained(command, tmp_path / "full.jsonl", ranks=2)
    sparse = trained([*command, LESS], tmp_path / "sparse.jsonl", ranks=2)
    assert sparse.losses[0] == full.losses[0]
    assert sparse.weights != full.weights
