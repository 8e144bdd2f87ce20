"""Training the new rows alone: they move, nothing else does, and clipping sees nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_sat.distributed import Layout
from megatron_sat.engines.megatron import MegatronEngine
from megatron_sat.training.only import NewRows, count_trained, freeze_all_but_vocabulary, train_only
from tests.helpers.plain_engine import make_engine, train, weights
from tests.helpers.plain_gpt import make_chunks
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM

VOCAB, FIRST, LAST = 96, 40, 72  # with 2 ranks the new rows begin on the first and end on the second
STEPS = range(4)
LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def confined(tied: bool, **settings: Any) -> tuple[MegatronEngine, Layout, NewRows]:
    kept: list[nn.Parameter] = []

    def build(config: Any) -> list[nn.Module]:
        chunks = make_chunks(config, tied=tied, vocab=VOCAB)
        kept.extend(freeze_all_but_vocabulary(chunks))
        return chunks

    engine, layout = make_engine(build=build, **settings)
    rows = NewRows(parameters=kept, first=FIRST, last=LAST, tp_rank=layout.tp_rank)
    train_only(rows, chunks=engine.chunks, hold=engine.hold)
    return engine, layout, rows


def run(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms, and by name whether rows moved: [v/p] of the vocabulary's, one flag for the others."""
    engine, layout, rows = confined(**settings)
    before = weights(engine)
    steps = train(engine, layout, steps=STEPS)
    engine.gather_weights()
    moved = {}
    for name, after in weights(engine).items():
        differs = (before[name] != after).flatten(1).any(1) if after.dim() > 1 else before[name] != after
        is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        moved[name] = differs.tolist() if is_vocabulary else bool(differs.any())
    return {"steps": steps, "moved": moved, "tp_rank": layout.tp_rank, "trained": count_trained(rows)}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp 2": (2, {"tp": 2}),
    "tp 2, sequence parallel": (2, {"tp": 2, "model": {"sequence_parallel": True}}),
    "dp 2": (2, {}),
    "dp 2, distributed optimizer": (2, {"ddp": {"use_distributed_optimizer": True}}),
    "dp 2, distributed optimizer, all overlapped": (2, {"ddp": LATE}),
    "pp 2": (2, {"pp": 2}),
    "pp 4, nothing to train in the middle": (4, {"pp": 4, "ddp": LATE}),
    "pp 2, interleaved": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}),
    "tp 2, dp 2, distributed optimizer": (4, {"tp": 2, "ddp": LATE}),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {tied: run_ranks(run, 1, {"tied": tied})[0] for tied in (False, True)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_rows_move_and_nothing_else_in_any_layout(
    layout: str, tied: bool, alone: dict[bool, dict[str, Any]]
) -> None:
    ranks, settings = LAYOUTS[layout]
    for answer in run_ranks(run, ranks, {"tied": tied, **settings}):
        for name, moved in answer["moved"].items():
            if isinstance(moved, bool):
                assert not moved, name
                continue
            ids = range(answer["tp_rank"] * len(moved), (answer["tp_rank"] + 1) * len(moved))
            assert all(FIRST <= i < LAST for i, has in zip(ids, moved, strict=True) if has), name
            assert any(moved)
        for (loss, norm), (one_loss, one_norm) in zip(answer["steps"], alone[tied]["steps"], strict=True):
            assert loss == pytest.approx(one_loss, rel=RUN_LOSS["rtol"])
            assert norm == pytest.approx(one_norm, rel=RUN_NORM["rtol"])


def test_new_rows_alone_move_in_bf16_too() -> None:
    answer = run_ranks(run, 2, {"tied": False, "tp": 2, "model": BF16})
    for rank, said in enumerate(answer):
        for moved in (m for m in said["moved"].values() if isinstance(m, list)):
            assert {rank * len(moved) + i for i, has in enumerate(moved) if has} <= set(range(FIRST, LAST))


def test_the_trained_entries_are_counted(alone: dict[bool, dict[str, Any]]) -> None:
    assert alone[False]["trained"] == 2 * alone[True]["trained"] == 2 * (LAST - FIRST) * 32


def norms(rank: int, make: Callable[..., Any]) -> tuple[float, float]:
    """The reported norm, and that of the new rows' gradients."""
    engine, layout = make()
    ((_, norm),) = train(engine, layout, steps=range(1))
    squares = 0.0
    for name, parameter in engine.chunks[0].named_parameters():
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            squares += float(parameter.main_grad[FIRST:LAST].double().square().sum())
    return norm, squares**0.5


def unconfined() -> tuple[MegatronEngine, Layout]:
    return make_engine(vocab=VOCAB, optim={"clip_grad": 0.0})


def confined_to_rows() -> tuple[MegatronEngine, Layout]:
    engine, layout, _ = confined(False, optim={"clip_grad": 0.0})
    return engine, layout


def test_the_norm_is_that_of_the_new_rows() -> None:
    """The twin: the same gradient in an engine that trains everything, and its new rows picked out."""
    ((whole, picked),) = run_ranks(norms, 1, unconfined)
    ((reported, _),) = run_ranks(norms, 1, confined_to_rows)
    assert reported == pytest.approx(picked, rel=RUN_NORM["rtol"])
    assert whole > 1.1 * reported


def test_a_range_without_rows_is_refused() -> None:
    with pytest.raises(
        ValueError, match="new rows must be a range of ids, got 5 to 5; give the vocabulary's size before"
    ):
        NewRows(parameters=[], first=5, last=5, tp_rank=0)
