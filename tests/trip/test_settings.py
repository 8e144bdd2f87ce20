"""A trip's settings: what is refused, and what SAT's flags come to."""

import pytest

from megatron_sat.trip.settings import Settings, settings_from

GIVEN = {"steps": 300, "add": 8000, "seq_length": 1024}


def test_the_ladder_begins_after_two_thirds_of_the_steps() -> None:
    assert " ".join(settings_from(GIVEN).schedule) == (
        "--sat-schedule ladder --sat-omission-rate 0.5 --sat-rungs 5 --sat-schedule-start 200"
    )


def test_the_methods_other_settings_are_handed_on() -> None:
    settings = settings_from(GIVEN | {"method": {"sat_importance": "contribution", "sat_selection_interval": 10}})
    assert " ".join(settings.schedule) == (
        "--sat-schedule ladder --sat-omission-rate 0.5 --sat-rungs 5 --sat-importance contribution"
        " --sat-selection-interval 10 --sat-schedule-start 200"
    )


def test_rates_and_shares_are_taken_as_they_are_written() -> None:
    settings = settings_from(GIVEN | {"omission_rate": 0.3, "sparse_share": 0.5})
    assert (settings.omission_rate, settings.schedule[-1]) == ("0.3", "150")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 2}, "steps must be at least 3, so that a ladder has room, got 2"),
        ({"add": 0}, "add must be at least 1, got 0; the paper adds 33000"),
        ({"replay_share": 1.0}, r"replay_share must be in \(0, 1\), got 1.0"),
        ({"sparse_share": "1"}, r"sparse_share must be in \(0, 1\), got 1"),
        ({"ranks": 3, "tensor_parallel": 2}, r"ranks \(3\) must be a multiple of the TP size \(2\)"),
        ({"method": {"lr": 1}}, "method must hold sat_. settings other than sat_schedule, .*, got lr"),
        ({"method": {"sat_rungs": 2}}, "method must hold sat_. settings other than sat_schedule, .*, got sat_rungs"),
        ({"learning_rate": 1}, "trip: learning_rate must be a setting; there are steps, add, "),
    ],
)
def test_a_setting_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings_from(GIVEN | change)


def test_a_setting_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="trip: every setting without a default must be given.*'add'"):
        settings_from({"steps": 300, "seq_length": 64})


def test_settings_have_what_the_paper_has() -> None:
    settings = Settings(steps=9, add=1, seq_length=8)
    assert (settings.omission_rate, settings.sparse_share, settings.rungs, settings.replay_share) == (
        "0.5",
        "2/3",
        5,
        0.2,
    )
