"""What must hold so that a run can pass over a bad step (`training.response`)."""

from megatron_sat.flags.flag import Settings


def check_bad_steps(s: Settings, *, given: Settings) -> None:
    """Raise ValueError for a policy that could not be carried out. s: resolved from ``given``."""
    policy = s["on_bad_step"]
    if policy == "stop":
        return
    if given.get("check_for_nan_in_loss_and_grad"):
        raise ValueError(
            f"--on-bad-step {policy} needs megatron.core's own check off, got --check-for-nan-in-loss-and-grad, which "
            "breaks the run off at once; leave it out"
        )
    if policy == "rollback" and not (s["save"] and s["save_interval"] and s["save_optim"]):
        raise ValueError(
            "--on-bad-step rollback needs checkpoints to go back to, got it without --save, --save-interval or "
            "--save-optim; add what is missing, or use --on-bad-step skip"
        )
