"""The paper's runs by name: what they fill in, what gives way, and that nothing is filled in that nobody reads."""

from fractions import Fraction

import pytest

from megatron_sat.flags.presets import PRESETS, fill_in
from megatron_sat.sparsity.schedule import build_schedule
from tests.helpers.command_line import refusal, run

FREE = "--train-iters --global-batch-size --lr --min-lr --lr-decay-style"
RUNGS = {
    "paper": [(1, 2000), (2001, 2032), (2033, 2096), (2097, 2225), (2226, 2483), (2484, 3000)],
    "paper-sft": [(1, 600), (601, 1200)],
}
"""METHOD.md's, of T = 3000 and 1200."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_papers_run(name):
    config = run(f"--sat-preset {name}", without=FREE)
    schedule = build_schedule(config.schedule)
    rate = {"paper": Fraction(1, 2), "paper-sft": Fraction(24, 25)}[name]
    assert [(rung.first, rung.last) for rung in schedule.rungs()] == RUNGS[name]
    assert (schedule.rate(1), schedule.rate(config.training.train_iters)) == (rate, 0)
    batch, lr = {"paper": (1024, 5e-5), "paper-sft": (128, 1e-5)}[name]
    rates = config.learning_rate
    assert (config.training.global_batch_size, rates.lr, rates.lr_decay_style) == (batch, lr, "cosine")
    chosen = config.selection
    assert (chosen.importance, chosen.selection, chosen.temperature) == ("maxip", "sampling", 0.05)
    assert chosen.selection_interval == 1
    assert config.settings["sat_preset"] == name


def test_fine_tuning_lasts_three_epochs_unless_it_is_said_otherwise(monkeypatch):
    asked = {}

    def updates(_, *, epochs, global_batch_size, **how):
        asked.update(epochs=epochs, batch=global_batch_size)
        return 901

    monkeypatch.setattr("megatron_sat.flags.finetuning.updates_of_epochs", updates)
    data = {"sft": True, "sat_preset": "paper-sft", "seq_length": 64, "train_data_path": ["x"]}
    filled = fill_in(data)
    assert asked == {"epochs": 3, "batch": 128}
    assert (filled["train_iters"], filled["sat_schedule_start"]) == (901, 450)
    assert fill_in({**data, "train_iters": 1200})["sat_schedule_start"] == 600
    assert fill_in({**data, "train_samples": 128 * 500})["sat_schedule_start"] == 250


def test_what_is_given_stands(capsys):
    config = run("--sat-preset paper-sft --lr 3e-4 --sat-omission-rate 0.5 --sat-schedule-start 7", without=FREE)
    assert (config.learning_rate.lr, config.schedule.omission_rate, config.schedule.start) == (3e-4, Fraction(1, 2), 7)


@pytest.mark.parametrize(
    ("more", "absent"),
    [
        ("--sat-selection top-k", {"sat_temperature"}),
        ("--sat-schedule constant", {"sat_rungs", "sat_schedule_start"}),
        ("--sat-schedule none", {"sat_rungs", "sat_schedule_start", "sat_omission_rate", "sat_importance"}),
    ],
)
def test_nothing_is_filled_in_that_another_setting_makes_idle(more, absent):
    assert absent.isdisjoint(run(f"--sat-preset paper {more}", without=FREE).settings)


def test_a_setting_that_is_given_and_idle_is_refused_with_a_preset_too(capsys):
    said = refusal(capsys, "--sat-preset paper --sat-selection top-k --sat-temperature 0.1", without=FREE)
    assert said.startswith("error: --sat-temperature has no effect with --sat-selection top-k")
    assert refusal(capsys, "--sat-preset mine").startswith("error: --sat-preset must be one of paper, paper-sft, got")
