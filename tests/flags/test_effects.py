"""Settings without effect: the method's are refused, Megatron-LM's are remarked upon, neither is printed."""

import re

import pytest

from megatron_sat.flags.effects import MEGATRON, METHOD, without_effect
from megatron_sat.flags.table import table
from tests.helpers.command_line import LADDER, refusal, run


def test_all_that_is_idle_in_a_dense_run_is_named_at_once(capsys):
    assert refusal(capsys, "--sat-importance wanda --sat-rungs 5") == (
        "error: --sat-rungs, --sat-importance have no effect with --sat-schedule none, which is dense; "
        "leave them out"
    )


def test_a_reduction_of_what_is_kept_is_refused_where_everything_is(capsys):
    said = refusal(capsys, "--sat-sparse-reduce", ranks=2)
    assert said == (
        "error: --sat-sparse-reduce has no effect with --sat-schedule none, which leaves no neuron out; leave it out"
    )


def test_a_rate_without_a_schedule_is_refused_with_the_schedules(capsys):
    assert refusal(capsys, "--sat-omission-rate 0.5").startswith(
        "error: --sat-omission-rate has no effect with --sat-schedule none, got 1/2; drop it or choose one of"
    )


@pytest.mark.parametrize(
    ("more", "without", "said"),
    [
        (
            "--sat-selection top-k --sat-temperature 0.1",
            "",
            "--sat-temperature has no effect with --sat-selection top-k",
        ),
        ("--sat-selection top-k --sat-seed 1", "", "--sat-seed has no effect with --sat-selection top-k"),
        (
            "--sat-swiglu-score up --squared-relu",
            "--swiglu",
            "--sat-swiglu-score has no effect without --swiglu",
        ),
        (
            "--sat-importance uniform --sat-swiglu-score up",
            "",
            "--sat-swiglu-score has no effect with --sat-importance",
        ),
        ("--sat-importance contribution --sat-swiglu-score up", "", "--sat-swiglu-score has no effect with"),
        ("--sat-importance magnitude --sat-statistics lagged", "", "--sat-statistics has no effect with"),
        ("--sat-importance uniform --sat-dp-selection local", "", "--sat-dp-selection has no effect with"),
        (
            "--sat-modules attention --sat-swiglu-score up",
            "",
            "--sat-swiglu-score has no effect with --sat-modules attention, which omits no channel",
        ),
        (
            "--sat-modules attention --sat-channel-multiple 8",
            "",
            "--sat-channel-multiple has no effect with --sat-modules attention, which omits no channel",
        ),
        ("--sat-modules mlp --sat-gqa head", "", "--sat-gqa has no effect with --sat-modules mlp, which omits no head"),
        (
            "--sat-gqa head",
            "--group-query-attention --num-query-groups",
            "--sat-gqa has no effect without --group",
        ),
        (
            "--sat-gqa group --num-query-groups 8",
            "",
            "--sat-gqa has no effect without --group-query-attention and fewer",
        ),
    ],
)
def test_a_setting_of_the_method_without_effect_is_refused(capsys, more, without, said):
    answer = refusal(capsys, f"{LADDER} {more}", without=without)
    assert answer.startswith(f"error: {said}")
    assert answer.endswith("; leave it out")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "--use-mcore-models",
            "--use-mcore-models does nothing here: newer releases of Megatron do this always",
        ),
        (
            "--no-async-tensor-model-parallel-allreduce",
            "--no-async-tensor-model-parallel-allreduce does nothing here",
        ),
        (
            "--transformer-impl transformer_engine",
            "--transformer-impl transformer_engine does nothing here: ",
        ),
        (
            "--attention-softmax-in-fp32",
            "--attention-softmax-in-fp32 does nothing here: attention is flash-attn's or",
        ),
        ("--no-masked-softmax-fusion", "--no-masked-softmax-fusion does nothing here"),
        (
            "--timing-log-level 2",
            "--timing-log-level 2 does nothing here: console, TensorBoard and JSONL have",
        ),
        ("--profile-ranks 0 1", "--profile-ranks 0 1 does nothing here: no profiler is attached"),
        (
            "--attention-backend fused",
            "--attention-backend fused means auto here: flash-attn where it is installed",
        ),
        ("--sequence-parallel", "--sequence-parallel has no effect at --tensor-model-parallel-size 1"),
        ("--rope-scaling-factor 4", "--rope-scaling-factor 4.0 has no effect without --use-rope-scaling"),
        ("--lr-wsd-decay-iters 5", "--lr-wsd-decay-iters 5 has no effect without --lr-decay-style WSD"),
        ("--save-interval 10", "--save-interval 10 has no effect without --save"),
        ("--async-save", "--async-save has no effect without --save"),
        ("--no-load-optim", "--no-load-optim has no effect without --load"),
        ("--no-openai-gelu", "--no-openai-gelu has no effect with --swiglu, --squared-relu or --quick-geglu"),
    ],
)
def test_a_setting_of_megatrons_without_effect_is_remarked_upon_once(more, said):
    remarks = run(more).remarks
    assert len(remarks) == 1
    assert remarks[0].startswith(said)


def test_query_groups_that_megatron_would_pass_over_are_remarked_upon():
    remarks = run(without="--group-query-attention").remarks
    assert remarks == ("--num-query-groups 4 has no effect without --group-query-attention",)


def test_a_script_without_idle_settings_has_no_remarks():
    assert run(LADDER).remarks == ()


def test_what_has_no_effect_is_not_part_of_the_settings():
    config = run(f"{LADDER} --sat-selection top-k")
    assert {"sat_temperature", "sat_seed", "rope_scaling_factor", "sgd_momentum"}.isdisjoint(config.settings)
    assert without_effect({**{f.key: f.default for f in table().working}, **config.settings}).isdisjoint(
        config.settings
    )


def test_every_rule_speaks_of_settings_that_exist():
    keys = table().flags.keys()
    for rule in (*METHOD, *MEGATRON):
        for pattern in rule.keys.split():
            matcher = re.compile(pattern.replace("[!", "[^").replace("*", ".*"))
            late = ("flash", "lion_", "soap_", "adaptive_muon_")  # fields of megatron-core 0.19
            assert pattern.startswith(late) or any(matcher.fullmatch(key) for key in keys), pattern
