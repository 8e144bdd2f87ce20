"""The plan's numbers against the same run walked step by step, and what it says of quotas."""

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from megatron_sat.layers.attach import attach_selectors
from megatron_sat.model.flops import ModelShape, Recompute, choice_flops, kept_shape, step_flops, whole
from megatron_sat.plan import MAX_ROWS, PassedBy, Plan, build_plan, show
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import Schedule, ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.counting import as_causal, by_product, counting
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import SEQ, VOCAB, batch, layout, losses, tiny_chunks

LLAMA_7B = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32, kv_channels=128,
    ffn_hidden_size=11008, gated=True, padded_vocab_size=32000, seq_length=4096,
)  # fmt: skip
GROUPED = replace(LLAMA_7B, num_query_groups=8)
TOKENS = 1024 * 4096
CHOICE = choice_flops(LLAMA_7B, importance="maxip", tokens=4096, replicas=4)


def schedule_of(kind: str, rate: Fraction | None = None, **fields: Any) -> Schedule:
    return build_schedule(ScheduleConfig(kind=kind, omission_rate=rate, **fields))


def pre_training() -> Schedule:
    return schedule_of("ladder", Fraction(1, 2), start=2000, rungs=5, train_iters=3000)


def plan_of(schedule: Schedule, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "shape": LLAMA_7B,
        "selection_groups": 1,
        "channel_multiple": 1,
        "gqa": "group",
        "tokens_per_step": TOKENS,
        "recompute": Recompute(),
        "choice_flops": CHOICE,
        "epochs": {},
    }
    return build_plan(schedule, **settings | changes)


def test_totals_are_those_of_the_run_walked_step_by_step():
    schedule = pre_training()
    plan = plan_of(schedule, selection_groups=8, channel_multiple=128)

    executed = 0
    heads, channels = Fraction(0), Fraction(0)
    for step in range(1, 3001):
        kept = kept_shape(
            LLAMA_7B, schedule.rate(step), selection_groups=8, channel_multiple=128, gqa="group"
        )
        executed += step_flops(LLAMA_7B, kept, tokens=TOKENS) + (CHOICE if schedule.rate(step) else 0)
        heads += 1 - Fraction(kept.heads, 32)
        channels += 1 - Fraction(kept.channels, 11008)
    dense = 3000 * step_flops(LLAMA_7B, whole(LLAMA_7B), tokens=TOKENS)
    assert (plan.flops, plan.dense_flops, plan.steps, plan.tokens) == (executed, dense, 3000, 3000 * TOKENS)
    assert plan.time_saving_bound == 1 - executed / dense
    assert plan.mean_omitted() == {
        "nominal": float(schedule.mean_rate()),
        "heads": float(heads / 3000),
        "channels": float(channels / 3000),
    }


@pytest.mark.parametrize(("until", "cut"), [(3, (3, 6, 9)), (6, (6, 9)), (7, (6, 7, 9)), (9, (6, 9))])
def test_layers_that_come_back_cut_a_rung(until: int, cut: tuple[int, ...]):
    """A rate until step 6 of 9, and half of the layers out until another."""
    schedule = schedule_of("ladder", Fraction(1, 2), start=6, rungs=1, train_iters=9)
    plan = plan_of(schedule, passed_by=PassedBy(layers=16, until=until), choice_flops=0)
    assert tuple(planned.rung.last for planned in plan.rungs) == cut
    logits = step_flops(replace(LLAMA_7B, num_layers=1), whole(LLAMA_7B), tokens=TOKENS) * 2
    logits -= step_flops(replace(LLAMA_7B, num_layers=2), whole(LLAMA_7B), tokens=TOKENS)
    executed = 0
    for step in range(1, 10):
        kept = kept_shape(LLAMA_7B, schedule.rate(step), selection_groups=1, channel_multiple=1, gqa="group")
        layers = step_flops(LLAMA_7B, kept, tokens=TOKENS) - logits
        executed += layers // (2 if step <= until else 1) + logits
        omitted = 1 - (1 - schedule.rate(step)) * (Fraction(1, 2) if step <= until else 1)
        assert plan.at(step).heads_omitted == plan.at(step).channels_omitted == omitted
    assert plan.flops == executed
    assert [planned.kept.layers_left_out for planned in plan.rungs] == [16 * (last <= until) for last in cut]


def test_what_the_page_on_baselines_says_of_ests_saving():
    """Rates of a half, 2/15 of the steps without half of the layers, and 1/3 more: 26.7 % of the layers' operations."""
    schedule = schedule_of("ladder", Fraction(1, 2), start=70, rungs=1, train_iters=150)
    shape = replace(LLAMA_7B, padded_vocab_size=1)  # no logits to speak of
    plan = plan_of(schedule, shape=shape, passed_by=PassedBy(layers=16, until=20), choice_flops=0)
    assert plan.time_saving_bound == pytest.approx(0.267, abs=5e-4)
    assert "steps 1-20 leave out 16 of 32 layers, others in each; heads and channels are of the rest" in plan.lines()


