"""Settings of the baselines: what they come to, and what is refused beside them."""

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_sat.baselines.settings import EstConfig, MstConfig, SpdfConfig
from megatron_sat.cli import as_yaml, parse
from megatron_sat.flags.baselines import check_baseline
from megatron_sat.flags.defaults import Machine
from megatron_sat.flags.flag import dashed
from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.schedule import build_schedule
from tests.helpers.command_line import LADDER, refusal, run

SPDF = "--baseline spdf --spdf-until 60"


def test_without_a_baseline_there_is_none() -> None:
    assert run().baseline is None


def test_the_settings_of_spdf_are_its_sources_unless_given() -> None:
    assert run(SPDF).baseline == SpdfConfig(rate=Fraction(1, 2), until=60, mask="magnitude", seed=1234)
    more = run(f"{SPDF} --spdf-rate 1/3 --spdf-mask random --seed 5").baseline
    assert more == SpdfConfig(rate=Fraction(1, 3), until=60, mask="random", seed=5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (f"{SPDF} --spdf-rate 3/0", "--spdf-rate must be a number such as 0.5 or 1/2, got '3/0'"),
        ("--spdf-rate 0.5", "--spdf-rate has no effect without --baseline spdf; leave it out"),
        ("--baseline spdf", "--baseline spdf needs --spdf-until, which is not given; the paper compares with two"),
        (f"{SPDF} --spdf-rate half", "--spdf-rate must be a number such as 0.5 or 1/2, got 'half'"),
        (f"{SPDF} --spdf-rate 1", "--spdf-rate must be in [0, 1), got 1"),
        ("--baseline spdf --spdf-until 101", "--spdf-until (101) must be at most --train-iters (100); 100 never"),
        (f"{SPDF} {LADDER}", "--baseline spdf needs --sat-schedule none, got ladder: the model is sparse in one way"),
        (f"{SPDF} --engine deepspeed", "--baseline spdf needs --engine megatron, got deepspeed: masks need gradients"),
        (f"{SPDF} --optimizer sgd", "--baseline spdf needs --optimizer adam, got sgd: another optimizer moves weights"),
        (
            f"{SPDF} --train-only new-embeddings",
            "--baseline spdf needs --train-only all, got new-embeddings: masked matrices would not train at all",
        ),
    ],
)
def test_a_baseline_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], more: str, said: str) -> None:
    assert refusal(capsys, more).startswith(f"error: {said}")


MST = "--mst-rate 3/4 --mst-warmup 20 --mst-restoration 20 --mst-stages 2 --mst-interval 10"
STRUCTURED = f"--baseline mst-structured {MST}"


def test_structured_mst_is_a_schedule_and_a_way_of_choosing() -> None:
    config = run(STRUCTURED)
    assert config.baseline is None
    assert (config.schedule.kind, config.schedule.omission_rate) == ("mst", Fraction(3, 4))
    selection = config.selection
    assert (selection.selection, selection.selection_interval, selection.importance) == (
        "mixed-growing",
        10,
        "contribution",
    )
    assert selection.growing == Growing(replaced=0.3, random_share=0.25, last_step=100)
    assert run(f"{STRUCTURED} --sat-importance maxip").selection.importance == "maxip"


def test_a_resolved_configuration_of_structured_mst_is_the_same_run_again(tmp_path: Path) -> None:
    for rate in ("3/4", "1/3"):
        config = run(STRUCTURED.replace("3/4", rate))
        file = tmp_path / "config.yaml"
        file.write_text(as_yaml(config.settings))
        assert parse(["--config", str(file)], world_size=1, cuda=False, machine=Machine(cuda=False)) == config


def test_mst_by_masks_has_a_schedule_of_its_own_and_its_sources_settings() -> None:
    config = run(f"--baseline mst {MST}")
    assert config.schedule.kind == "none"
    assert isinstance(config.baseline, MstConfig)
    assert (config.baseline.schedule.kind, config.baseline.schedule.omission_rate) == ("mst", Fraction(3, 4))
    assert config.baseline.growing == Growing(replaced=0.3, random_share=0.25, last_step=100)
    assert (config.baseline.attention_stride, config.baseline.seed) == (128, 1234)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--mst-rate 0.5", "--mst-rate has no effect without --baseline mst or mst-structured; leave it out"),
        (f"{STRUCTURED} --mst-attention-stride 4", "--mst-attention-stride has no effect with --baseline mst"),
        (f"--baseline mst {MST} --sat-schedule constant --sat-omission-rate 0.5", "--baseline mst needs --sat-sched"),
        ("--baseline mst", "--baseline mst needs --mst-rate, which is not given; add it"),
        (f"--baseline mst {MST} --fp16", "--baseline mst needs --bf16 or fp32, got --fp16, whose overflows grow"),
        (f"--baseline mst {MST} --on-bad-step skip", "--baseline mst needs --on-bad-step stop or rollback, got skip"),
        (f"--baseline mst {MST} --mst-interval 1", "--mst-interval must be at least 2 with --baseline mst, got 1"),
        (f"--baseline mst {MST} --layer-graphs", "--layer-graphs has no effect with model parallelism"),
        ("--baseline mst-structured", "--baseline mst-structured needs --mst-rate, which is not given; add it"),
        (STRUCTURED.replace("3/4", "1"), "--mst-rate must be in [0, 1), got 1; it is the share left out"),
        (f"{STRUCTURED} --sat-schedule ladder", "--sat-schedule follows from --baseline mst-structured, which makes"),
        (f"{STRUCTURED} --sat-selection-interval 3", "--sat-selection-interval follows from --baseline mst-structured"),
        (f"{STRUCTURED} --sat-temperature 1", "--sat-temperature has no effect with --baseline mst-structured, which"),
        (f"{STRUCTURED} --sat-importance uniform", "--baseline mst-structured needs scores that differ, got --sat-imp"),
        ("--sat-schedule mst", "--sat-schedule mst belongs to --baseline mst-structured, got it without; add it"),
        (f"{LADDER} --sat-selection mixed-growing", "--sat-selection mixed-growing belongs to --baseline mst-struct"),
        (f"{STRUCTURED} --mst-warmup 19", "--mst-warmup must be at least --mst-stages x --mst-interval (2 x 10)"),
        (f"{STRUCTURED} --mst-replaced 1", "--mst-replaced must be in [0, 1), got 1.0"),
    ],
)
def test_a_structured_mst_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], more: str, said: str) -> None:
    assert refusal(capsys, more).startswith(f"error: {said}")


