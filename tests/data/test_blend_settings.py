"""Settings of data that contradict themselves are refused by name, before any file is looked at."""

import pytest

from megatron_sat.data.blend import DataConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data_path": ("a",), "seq_length": 0}, "seq_length must be at least 1, got 0"),
        ({}, "data must come from --data-path or --train-data-path, got neither"),
        ({"data_path": ("a",), "valid_data_path": ("b",)}, "--data-path excludes --train-data-path"),
        (
            {"train_data_path": ("a",), "split": "9,1"},
            r"--split \(9,1\) cuts --data-path, which is not given",
        ),
        (
            {"data_path": ("a",), "split": "9,x"},
            "split must be up to three proportions, got '9,x'; write --split",
        ),
        ({"data_path": ("a",), "split": "0,0,0"}, "split must be up to three proportions"),
        ({"data_path": ("a",), "split": "1,1,1,1"}, "split must be up to three proportions"),
        ({"data_path": ("a",), "split": "2,-1"}, "split must be up to three proportions"),
        ({"train_data_path": ("-1", "a")}, "--train-data-path: a weight must be positive, got -1"),
        (
            {"train_data_path": ("a",), "valid_data_path": ("0", "b")},
            "--valid-data-path: a weight must be positive",
        ),
        (
            {"train_data_path": ("a",), "test_data_path": ("b", "b")},
            "--test-data-path must name a data set once",
        ),
        (
            {"train_data_path": ("x=a",), "replay_data_path": ("x=b",), "replay_share": 0.1},
            "training and replay: domains must have different names, x is there 2 times",
        ),
        (
            {"train_data_path": ("a",), "replay_data_path": ("b",)},
            "--replay-data-path needs a --replay-share above 0",
        ),
        ({"train_data_path": ("a",), "replay_share": 0.2}, r"replay_share \(0.2\) needs --replay-data-path"),
        (
            {"valid_data_path": ("a",), "replay_data_path": ("b",), "replay_share": 0.1},
            "--replay-data-path mixes into training text, there is none",
        ),
        ({"train_data_path": ("a",), "num_workers": -1}, "num_workers must be at least 0, got -1"),
        (
            {"train_data_path": ("a",), "mid_level_dataset_surplus": -0.1},
            "mid_level_dataset_surplus must not be negative",
        ),
        (
            {"train_data_path": ("a",), "index_timeout_minutes": 0},
            "index_timeout_minutes must be positive, got 0",
        ),
    ],
)
def test_settings_that_contradict_are_refused_before_any_file_is_looked_at(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"seq_length": 8, "seed": 1} | fields)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_replay_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match=rf"replay_share must be in \[0, 1\), got {share}"):
        DataConfig(seq_length=8, seed=1, train_data_path=("a",), replay_data_path=("b",), replay_share=share)
