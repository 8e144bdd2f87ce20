"""Predictions beside measurements: what is compared with what, and how the error is counted."""

from fractions import Fraction

import pytest

from megatron_sat.estimate.accuracy import compare_layers, compare_runs, compare_steps, exact, kind_of

SIZE = {"model": "tiny"}


def test_the_error_is_over_what_was_measured():
    rows = [{"rate": 0.5, "weights": "compact", "seconds": 2.0}]
    (found,) = compare_steps(rows, predict=lambda _: 1.5)
    assert (found.what, found.predicted, found.measured, found.error) == ("step at rate 0.5", 1.5, 2.0, -0.25)


def test_each_rate_is_predicted_exactly_and_what_is_not_ours_is_left_out():
    asked: list[Fraction] = []
    rows = [{"rate": 0.0, "weights": "dense", "seconds": 1.0}, {"rate": 0.96, "weights": "compact", "seconds": 1.0}]
    others = [{**row, "weights": weights} for row, weights in zip(rows, ("plain, fp32", "gather"), strict=True)]
    found = compare_steps([*rows, *others], predict=lambda rate: asked.append(rate) or 1.0)
    assert (len(found), asked) == (2, [Fraction(0), Fraction(24, 25)])
    assert exact(1 / 3) == Fraction(1, 3)


def test_layers_are_predicted_by_model_tokens_and_rate():
    rows = [
        {"model": "tiny", "tokens": tokens, "rate": 0.5, "weights": weights, "layer_seconds": 1e-3}
        for tokens in (64, 128)
        for weights in ("compact", "plain")
    ]
    found = compare_layers(rows, predict=lambda model, tokens, rate: tokens * float(rate) * 1e-5)
    assert [each.what for each in found] == [f"layer of tiny, {tokens} tokens, rate 0.5" for tokens in (64, 128)]
    assert [each.error for each in found] == pytest.approx([-0.68, -0.36])


def run_of(*rungs: tuple[float, list[float]]) -> list[dict[str, float]]:
    return [{"nominal_omission_rate": rate, "step_seconds": each} for rate, seconds in rungs for each in seconds]


def test_a_run_is_compared_by_the_steady_steps_of_its_rungs_and_by_their_sum():
    """Rate .25 has too few steps behind those of its change to tell."""
    short, dense = (0.25, [7.0, 3.0, 3.0, 3.0]), (0.0, [5.0, 6.0, 4.0, 4.0, 4.0, 4.0])
    records = run_of((0.5, [9.0, 4.0, 2.0, 1.0, 6.0]), short, dense)
    found = compare_runs({"cpt": records}, predict=lambda rate: 4.0 - 2 * float(rate))
    assert [(each.what, each.predicted, each.measured, each.beyond) for each in found] == [
        ("cpt: step at rate 0.5", 3.0, 2.0, None),
        ("cpt: step at rate 0", 4.0, 4.0, None),
        ("cpt: 11 of 15 steps", 5 * 3.0 + 6 * 4.0, 5 * 2.0 + 6 * 4.0, (22 - 5 * 2.0) + (27 - 6 * 4.0)),
    ]


def test_a_run_whose_rungs_are_all_too_short_has_nothing_to_compare():
    assert compare_runs({"cpt": run_of((0.5, [1.0] * 4), (0.0, [1.0] * 4))}, predict=lambda _: 1.0) == []


def test_a_file_is_known_by_what_it_holds():
    assert kind_of({"size": SIZE, "rows": [{"seconds": 1.0}]}) == "step"
    assert kind_of({"rows": [{"layer_seconds": 1.0}]}) == "layer"
    assert kind_of({"size": SIZE, "rows": [], "runs": {"dense": []}}) == "ladder"


OTHERS = [
    {},
    {"rows": []},
    {"rows": [{"seconds": 1.0}]},
    {"rows": [{"bytes": 1}], "size": SIZE},
    {"rows": [{"seconds": 1.0}], "size": SIZE, "runs": {"sft": [{"step_seconds": 1.0}]}},  # of which rate?
    {"rows": [], "runs": {"sft": run_of((0.5, [1.0]))}},
]


@pytest.mark.parametrize("found", OTHERS)
def test_another_file_is_refused(found):
    with pytest.raises(ValueError, match="--compare must be what bench_step, bench_ladder or bench_layer wrote, with"):
        kind_of(found)
