"""The program on DeepSpeed: whatever the stage and the layout, a run is the run of Megatron's engine on one process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.program import SPARSE, Text, Trained, each_once
from tests.helpers.slow import mostly_slow
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_layouts import OURS, TP, WIDE, assert_same_run

pytestmark = needs_deepspeed

SHARDED = json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}})
"""At stage 3 every parameter is cut, the smallest too."""
LAYOUTS = {
    "zero 1": (1, "--zero-stage 1", ""),
    "zero 0, dp 2": (2, "--zero-stage 0", WIDE),
    "zero 1, dp 2": (2, "--zero-stage 1", WIDE),
    "zero 2, dp 2": (2, "--zero-stage 2", WIDE),
    "zero 3, dp 2": (2, "--zero-stage 3", WIDE),
    "zero 1, tp 2, sequence parallel": (2, f"--zero-stage 1 {TP} --sequence-parallel", ""),
    "zero 1, tp 2, dp 2": (4, f"--zero-stage 1 {TP}", WIDE),
    "zero 2, tp 2, dp 2": (4, f"--zero-stage 2 {TP}", WIDE),
    "zero 3, tp 2, dp 2, sequence parallel": (4, f"--zero-stage 3 {TP} --sequence-parallel", WIDE),
}
METHODS = {"dense": "", "sparse": SPARSE}
METRICS = ("uniform", "magnitude", "wanda", "contribution")
"""Besides maxip, with which `SPARSE` runs."""


@pytest.fixture(scope="module")
def train(text: Text, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """(flags, ranks) to a run from the common weights; each is run once."""
    load_library()
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sharded.json").write_text(SHARDED)

    def command(flags: str) -> list[str]:
        if "--zero-stage" in flags:
            flags += f" --engine deepspeed --deepspeed-config {folder / 'sharded.json'}"
        return text.command(f"--load {weights} --finetune {flags}")

    return each_once(folder, command)


@pytest.mark.parametrize("method", mostly_slow(METHODS, fast=("sparse",)))
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, fast=("zero 1, dp 2", "zero 3, dp 2")))
def test_a_stage_in_a_layout_trains_as_megatrons_engine_does_alone(
    layout: str, method: str, train: Callable[..., Trained]
) -> None:
    ranks, flags, alone = LAYOUTS[layout]
    assert_same_run(train(f"{METHODS[method]} {flags}", ranks), train(f"{METHODS[method]} {alone}"))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", ["zero 2, dp 2", "zero 3, dp 2", "zero 3, tp 2, dp 2, sequence parallel"])
def test_every_metric_chooses_alike_in_shards(layout: str, metric: str, train: Callable[..., Trained]) -> None:
    ranks, flags, alone = LAYOUTS[layout]
    method = f"{SPARSE} --sat-importance {metric}"
    assert_same_run(train(f"{method} {flags}", ranks), train(f"{method} {alone}"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero 0, dp 2", "zero 1, dp 2", "zero 3, dp 2"])
def test_options_that_the_paper_has_not_hold_in_shards_too(layout: str, train: Callable[..., Trained]) -> None:
    ranks, flags, alone = LAYOUTS[layout]
    assert_same_run(train(f"{OURS} {flags}", ranks), train(f"{OURS} {alone}"))