def count_run(_: int, start: int, end: int) -> list[int]:
    """Train a tiny sparse model through a ladder on two ranks; torch's count of each step."""
    there = layout(tp=2)
    (chunk,) = tiny_chunks()
    selection = SelectionConfig(importance="uniform", selection_groups=2, channel_multiple=8)
    attach_selectors([chunk], config=selection, layout=there)
    schedule = schedule_of("ladder", Fraction(1, 2), start=start, rungs=3, train_iters=end)
    controller = Controller(sparse_modules([chunk]), schedule=schedule, interval=1)
    counts = []
    for step in range(1, end + 1):
        with controller.step(step), counting() as counter:
            losses(chunk, *batch(step, 2)).mean().backward()
        counts.append(as_causal(by_product(counter), seq=SEQ))
    return counts


def test_every_step_of_a_run_computes_what_its_plan_said():
    ranks = run_ranks(count_run, 2, 2, 10)

    schedule = schedule_of("ladder", Fraction(1, 2), start=2, rungs=3, train_iters=10)
    shape = ModelShape(
        num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=4, kv_channels=8,
        ffn_hidden_size=96, gated=True, padded_vocab_size=VOCAB, seq_length=SEQ,
    )  # fmt: skip
    settings = {"selection_groups": 2, "channel_multiple": 8, "choice_flops": 0, "tokens_per_step": 2 * SEQ}
    plan = plan_of(schedule, shape=shape, **settings)
    planned = [rung.flops for rung in plan.rungs for _ in range(rung.rung.steps)]
    assert [sum(step) for step in zip(*ranks, strict=True)] == planned
    assert len(set(planned)) == 4  # four rungs, four costs


def test_the_papers_bounds_are_found_where_quotas_do_not_bite():
    """Means of 0.361 and 0.480 give 1.57x and 1.92x, were logits free and 32 heads divisible at will."""
    tuning = schedule_of("ladder", Fraction(24, 25), start=600, rungs=1, train_iters=1200)
    no_logits = replace(LLAMA_7B, padded_vocab_size=1)

    plans = [plan_of(schedule, shape=no_logits) for schedule in (pre_training(), tuning)]
    speeds = [1 / (1 - plan.time_saving_bound) for plan in plans]
    assert speeds == pytest.approx([1.57, 1.92], abs=0.01)


