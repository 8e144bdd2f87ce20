"""bf16 runs of the program stay near their fp32 twins, dense and sparse, alone and on two ranks."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.helpers.command_line import PAPER
from tests.helpers.program import Text, trained
from tests.helpers.tolerances import RUN_LOSS, RUN_LOSS_BF16

SHORT = "--train-iters 3 --sat-importance magnitude --sat-selection top-k"
SPARSE = f"--sat-schedule constant --sat-omission-rate 0.5 {PAPER} --sat-selection-groups 2 {SHORT}"
"""Scores that rounding hardly moves: sampling would draw others where two keys are near."""


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--train-iters 3"),
        (1, SPARSE),
        (2, f"{SPARSE} --tensor-model-parallel-size 2 --sequence-parallel"),
        (2, f"{SPARSE} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ],
)
def test_bf16_stays_near_fp32(ranks: int, flags: str, text: Text, tmp_path: Path) -> None:
    alone = flags.split(" --tensor")[0].split(" --use")[0]
    exact = trained(text.command(alone), tmp_path / "fp32")
    rounded = trained(text.command(f"{flags} --bf16"), tmp_path / "bf16", ranks=ranks)
    assert_close(rounded.losses, exact.losses, **RUN_LOSS_BF16)
    assert_close(rounded.validation, exact.validation, **RUN_LOSS_BF16)
    with pytest.raises(AssertionError):
        assert_close(rounded.losses, exact.losses, **RUN_LOSS)
