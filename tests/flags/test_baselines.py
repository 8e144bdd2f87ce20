"""Settings of the baselines: what they come to, and what is refused beside them."""

from fractions import Fraction

import pytest

from megatron_sat.baselines.settings import SpdfConfig
from megatron_sat.flags.baselines import check_baseline
from megatron_sat.flags.flag import dashed
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


@pytest.mark.parametrize("key", ["optimizer_cpu_offload", "use_precision_aware_optimizer"])
def test_optimizers_whose_copies_lie_elsewhere_are_refused(key: str) -> None:
    settings = {**run(SPDF).settings, "train_samples": None, key: True}
    with pytest.raises(ValueError, match=rf"--baseline spdf needs no {dashed(key)}, got it: masked weights must be"):
        check_baseline(settings)
