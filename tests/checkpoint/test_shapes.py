"""Misfits of a model and a checkpoint, line by line."""

import pytest

from megatron_sat.checkpoint.shapes import Wanted, misfits, refuse_misfits

WANTED = {"a": Wanted((2, 3), padded=False), "vocab": Wanted((128, 3), padded=True)}


def test_what_fits_has_no_misfits() -> None:
    assert misfits(WANTED, saved={"a": (2, 3), "vocab": (128, 3)}, padding_known=False) == []


@pytest.mark.parametrize(
    "saved, known, lines",
    [
        ({"a": (2, 4), "vocab": (128, 3)}, True, ["a: [2, 3] in the model, [2, 4] in the checkpoint"]),
        ({"vocab": (128, 3)}, True, ["a: [2, 3] in the model, absent from the checkpoint"]),
        (
            {"a": (2, 3), "vocab": (128, 3), "z": (1,)},
            True,
            ["z: [1] in the checkpoint, absent from the model"],
        ),
        ({"a": (2, 3), "vocab": (96, 3)}, True, []),
        ({"a": (2, 3), "vocab": (96, 3)}, False, ["vocab: [128, 3] in the model, [96, 3] in the checkpoint"]),
        ({"a": (2, 3), "vocab": (96, 4)}, True, ["vocab: [128, 3] in the model, [96, 4] in the checkpoint"]),
    ],
)
def test_each_misfit_is_a_line(saved: dict[str, tuple[int, ...]], known: bool, lines: list[str]) -> None:
    assert misfits(WANTED, saved=saved, padding_known=known) == lines


def test_a_message_names_the_first_misfits_and_counts_the_others() -> None:
    assert refuse_misfits([], folder="x") is None
    message = refuse_misfits([f"line {i}" for i in range(8)], folder="x")
    assert message is not None
    assert "the shape of the checkpoint x, 8 tensors differ:\n  line 0\n  line 1" in message
    assert "line 5" not in message
    assert "and 3 more" in message