def test_each_rung_shows_its_steps_and_its_effective_rates_on_eight_ranks():
    plan = plan_of(pre_training(), selection_groups=8)

    heads, channels = "heads of 32 (omitted)", "channels of 11008 (omitted)"
    assert plan.columns() == ["steps", "number", "rate", heads, channels, "PFLOP/step", "share"]
    rows = plan.rows()
    assert rows[0] == ["1-2000", 2000, "0.5", "16 (0.5)", "5504 (0.5)", "91.54", "0.509"]
    assert [row[2] for row in rows] == ["0.5", "0.4", "0.3", "0.2", "0.1", "0"]
    assert [row[3] for row in rows] == ["16 (0.5)"] * 3 + ["24 (0.25)"] * 2 + ["32 (0)"]
    assert plan.rungs[1].kept.channels == 8 * (1376 * 6 // 10)
    assert rows[-1][-1] == "1.000"


def test_rungs_that_keep_the_same_heads_on_eight_ranks_are_named():
    (warning,) = plan_of(pre_training(), selection_groups=8).warnings

    same = "heads: rates 0.5, 0.4, 0.3 all keep 16 of 32 and rates 0.2, 0.1 all keep 24 of 32"
    assert warning.startswith(f"{same}, for a quota is of 4 heads; fewer --sat-selection-groups")
    assert plan_of(pre_training(), selection_groups=1).warnings == ()


def test_coarse_channel_multiples_are_warned_of_like_heads():
    (warning,) = plan_of(pre_training(), selection_groups=1, channel_multiple=2048).warnings

    same = "channels: rates 0.4, 0.3 all keep 6144 of 11008 and rates 0.2, 0.1 all keep 8192 of 11008"
    assert warning.startswith(
        f"{same}, for a quota is of 11008 channels in multiples of 2048; rates that are"
    )
    assert warning.endswith("a smaller --sat-channel-multiple makes them finer")


@pytest.mark.parametrize(("groups", "heads", "omitted"), [(1, 1, 0.969), (2, 2, 0.938), (8, 8, 0.75)])
def test_fine_tuning_at_96_percent_keeps_one_head_a_rank_and_says_so(groups, heads, omitted):
    schedule = schedule_of("ladder", Fraction(24, 25), start=600, rungs=1, train_iters=1200)
    plan = plan_of(schedule, selection_groups=groups)

    assert plan.rows()[0][3] == f"{heads} ({omitted})"
    # 4 percent of 32 heads are 1.28: one quota keeps one of them by rounding, smaller ones one each anyway
    said = f"nothing would stay of a quota ({32 // groups} heads), so its least part does: {heads} of 32"
    assert any(said in warning for warning in plan.warnings) == (groups > 1)


def test_one_head_a_group_cannot_leave_by_head_and_the_plan_says_so():
    plan = plan_of(schedule_of("constant", Fraction(1, 2), train_iters=10), gqa="head")

    assert plan.mean_omitted()["heads"] == 0.0
    assert "heads: at rate 0.5 nothing would stay of a quota (1 head)" in plan.warnings[0]
    assert "--sat-gqa group omits whole query groups instead" in plan.warnings[0]


def test_grouped_queries_are_counted_in_groups_or_in_heads_of_a_group():
    schedule = schedule_of("constant", Fraction(1, 2), train_iters=10)

    assert plan_of(schedule, shape=GROUPED, selection_groups=4).quotas == ("2 query groups", "2752 channels")
    assert plan_of(schedule, shape=GROUPED, gqa="head").quotas == ("4 heads", "11008 channels")


def test_layers_that_stay_whole_are_counted_and_named():
    plan = plan_of(pre_training(), modules="mlp", whole_layers=8)
    sparse = plan.at(1)
    assert (sparse.kept.heads, sparse.kept.channels, sparse.kept.whole_layers) == (32, 5504, 8)
    assert (sparse.heads_omitted, sparse.channels_omitted) == (0, Fraction(24, 32) / 2)
    assert plan.at(3000).kept == plan.whole
    assert "4 layers at each end omit nothing; the table is of those between them" in plan.lines()
    assert not any("omit nothing" in line for line in plan_of(pre_training()).lines())


def test_recomputation_adds_to_the_run_and_to_its_dense_twin_alike():
    schedule = schedule_of("constant", Fraction(1, 2), train_iters=10)
    plain = plan_of(schedule, choice_flops=0)
    recomputed = plan_of(schedule, choice_flops=0, recompute=Recompute(parts=("full",)))

    assert recomputed.flops > plain.flops
    assert recomputed.time_saving_bound == pytest.approx(plain.time_saving_bound, abs=0.01)


def test_choosing_is_paid_only_where_something_is_omitted():
    plan = plan_of(pre_training())

    assert [planned.choice_flops for planned in plan.rungs] == [CHOICE] * 5 + [0]
    assert plan.flops - plan_of(pre_training(), choice_flops=0).flops == 2483 * CHOICE


def test_a_dense_run_is_planned_as_dense():
    plan = plan_of(schedule_of("none", train_iters=7))

    assert plan.time_saving_bound == 0.0
    assert plan.lines()[1:] == ["dense: 1.259 EFLOP, no neuron is ever omitted"]
    assert [row[:5] for row in plan.rows()] == [["1-7", 7, "0", "32 (0)", "11008 (0)"]]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_rung_a_step_is_shown_in_few_rows_that_cover_all_steps(kind):
    plan = plan_of(schedule_of(kind, Fraction(1, 2), start=2000, train_iters=3000), selection_groups=8)
    rows = plan.rows()

    assert len(plan.rungs) > 900
    assert len(rows) <= MAX_ROWS
    assert rows[0][0] == "1-2000"
    assert rows[-1][0].split("-")[1] == "3000"
    assert sum(row[1] for row in rows) == 3000
    assert rows[-1][2].endswith(" to 0")
    assert plan.warnings == ()


def test_the_text_under_the_table_carries_tokens_epochs_and_the_bound():
    lines = plan_of(pre_training(), epochs={"zh": 1.234, "en": 0.1}).lines()

    assert lines[0] == "3,000 steps of 4,194,304 tokens: 12,582,912,000 tokens; epochs: zh 1.23, en 0.10"
    assert lines[1].startswith("mean omission 0.361; effective 0.36")
    assert lines[2].endswith("choosing neurons is less than 0.01% of it")
    assert lines[3].startswith("time saved over a dense run: at most 35.")


def test_a_dear_choice_is_told_in_percent():
    plan = plan_of(pre_training(), choice_flops=10**16)

    assert plan.lines()[2].endswith(f"choosing neurons is {2483 * 10**18 / plan.flops:.2f}% of it")


def test_the_plan_survives_json_and_holds_exact_rates():
    plan = plan_of(pre_training(), selection_groups=8, epochs={"zh": 1.5})
    read = json.loads(json.dumps(plan.as_dict()))

    assert read == plan.as_dict()
    assert [rung["rate_exact"] for rung in read["rungs"]] == ["1/2", "2/5", "3/10", "1/5", "1/10", "0"]
    assert read["executed_flops"] == sum(
        rung["steps"] * (rung["step_flops"] + rung["choice_flops"]) for rung in read["rungs"]
    )
    assert read["epochs"] == {"zh": 1.5}
    assert len(read["warnings"]) == 1


def test_the_plan_is_shown_with_its_quotas_rungs_and_warnings(capsys):
    show(plan_of(pre_training(), selection_groups=8, channel_multiple=128))

    said = " ".join(capsys.readouterr().out.split())
    assert "plan (quotas: 4 heads, 1376 channels in multiples of 128)" in said
    assert "2097-2225" in said
    assert "warning: heads: rates 0.5, 0.4, 0.3" in said


def test_selection_groups_that_do_not_fit_the_model_stop_the_plan():
    with pytest.raises(ValueError, match=r"--sat-selection-groups \(16\) must divide the query groups \(8\)"):
        plan_of(pre_training(), shape=GROUPED, selection_groups=16)
