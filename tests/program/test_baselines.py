"""The baselines as runs of the program: resumed bit for bit, in other layouts, and said beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.program import Text, Trained, open_session, read_records, start, trained
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM

OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
SPDF = "--baseline spdf --spdf-until 5 --train-iters 8"
STRUCTURED = (
    "--baseline mst-structured --mst-rate 0.5 --mst-warmup 4 --mst-restoration 4 --mst-stages 2 --mst-interval 2 "
    "--mst-replaced 0.9 --train-iters 12 --sat-selection-groups 2"
)
"""Dense, 0.4375, 0.5 for four steps, and back; a new topology every second step."""
MST = (
    "--baseline mst --mst-rate 0.8 --mst-warmup 4 --mst-restoration 4 --mst-stages 2 --mst-interval 2 --train-iters 12 "
    "--mst-attention-stride 8"
)
"""Of single weights: none, 0.7, 0.8 for four steps, and back; every second step changes the masks."""
STOPS = (4, 6)
"""With masks still to come, and after them; between two topologies."""


class Saved:
    """A run that left a checkpoint after every second step."""

    def __init__(self, text: Text, folder: Path, flags: str, *, ranks: int = 1) -> None:
        self.text, self.folder, self.jsonl = text, folder, folder / "metrics.jsonl"
        self.whole = self._trained(f"{flags} --save-interval 2", ranks=ranks)

    def resume(self, step: int, flags: str, *, ranks: int = 1) -> Trained:
        return self._trained(f"{flags} --load {self.folder} --ckpt-step {step}", ranks=ranks)

    def _trained(self, flags: str, *, ranks: int) -> Trained:
        return trained(self.text.command(f"--save {self.folder} {flags}"), self.jsonl, ranks=ranks)


CASES = {
    "spdf": (1, SPDF),
    "spdf, random, distributed optimizer": (2, f"{SPDF} --spdf-mask random {OVERLAPPED}"),
    "mst-structured": (1, STRUCTURED),
    "mst": (1, MST),
    "mst, bf16, distributed optimizer": (2, f"{MST} --bf16 {OVERLAPPED}"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (CASES[c][0] > 1)) for c in CASES])
def test_a_resumed_baseline_equals_the_uninterrupted_one_bit_for_bit(case: str, text: Text, tmp_path: Path) -> None:
    ranks, flags = CASES[case]
    saved = Saved(text, tmp_path, flags, ranks=ranks)
    for stop in STOPS:
        assert saved.resume(stop, flags, ranks=ranks) == saved.whole


@pytest.mark.slow
@pytest.mark.parametrize("flags", [SPDF, STRUCTURED])
def test_a_baseline_goes_on_in_another_layout(flags: str, text: Text, tmp_path: Path) -> None:
    saved = Saved(text, tmp_path, f"{flags} --tensor-model-parallel-size 2 --sequence-parallel", ranks=2)
    resumed = saved.resume(4, flags)
    assert resumed.visits == saved.whole.visits
    assert_close(resumed.losses, saved.whole.losses, **RUN_LOSS)
    assert_close(resumed.norms, saved.whole.norms, **RUN_NORM)


def forgetful(_: int, argv: list[str]) -> None:
    """Resume without the checkpoint's masks: a weight that the run drove to zero is then left out in their place."""
    session = open_session(argv)
    course: Any = session.run.course
    for matrix in course.masks.matrices:
        course.masks.set(matrix, torch.ones(matrix.shape, dtype=torch.bool))
    session.train()


def test_a_resumed_run_that_forgot_its_masks_is_told_apart(text: Text, tmp_path: Path) -> None:
    saved = Saved(text, tmp_path, SPDF)
    argv = text.command(f"{SPDF} --save {tmp_path} --load {tmp_path} --ckpt-step 2 --log-jsonl {saved.jsonl}")
    run_ranks(forgetful, 1, argv)
    assert [line["loss"] for line in read_records(saved.jsonl)][3:] != saved.whole.losses[3:]


def zeros(_: int, argv: list[str]) -> tuple[float, float]:
    """The share of zeros among the matrices' weights, before training and after it."""
    session = open_session(argv)
    shares = []
    for train in (lambda: None, session.train):
        train()
        weights = [m.whole(m.parameter) for m in session.run.course.masks.matrices]  # type: ignore[attr-defined]
        shares.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
    return shares[0], shares[1]


def test_half_of_the_weights_are_zero_until_the_step_and_none_at_the_end(text: Text) -> None:
    assert run_ranks(zeros, 1, text.command(SPDF))[0] == (0.5, 0.0)
    assert run_ranks(zeros, 1, text.command("--baseline spdf --spdf-until 8 --train-iters 8"))[0] == (0.5, 0.5)


def test_masks_are_chosen_by_the_weights_that_were_loaded(text: Text, weights: Path) -> None:
    argv = text.command(f"{SPDF} --load {weights} --finetune")
    found = run_ranks(by_magnitude, 1, argv, str(weights))[0]
    assert found == (True, False), "of the loaded weights, not of the model's first ones"


