"""Contradictions of the method's own settings, each refused before the first step."""

import pytest

from tests.helpers.command_line import LADDER, refusal, run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--sat-omission-rate 1.0", "--sat-omission-rate must be in [0, 1), got 1"),
        ("--sat-omission-rate -0.1", "--sat-omission-rate must be in [0, 1), got -0.1"),
        ("--sat-omission-rate half", "--sat-omission-rate must be a number such as 0.5 or 1/2, got 'half'"),
        (
            "--sat-schedule-start 101",
            "--sat-schedule-start must be between 0 and --train-iters (100), got 101",
        ),
        ("--sat-schedule-start -1", "--sat-schedule-start must be between 0 and --train-iters (100), got -1"),
        ("--sat-rungs 0", "--sat-rungs must be at least 1, got 0"),
        ("--sat-schedule constant", "--sat-schedule-start has no effect with --sat-schedule constant"),
        ("--sat-importance wandah", "--sat-importance must be one of uniform, magnitude, wanda, maxip"),
        ("--sat-temperature 0", "--sat-temperature must be above 0, got 0.0"),
        (
            "--sat-selection-interval 101",
            "--sat-selection-interval (101) must be at most --train-iters (100); 100",
        ),
        ("--sat-selection-interval 0", "--sat-selection-interval must be at least 1, got 0"),
        ("--sat-modules heads", "--sat-modules must be one of all, attention, mlp, got 'heads'"),
        ("--sat-omit forward", "--sat-omit must be one of both, backward, weight-gradient, got 'forward'"),
        (
            "--sat-omit weight-gradient --sat-rescale inverse-keep",
            "--sat-rescale must be none with --sat-omit weight-gradient, got inverse-keep: nothing is missing",
        ),
        (
            "--sat-omit backward --sat-rescale inverse-keep",
            "--sat-rescale must be none with --sat-omit backward, got inverse-keep: nothing is missing",
        ),
        ("--sat-whole-ends -1", "--sat-whole-ends must be at least 0, got -1"),
        (
            "--sat-whole-ends 2",
            "--sat-whole-ends (2) at both ends must leave some of the 4 layers; lower it below 2",
        ),
        ("--sat-selection-groups 0", "--sat-selection-groups must be at least 1, got 0"),
        ("--sat-channel-multiple 0", "--sat-channel-multiple must be at least 1, got 0"),
        ("--sat-selection-groups 8", "--sat-selection-groups (8) must divide --num-query-groups (4); try"),
        (
            "--sat-selection-groups 8 --sat-gqa head --ffn-hidden-size 180",
            "--sat-selection-groups (8) must divide --ffn-hidden-size (180); try --sat-selection-groups 4",
        ),
        (
            "--sat-channel-multiple 128 --sat-selection-groups 2",
            "--sat-channel-multiple (128) must be at most the channels of a selection group (88); lower it",
        ),
        (
            "--sat-importance uniform --sat-selection top-k",
            "--sat-selection top-k needs scores that differ, got --sat-importance uniform",
        ),
        ("--sat-dp-selection local", "--sat-dp-selection local has no effect with one replica; leave it out"),
        (
            "--sat-sparse-reduce",
            "--sat-sparse-reduce has no effect with one replica and --context-parallel-size 1, where no gradient is",
        ),
        (
            "--sat-weights compact --no-gradient-accumulation-fusion",
            "--sat-weights compact needs --gradient-accumulation-fusion, got it off",
        ),
        (
            "--sat-omitted-neurons frozen --optimizer sgd",
            "--sat-omitted-neurons frozen needs --optimizer adam, got sgd",
        ),
    ],
)
def test_a_method_that_cannot_be_is_refused(capsys, more, said):
    assert refusal(capsys, f"{LADDER} {more}").startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ("--sat-schedule ladder", "--sat-omission-rate"),
        ("--sat-schedule ladder --sat-omission-rate 0.5", "--sat-schedule-start"),
        ("--sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 60", "--sat-rungs"),
        ("--sat-schedule cosine --sat-omission-rate 0.5", "--sat-schedule-start"),
    ],
)
def test_a_schedule_without_its_numbers_is_refused(capsys, more, missing):
    said = refusal(capsys, more)
    assert f"needs {missing}, which is not given; add it" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--sat-omitted-neurons frozen", "--sat-omitted-neurons frozen needs --sat-dp-selection shared, got local"),
        ("--sat-selection-interval 2", "--sat-dp-selection local needs --sat-selection-interval 1"),
        ("--sat-statistics lagged", "--sat-dp-selection local needs --sat-selection-interval 1"),
        ("--sat-sparse-reduce", "--sat-sparse-reduce needs --sat-dp-selection shared, got local: replicas would send"),
    ],
)
def test_replicas_that_choose_for_themselves_must_neither_drift_apart_nor_forget(capsys, more, said):
    assert refusal(capsys, f"{LADDER} --sat-dp-selection local {more}", ranks=2).startswith(f"error: {said}")


@pytest.mark.parametrize(("layout", "ranks"), [("", 2), ("--context-parallel-size 2", 2)])
def test_gradients_are_reduced_between_replicas_and_between_parts_of_a_sequence(layout, ranks):
    assert run(f"{LADDER} --sat-sparse-reduce {layout}", ranks=ranks).sparse_reduce
    assert not run(f"{LADDER} {layout}", ranks=ranks).sparse_reduce


def test_selection_groups_that_tensor_parallelism_does_not_divide_are_refused(capsys):
    said = refusal(capsys, f"{LADDER} --tensor-model-parallel-size 2 --sat-selection-groups 1", ranks=2)
    assert said == ("error: --sat-selection-groups (1) must be a multiple of --tensor-model-parallel-size (2); try 2")


def test_heads_may_leave_singly_under_more_selection_groups_than_query_groups():
    config = run(f"{LADDER} --sat-selection-groups 8 --sat-gqa head")
    assert config.selection.selection_groups == 8
