"""Megatron-LM's own parser against ours, where it is installed: 0.19 brings it, 0.16 does not."""

import argparse
from fnmatch import fnmatchcase

import pytest

from megatron_sat.flags.fields import SECTIONS
from megatron_sat.flags.known import NAMES
from megatron_sat.flags.refused import REASONS, refusal
from megatron_sat.flags.table import table
from tests.flags.test_table import OLDER_NAMES

arguments = pytest.importorskip(
    "megatron.training.arguments", reason="megatron.training is not part of this megatron-core"
)

KINDS = {int: "int", float: "float", str: "str", None: "str"}
DECIDED_BY_THE_MACHINE = {
    "--use-cpu-initialization": "off on a GPU, on without one",
    "--no-gradient-accumulation-fusion": "on everywhere: by apex, or by torch",
    "--no-rope-fusion": "on where Transformer Engine can",
    "--no-bias-gelu-fusion": "on with CUDA",
    "--no-bias-swiglu-fusion": "on with CUDA",
    "--no-bias-dropout-fusion": "on with CUDA",
    "--distributed-backend": "nccl with CUDA",
}
DECIDED_BY_OTHERS = {
    "--no-check-for-nan-in-loss-and-grad": "off with dynamic loss scaling, and where --on-bad-step sees the norm",
    "--accumulate-allreduce-grads-in-fp32": "validate_args switches it on with --bf16",
    "--no-overlap-p2p-communication": "validate_args switches it off without interleaving",
    "--no-align-param-gather": "validate_args switches it off without interleaving",
}
FEWER_CHOICES = {"--position-embedding-type", "--tokenizer-type", "--exit-signal"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    arguments.add_megatron_arguments(made)
    return made


ACTIONS = [(name, action) for action in parser()._actions for name in action.option_strings]
WORKING = [(name, a) for name, a in ACTIONS if name in table().by_name and not table().by_name[name].idle]


def test_the_list_of_names_is_that_of_the_parser():
    assert {name for name, _ in ACTIONS} == NAMES


def test_every_name_is_a_setting_or_refused_and_never_both():
    lost = [name for name in sorted(NAMES) if (name in table().by_name) == (refusal(name) is not None)]
    assert lost == []


def test_most_of_the_parser_is_compared():
    assert len(WORKING) > 150


@pytest.mark.parametrize(("name", "action"), WORKING, ids=[name for name, _ in WORKING])
def test_a_setting_has_megatrons_type_and_default(name, action):
    flag = table().by_name[name]
    if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
        theirs = flag.presets[name] if action.default == action.const else None
        ours = flag.default if flag.default == flag.presets[name] else None
    else:
        assert name in flag.names
        assert flag.many == (action.nargs or "")
        kind = KINDS.get(action.type, "pattern" if name == "--no-rope-freq" else "str")
        assert flag.kind == kind
        theirs, ours = getattr(action.default, "name", action.default) or None, flag.default or None
    if name in DECIDED_BY_THE_MACHINE | DECIDED_BY_OTHERS:
        assert flag.default is None
    else:
        assert ours == theirs


def test_a_setting_has_megatrons_choices():
    other = []
    for name, action in WORKING:
        if name in table().by_name[name].presets:
            continue
        theirs = {getattr(choice, "name", choice) for choice in action.choices or ()}
        ours = set(table().by_name[name].choices)
        if ours != theirs and not (name in FEWER_CHOICES and ours < theirs):
            other.append((name, ours ^ theirs))
    assert other == []


def test_every_pattern_of_a_refusal_meets_a_name_of_some_release():
    every = {name.removeprefix("--") for name in (*NAMES, *OLDER_NAMES)}
    every |= {field.replace("_", "-") for cls in SECTIONS for field in cls.__dataclass_fields__}
    patterns = [pattern for _, patterns in REASONS for pattern in patterns.split()]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in every)]
    assert idle == []
