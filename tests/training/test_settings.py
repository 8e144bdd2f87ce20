"""What a run is told: each field refuses what it cannot be."""

import signal

import pytest

from megatron_sat.training.settings import CheckpointConfig, LoggingConfig, TrainingConfig

RUN = {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 8, "num_micro_batches": 2}


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (
            TrainingConfig,
            {**RUN, "train_iters": 0},
            "--train-iters must be at least 1, got 0; leave it out or raise",
        ),
        (TrainingConfig, {**RUN, "eval_interval": 0}, "--eval-interval must be at least 1, got 0"),
        (TrainingConfig, {**RUN, "exit_interval": 0}, "--exit-interval must be at least 1, got 0"),
        (
            TrainingConfig,
            {**RUN, "exit_duration_in_mins": 0},
            "--exit-duration-in-mins must be at least 1, got 0",
        ),
        (TrainingConfig, {**RUN, "eval_iters": -1}, "--eval-iters must be at least 0, got -1"),
        (TrainingConfig, {**RUN, "requeue_exit_code": 5}, r"--requeue-exit-code must be in \[6, 125\], .*got 5"),
        (TrainingConfig, {**RUN, "seed": 0}, "--seed must be at least 1, got 0"),
        (
            TrainingConfig,
            {**RUN, "global_batch_size": 6},
            r"--global-batch-size \(6\) must be a multiple of --micro-batch-size x micro-batches \(2 x 2\)",
        ),
        (CheckpointConfig, {"save_interval": 0}, "--save-interval must be at least 1, got 0"),
        (CheckpointConfig, {"save_keep_last": 0}, "--save-keep-last must be at least 1, got 0"),
        (CheckpointConfig, {"ckpt_step": -1}, "--ckpt-step must be at least 0, got -1"),
        (LoggingConfig, {"log_interval": 0}, "--log-interval must be at least 1, got 0"),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_its_flag(cls, settings, said):
    with pytest.raises(ValueError, match=said):
        cls(**settings)


def test_a_run_without_evaluation_is_a_run():
    assert TrainingConfig(**RUN, eval_iters=0).eval_interval is None


def test_a_run_listens_to_its_signal_where_it_is_told_to():
    assert TrainingConfig(**RUN).listens_to is None
    assert TrainingConfig(**RUN, exit_signal_handler=True).listens_to is signal.SIGTERM
    assert TrainingConfig(**RUN, exit_signal_handler=True, exit_signal="SIGUSR1").listens_to is signal.SIGUSR1
