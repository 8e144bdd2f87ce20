"""A policy for bad steps that could not be carried out is refused before the run."""

import pytest

from tests.helpers.command_line import refusal, run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "--on-bad-step skip --check-for-nan-in-loss-and-grad",
            "--on-bad-step skip needs megatron.core's own check off, got --check-for-nan-in-loss-and-grad",
        ),
        ("--on-bad-step rollback", "--on-bad-step rollback needs checkpoints to go back to"),
        ("--on-bad-step rollback --save runs/x", "--on-bad-step rollback needs checkpoints to go back to"),
        (
            "--on-bad-step rollback --save runs/x --save-interval 5 --no-save-optim",
            "got it without --save, --save-interval or --save-optim; add what is missing",
        ),
        ("--max-bad-steps 3", "--max-bad-steps has no effect with --on-bad-step stop; leave it out"),
        ("--requeue-exit-code 99", "--requeue-exit-code has no effect without --exit-signal-handler; leave it out"),
    ],
)
def test_what_could_not_work_is_refused(capsys: pytest.CaptureFixture[str], more: str, said: str) -> None:
    assert said in refusal(capsys, more)


def test_what_works_reaches_the_run() -> None:
    policy, signal = "--on-bad-step skip --max-bad-steps 3 --max-loss-leap 1.5", "--exit-signal-handler"
    config = run(f"{policy} {signal} --requeue-exit-code 99")
    assert (config.guard.on_bad_step, config.guard.max_bad_steps, config.guard.max_loss_leap) == ("skip", 3, 1.5)
    assert (config.training.listens_to is not None, config.training.requeue_exit_code) == (True, 99)


def test_a_signal_without_a_handler_is_remarked_upon() -> None:
    remarks = run("--exit-signal SIGUSR1").remarks
    assert remarks == ("--exit-signal SIGUSR1 has no effect without --exit-signal-handler",)