def by_magnitude(_: int, argv: list[str], weights: str) -> tuple[bool, bool]:
    """Whether what is kept is what was largest in each matrix: as loaded, and as the program draws it."""
    kept: Any = open_session(argv).run.course.masks  # type: ignore[attr-defined]
    verdict = []
    for command in (["--load", weights, "--finetune"], []):
        plain = [word for word in argv if word not in ("spdf", "--baseline", "--spdf-until", "5", "--load", weights)]
        session = open_session([*[word for word in plain if word != "--finetune"], *command])
        dense = dict(session.run.engine.chunks[0].named_parameters())["decoder.layers.0.mlp.linear_fc2.weight"]
        (mask,) = [kept.whole(matrix) for matrix in kept.matrices if matrix.key == "1.down"]
        size = dense.detach().abs()
        verdict.append(bool(size[mask].min() >= size[~mask].max()))
    return verdict[0], verdict[1]


def test_a_run_that_rolls_back_goes_on_with_the_masks_of_its_checkpoint(text: Text, tmp_path: Path) -> None:
    flags = f"{SPDF} --save {tmp_path} --save-interval 2 --on-bad-step rollback --max-norm-leap 1000"
    restored = run_ranks(rolled_back, 1, text.command(flags))[0]
    assert restored


def rolled_back(_: int, argv: list[str]) -> bool:
    session = open_session(argv)
    session.train()
    course: Any = session.run.course
    for matrix in course.masks.matrices:
        course.masks.set(matrix, torch.ones(matrix.shape, dtype=torch.bool))
    session.checkpoints.newest = (session.checkpoints.newest[0], 4)  # type: ignore[index]
    session._rolled_back()
    return all(int(course.masks.whole(m).sum()) * 2 == m.shape[0] * m.shape[1] for m in course.masks.matrices)


def test_the_plan_says_what_a_baseline_does_and_costs(text: Text, tmp_path: Path) -> None:
    ended = start(text.command(f"{SPDF} --save {tmp_path}"))
    assert ended.codes == [0], ended.err
    assert "SPDF: 0.5 of each matrix's weights, by magnitude, are zero until step 5; then all train" in ended.out
    counted = json.loads((tmp_path / "plan.json").read_text())["counted"]
    assert f"counted as published: {counted['share_of_dense']:.3f} of a dense run's operations" in ended.out
    assert 0.5 < counted["share_of_dense"] < 1


def test_structured_mst_computes_less_in_its_sparse_phases_and_is_dense_at_both_ends(
    text: Text, tmp_path: Path
) -> None:
    run = trained(text.command(f"{STRUCTURED} --save {tmp_path}"), tmp_path / "metrics.jsonl")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [(rung["first"], rung["last"], rung["rate_exact"]) for rung in plan["rungs"]] == [
        (1, 2, "0"), (3, 4, "7/16"), (5, 8, "1/2"), (9, 10, "7/16"), (11, 12, "0")
    ]  # fmt: skip
    assert [rung["share_of_dense"] == 1 for rung in plan["rungs"]] == [True, False, False, False, True]
    omitted = [record["omission_rate"]["mlp"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert [rate > 0.4 for rate in omitted] == [False] * 2 + [True] * 8 + [False] * 2
    visits = torch.tensor(run.visits["mlp.1"])
    assert int(visits.sum()) == 4 * 96 + 4 * 48 + 4 * 54
    assert (visits == 12).any() and (visits == 4).any() and len(visits.unique()) > 2, "a part was replaced on the way"


def test_structured_mst_trains_alike_when_its_layers_are_replayed(text: Text, tmp_path: Path) -> None:
    eager = trained(text.command(STRUCTURED), tmp_path / "eager.jsonl")
    replayed = trained(text.command(f"{STRUCTURED} --layer-graphs"), tmp_path / "replayed.jsonl")
    assert replayed == eager


def strides(_: int, argv: list[str]) -> list[tuple[list[int | None], float]]:
    """Of each step the strides that its layers' attention had, and the share of zeros among the weights before it."""
    session, found = open_session(argv), []
    course: Any = session.run.course
    attentions = [m for chunk in session.run.engine.chunks for m in chunk.modules() if hasattr(m, "hybrid_stride")]
    step_of = session.run.engine.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        weights = [m.whole(m.parameter) for m in course.masks.matrices]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        found.append(([attention.hybrid_stride for attention in attentions], zeros))
        return step_of(*args, **kwargs)

    session.run.engine.train_step = watched  # type: ignore[method-assign]
    session.train()
    return found


def test_mst_has_sparse_weights_and_hybrid_attention_in_its_phases(text: Text) -> None:
    (found,) = run_ranks(strides, 1, text.command(MST))
    assert [seen for seen, _ in found] == [[None] * 4] * 4 + [[8] * 4] * 4 + [[None] * 4] * 4
    zeros = [share for _, share in found]
    assert zeros[:2] == [0, 0]
    assert [zeros[3], zeros[5], zeros[9]] == pytest.approx([0.7, 0.8, 0.7], abs=5e-3)
    assert zeros[11] < 0.05


def test_the_plan_says_what_mst_does_and_counts(text: Text, tmp_path: Path) -> None:
    ended = start(text.command(f"{MST} --save {tmp_path}"))
    assert ended.codes == [0], ended.err
    said = "MST: up to 0.8 of the matrices' weights are zero, others every 2 steps, whose last changes them and updates"
    assert f"{said} nothing, attention is to the last 8 tokens and every 8-th; dense at the end" in ended.out
    counted = json.loads((tmp_path / "plan.json").read_text())["counted"]
    assert [(s["first"], s["last"], s["density"]) for s in counted["stretches"]] == [
        (1, 2, 1.0), (3, 4, 0.3), (5, 8, 0.2), (9, 10, 0.3), (11, 12, 1.0)
    ]  # fmt: skip
