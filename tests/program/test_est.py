"""EST as runs of the program: resumed bit for bit, in every layout alike, and said beforehand."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from megatron_sat.baselines.est import layers_left_out
from megatron_sat.baselines.settings import EstConfig
from tests.helpers.program import Text, Trained, open_session, start, trained
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM

EST = "--baseline est --est-layers-until 3 --est-until 5 --train-iters 7 --sat-selection-groups 2"
"""Over 7 steps of 4 layers: two of them and half of the rest in 1-3, all layers in 4 and 5, everything in 6 and 7."""
LAYOUTS = {
    "tensor parallel, sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2",
    "replicas, overlapped": "--use-distributed-optimizer --overlap-grad-reduce",
    "replicas, sparse reduction": "--sat-sparse-reduce",
}


@pytest.fixture(scope="module")
def whole(text: Text, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("est")
    return trained(text.command(f"{EST} --load {weights} --finetune"), folder / "metrics.jsonl")


@pytest.mark.parametrize("layout", [*list(LAYOUTS)[:3], pytest.param(list(LAYOUTS)[3], marks=pytest.mark.slow)])
def test_every_layout_trains_alike(layout: str, whole: Trained, text: Text, weights: Path, tmp_path: Path) -> None:
    argv = text.command(f"{EST} --load {weights} --finetune {LAYOUTS[layout]}")
    found = trained(argv, tmp_path / "metrics.jsonl", ranks=2)
    assert_close(found.losses, whole.losses, **RUN_LOSS)
    assert_close(found.norms, whole.norms, **RUN_NORM)
    if layout != "pipeline":  # a rank of one knows of its own layers alone
        assert found.visits == whole.visits


def test_recomputation_changes_nothing(whole: Trained, text: Text, weights: Path, tmp_path: Path) -> None:
    more = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = trained(text.command(f"{EST} --load {weights} --finetune {more}"), tmp_path / "metrics.jsonl")
    assert found == whole


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(text: Text, tmp_path: Path) -> None:
    saves = f"{EST} --save {tmp_path} --save-interval 2"
    uninterrupted = trained(text.command(saves), tmp_path / "metrics.jsonl")
    resumed = trained(text.command(f"{saves} --load {tmp_path} --ckpt-step 2"), tmp_path / "metrics.jsonl")
    assert resumed == uninterrupted


def test_visits_are_those_of_the_layers_that_took_part(whole: Trained) -> None:
    config = EstConfig(layer_rate=Fraction(1, 2), layers_until=3, seed=1234)
    for layer in range(1, 5):
        present = sum(layer not in layers_left_out(step, config=config, num_layers=4) for step in (1, 2, 3))
        for kind, units in (("attention", 4), ("mlp", 96)):
            assert sum(whole.visits[f"{kind}.{layer}"]) == (present + 2) * units // 2 + 2 * units


def test_other_layers_make_another_run(whole: Trained, text: Text, weights: Path, tmp_path: Path) -> None:
    """The negative control: all layers take part in every step."""
    argv = text.command(f"{EST} --load {weights} --finetune".replace("until 3", "until 0", 1))
    found = trained(argv, tmp_path / "metrics.jsonl")
    assert abs(found.losses[1] - whole.losses[1]) > 1e-4


def test_the_plan_says_what_est_leaves_out_and_saves(text: Text, tmp_path: Path) -> None:
    ended = start(text.command(f"{EST} --save {tmp_path}"))
    assert ended.codes == [0], ended.err
    assert "steps 1-3 leave out 2 of 4 layers, others in each; heads and channels are of the rest" in ended.out
    rungs = json.loads((tmp_path / "plan.json").read_text())["rungs"]
    assert [(r["first"], r["last"], r["rate_exact"], r["layers_left_out"]) for r in rungs] == [
        (1, 3, "1/2", 2), (4, 5, "1/2", 0), (6, 7, "0", 0)
    ]  # fmt: skip
    assert [(r["heads_omitted"], r["channels_omitted"]) for r in rungs] == [(0.75, 0.75), (0.5, 0.5), (0, 0)]
    first, second, dense = (r["step_flops"] for r in rungs)
    assert dense - first == (dense - second) * 3 // 2  # of a layer a half is left, of four layers two


def calls(_: int, argv: list[str]) -> list[list[int]]:
    """Of each training step, the layers whose MLP computed."""
    session, found = open_session(argv), []
    course: Any = session.run.course
    begin = course.begin_step

    def begun(step: int) -> None:
        found.append(list[int]())
        begin(step)

    course.begin_step = begun
    for chunk in session.run.engine.chunks:
        for layer in chunk.modules():
            if hasattr(layer, "layer_number") and hasattr(layer, "mlp"):
                number = layer.layer_number
                layer.mlp.register_forward_pre_hook(
                    lambda module, args, number=number: found[-1].append(number) if module.training else None
                )
    session.train()
    return [sorted(set(layers)) for layers in found]


def test_layers_that_are_left_out_compute_nothing(text: Text) -> None:
    (found,) = run_ranks(calls, 1, text.command(EST))
    assert [len(layers) for layers in found] == [2, 2, 2, 4, 4, 4, 4]
    assert len({tuple(layers) for layers in found[:3]}) > 1
