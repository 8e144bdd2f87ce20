"""What a run writes into its books is what its plan said and what torch counts while it computes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_sat.model.flops import step_flops, whole
from megatron_sat.plan import Plan
from tests.helpers.counting import as_causal, by_product, counting
from tests.helpers.program import LADDER, Text, open_session, read_records, trained
from tests.helpers.ranks import run_ranks

STEPS = 7
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
UNIFORM = f"{LADDER} --sat-importance uniform"
"""A choice that costs no product."""


class Counted(NamedTuple):
    """Of one rank."""

    products: list[int]
    """Operations of each step, by torch's counter."""
    kept: list[dict[str, int]]
    """Of each step, by "kind.layer", units of this rank that took part."""
    plan: Plan


def count(_: int, argv: list[str]) -> Counted:
    session = open_session(argv)
    run, products, kept = session.run, [], []
    train_step = run.engine.train_step

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        with counting() as counter:
            result = train_step(*args, **kwargs)
        products.append(as_causal(by_product(counter), seq=32))
        units = {f"{s.place.kind}.{s.place.layer}": s.neurons.units for s in run.controller.selectors}
        choices = run.controller.kept().items()
        kept.append({name: len(choice.index) if choice else units[name] for name, choice in choices})
        return result

    run.engine.train_step = counted_step  # type: ignore[method-assign]
    session.train()
    return Counted(products, kept, run.plan)


CASES = {
    "one process": (1, ""),
    "tp 2, single heads": (2, f"{TP} --sat-gqa head"),
    "dp 2, uneven channels": (2, "--sat-channel-multiple 7"),
    "full recomputation": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "a layer a stage recomputed": (
        2,
        f"{PP} --recompute-granularity full --recompute-method block --recompute-num-layers 1",
    ),
    "recomputed modules": (1, "--recompute-granularity selective --recompute-modules core_attn mlp"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_computes_what_plan_and_metrics_say(case: str, text: Text, tmp_path: Path) -> None:
    ranks, flags = CASES[case]
    jsonl = tmp_path / "metrics.jsonl"
    answers = run_ranks(count, ranks, text.command(f"{UNIFORM} {flags} --log-jsonl {jsonl}"))
    plan, lines = answers[0].plan, read_records(jsonl)

    counted = [sum(step) for step in zip(*(answer.products for answer in answers), strict=True)]
    planned = [plan.at(step).flops for step in range(1, STEPS + 1)]
    totals = [line["executed_flops"] for line in lines]
    written = [after - before for before, after in zip([0, *totals], totals, strict=False)]
    assert counted == planned == written
    assert len(set(counted)) == 3  # as many rungs

    for step in range(1, STEPS + 1):
        rung, line = plan.at(step), lines[step - 1]
        assert line["nominal_omission_rate"] == float(rung.rung.rate)
        omitted = {"attention": float(rung.heads_omitted), "mlp": float(rung.channels_omitted)}
        assert line["omission_rate"] == pytest.approx(omitted)


def test_the_neurons_that_take_part_are_as_many_as_planned(text: Text) -> None:
    answers = run_ranks(count, 2, text.command(f"{UNIFORM} {TP} --sat-channel-multiple 5"))
    plan = answers[0].plan
    for step, (one, two) in enumerate(zip(answers[0].kept, answers[1].kept, strict=True), start=1):
        kept = plan.at(step).kept
        assert one == two
        assert {2 * count for name, count in one.items() if name.startswith("mlp")} == {kept.channels}
        assert {2 * count for name, count in one.items() if name.startswith("attention")} == {kept.groups}
        assert kept.heads == 2 * kept.groups
    assert [plan.at(step).kept.channels for step in (1, 4, 5)] == [40, 70, 96]  # of 48 a rank, in fives


def test_the_books_close_with_the_plans_total_choosing_included(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{LADDER} --sat-importance contribution --save {tmp_path}")
    trained(argv, tmp_path / "metrics.jsonl")
    plan = json.loads((tmp_path / "plan.json").read_text())
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    assert last["executed_flops"] == plan["executed_flops"]
    assert last["consumed_tokens"] == plan["tokens"] == STEPS * 8 * 32
    choosing = {rung["rate_exact"]: rung["choice_flops"] for rung in plan["rungs"]}
    assert choosing["0"] == 0
    assert choosing["1/2"] > 0


def test_rates_per_second_are_of_the_devices_that_computed(text: Text, tmp_path: Path) -> None:
    """Two devices: executed TFLOP/s a device, dense-equivalent ones, tokens, all over the same seconds."""
    argv = text.command(f"{UNIFORM} {TP} --log-jsonl {tmp_path / 'metrics.jsonl'}")
    (shape, plan), _ = run_ranks(shape_and_plan, 2, argv)
    for line in read_records(tmp_path / "metrics.jsonl"):
        seconds = line["step_seconds"]
        dense = step_flops(shape, whole(shape), tokens=8 * 32)
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / seconds)
        assert line["executed_tflops"] == pytest.approx(plan.at(line["step"]).flops / seconds / 2e12)
        assert line["dense_equivalent_tflops"] == pytest.approx(dense / seconds / 2e12)


def shape_and_plan(_: int, argv: list[str]) -> tuple[Any, Plan]:
    session = open_session(argv)
    session.train()
    return session.run.shape, session.run.plan
