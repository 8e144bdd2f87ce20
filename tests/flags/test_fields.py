"""Settings out of megatron.core's classes: no field is lost, and values arrive in the fields' types."""

import enum
from dataclasses import dataclass, fields
from typing import Literal, Optional

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.flags.fields import GIVEN_ELSEWHERE, KEYS, SECTIONS, inexpressible, keywords, setting_of
from megatron_sat.flags.flag import dashed
from megatron_sat.flags.refused import refusal
from megatron_sat.flags.table import table

EVERY_FIELD = [(cls, field.name) for cls in SECTIONS for field in fields(cls)]


def test_every_field_can_be_set_or_follows_from_others_or_is_refused_with_a_reason():
    answered = GIVEN_ELSEWHERE.keys() | {name.partition(".")[2] for name in inexpressible()}
    lost = [
        (cls.__name__, name)
        for cls, name in EVERY_FIELD
        if KEYS.get(name, name) not in table().flags
        and name not in answered
        and refusal(dashed(name)) is None
    ]
    assert lost == []
    assert len(EVERY_FIELD) > 300


def test_what_no_text_can_express_is_listed_with_its_type():
    listed = inexpressible()
    assert "Callable" in listed["TransformerConfig.no_sync_func"]
    assert not any(name.endswith(".num_layers") for name in listed)


def test_fields_that_follow_from_others_name_settings_that_exist():
    for source in GIVEN_ELSEWHERE.values():
        names = [word.strip(",") for word in source.split() if word.startswith("--")]
        assert names
        assert set(names) <= table().by_name.keys()


class Colour(enum.Enum):
    red = 1
    blue = 2


@dataclass
class Sample:
    number: int = 3
    share: Optional[float] = None  # noqa: UP045  (megatron declares it so)
    colour: Colour = Colour.blue
    dtype: torch.dtype = torch.float32
    mode: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    layers: int | list[int] | None = None
    kind: str | list | None = None
    on: bool = True
    hook: object = None


@pytest.mark.parametrize(
    ("name", "kind", "many", "choices", "default"),
    [
        ("number", "int", "", (), 3),
        ("share", "float", "", (), None),
        ("colour", "str", "", ("red", "blue"), "blue"),
        ("dtype", "str", "", ("fp32", "bf16", "fp16", "fp8"), "fp32"),
        ("mode", "str", "", ("a", "b"), "a"),
        ("names", "str", "+", (), None),
        ("layers", "pattern", "", (), None),
        ("kind", "str", "", (), None),
        ("on", "bool", "", (), True),
    ],
)
def test_a_declared_type_becomes_a_kind(name, kind, many, choices, default):
    flag = setting_of(next(field for field in fields(Sample) if field.name == name))
    assert (flag.kind, flag.many, flag.choices, flag.default) == (kind, many, choices, default)


def test_a_field_without_a_textual_form_has_no_setting():
    assert setting_of(next(field for field in fields(Sample) if field.name == "hook")) is None


def test_a_boolean_that_is_on_can_be_switched_off_by_megatrons_two_names():
    flag = setting_of(next(field for field in fields(Sample) if field.name == "on"))
    assert {"--no-on", "--disable-on"} <= {name for name, value in flag.presets.items() if value is False}


def test_values_arrive_in_the_types_of_the_fields():
    given = {
        "share": 0.5,
        "colour": "red",
        "dtype": "bf16",
        "names": ["a"],
        "layers": [0, 1],
        "on": False,
        "else": 1,
    }
    assert keywords(Sample, given) == {
        "share": 0.5,
        "colour": Colour.red,
        "dtype": torch.bfloat16,
        "names": ("a",),
        "layers": [0, 1],
        "on": False,
    }


def test_megatrons_classes_take_what_the_defaults_make():
    settings = {flag.key: flag.default for flag in table().working}
    size = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    assert (
        TransformerConfig(**keywords(TransformerConfig, settings) | size).attention_backend
        is AttnBackend.auto
    )
    DistributedDataParallelConfig(**keywords(DistributedDataParallelConfig, settings))
    assert OptimizerConfig(**keywords(OptimizerConfig, settings)).exp_avg_dtype is torch.float32