def test_structured_mst_needs_a_choice_that_replicas_share(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, f"{STRUCTURED} --mst-interval 1 --sat-dp-selection local", ranks=2)
    assert said.startswith("error: --baseline mst-structured needs --sat-dp-selection shared, got local: a checkpoint")


EST = "--baseline est --est-layers-until 20 --est-until 60"


def test_est_is_a_way_of_choosing_a_schedule_of_two_parts_and_layers() -> None:
    config = run(f"{EST} --est-rate 1/4")
    assert config.baseline == EstConfig(layer_rate=Fraction(1, 2), layers_until=20, seed=1234)
    rungs = build_schedule(config.schedule).rungs()
    assert [(r.first, r.last, r.rate) for r in rungs] == [(1, 60, Fraction(1, 4)), (61, 100, Fraction(0))]
    selection = config.selection
    assert (selection.importance, selection.selection, selection.rescale) == ("uniform", "sampling", "inverse-keep")
    assert selection.selection_interval == 1
    assert run(f"{EST} --sat-seed 5 --est-layer-rate 0.25").baseline == EstConfig(
        layer_rate=Fraction(1, 4), layers_until=20, seed=5
    )


def test_a_resolved_configuration_of_est_is_the_same_run_again(tmp_path: Path) -> None:
    for rate in ("1/2", "1/3"):
        config = run(f"{EST} --est-rate {rate} --est-layer-rate {rate}")
        file = tmp_path / "config.yaml"
        file.write_text(as_yaml(config.settings))
        assert parse(["--config", str(file)], world_size=1, cuda=False, machine=Machine(cuda=False)) == config


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--est-rate 0.25", "--est-rate has no effect without --baseline est; leave it out"),
        ("--baseline est --est-until 5", "--baseline est needs --est-layers-until, which is not given; add it"),
        ("--baseline est --est-layers-until 5", "--baseline est needs --est-until, which is not given; add it"),
        (f"{EST} --est-rate 1", "--est-rate must be in [0, 1), got 1; it is the share left out"),
        (f"{EST} --est-until 101", "--est-until (101) must be at most --train-iters (100); 100 never becomes dense"),
        (f"{EST} --est-until 19", "--est-layers-until must be at most --est-until (19), got 20: the first stage comes"),
        (f"{EST} --est-layers-until 0 --est-layer-rate 0.5", "--est-layer-rate has no effect with --est-layers"),
        (f"{EST} {LADDER}", "--sat-rungs follows from --baseline est, which makes it 1, got 5; leave it out"),
        (f"{EST} --sat-importance maxip", "--sat-importance follows from --baseline est, which makes it uniform, got"),
        (f"{EST} --sat-rescale none", "--sat-rescale follows from --baseline est, which makes it inverse-keep, got"),
        (f"{EST} --sat-temperature 1", "--sat-temperature has no effect with --baseline est, which draws evenly"),
        (f"{EST} --layer-graphs", "--layer-graphs has no effect with model parallelism"),
        (f"{EST} --sat-modules mlp", "--baseline est needs --sat-modules all, got mlp: it samples heads and channels"),
        (f"{EST} --sat-whole-ends 1", "--baseline est needs no --sat-whole-ends, got it: it samples in all layers"),
        (
            f"{EST} --sat-omitted-neurons frozen",
            "--baseline est needs --sat-omitted-neurons optimizer, got frozen: layers that are left out would be moved",
        ),
        (
            f"{EST} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            "--baseline est needs no --overlap-param-gather, got it: weights of layers that are left out would never",
        ),
        (f"{EST} --engine deepspeed", "--baseline est needs --engine megatron, got deepspeed: ZeRO waits for the"),
    ],
)
def test_an_est_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], more: str, said: str) -> None:
    assert refusal(capsys, more).startswith(f"error: {said}")


@pytest.mark.parametrize(("key", "value"), [("sat_omit", "backward"), ("cpu_offloading", True)])
def test_settings_beside_which_layers_cannot_be_left_out_are_refused(key: str, value: object) -> None:
    settings = {**run(EST).settings, "train_samples": None, key: value}
    with pytest.raises(ValueError, match=rf"--baseline est needs (no )?{dashed(key)}.*, got (it|backward): it "):
        check_baseline(settings)


@pytest.mark.parametrize("key", ["optimizer_cpu_offload", "use_precision_aware_optimizer"])
def test_optimizers_whose_copies_lie_elsewhere_are_refused(key: str) -> None:
    settings = {**run(SPDF).settings, "train_samples": None, key: True}
    with pytest.raises(ValueError, match=rf"--baseline spdf needs no {dashed(key)}, got it: masked weights must be"):
        check_baseline(settings)
