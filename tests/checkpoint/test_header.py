"""Headers go to plain values and back, and differences are found by name."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_sat.checkpoint.header import KEY, Header, first_difference, plain


def test_a_header_returns_from_what_is_saved_of_it() -> None:
    header = Header(iteration=3, consumed_train_samples=24, tokenizer="f", data={"b": [1, "x"]}, extra={"seed": 1})
    assert Header.from_common({KEY: header.to_plain(), "iteration": 3}) == header


def test_values_of_no_plain_type_become_their_text() -> None:
    values = {
        "rate": Fraction(1, 3),
        "dtype": torch.bfloat16,
        "path": Path("a/b"),
        "none": None,
        "x": (0.1, 2),
    }
    assert plain(values) == {
        "rate": "1/3",
        "dtype": "torch.bfloat16",
        "path": "a/b",
        "none": None,
        "x": [0.1, 2],
    }


def test_a_checkpoint_of_another_program_has_no_header() -> None:
    assert Header.from_common({"iteration": 3, "args": object()}) is None


def test_a_header_of_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match="must be of version 1, it is of version 2; update megatron_sat"):
        Header.from_common({KEY: {"version": 2}})


@pytest.mark.parametrize(
    "saved, now, difference",
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "a": 1}, ("b.c", 2, 3)),
        ({"a": 1}, {}, ("a", 1, None)),
        ({}, {"a": 1}, ("a", None, 1)),
        ({"a": {"b": 1}}, {"a": 5}, ("a", {"b": 1}, 5)),
        ({"a": [1, 2]}, {"a": [2, 1]}, ("a", [1, 2], [2, 1])),
    ],
)
def test_the_first_difference_is_named(saved: dict, now: dict, difference: tuple | None) -> None:
    assert first_difference(saved, now=now, name="") == difference
