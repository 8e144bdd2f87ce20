"""When a selector measures and chooses, and when it reuses or forgets: by a record of what it asked for."""

from fractions import Fraction
from itertools import pairwise

import pytest

from megatron_sat.sparsity.importance import METRICS
from tests.helpers.choosing import HALF, SmallModule, choose, in_step, tokens_of

QUARTER = Fraction(1, 4)


def test_the_first_forward_of_a_fresh_step_chooses_and_later_ones_reuse_it():
    module = SmallModule()
    with in_step(module, 1):
        chosen = [module.forward(tokens_of(number)) for number in (1, 2, 1)]

    assert chosen[0] == chosen[1] == chosen[2]
    assert module.asked == ["inputs"]
    assert choose(SmallModule(), number=2) != chosen[0]


def test_every_fresh_step_measures_its_own_tokens_and_draws_its_own_noise():
    uniform = SmallModule(importance="uniform")  # noise alone
    top_k = SmallModule(selection="top-k")  # tokens alone

    assert choose(uniform, 1) != choose(uniform, 2)
    assert choose(top_k, 1, number=1) != choose(top_k, 2, number=2)
    assert choose(top_k, 3, number=1) == choose(top_k, 4, number=1)


def test_a_choice_is_held_for_an_interval_and_changes_at_the_next():
    module = SmallModule()
    chosen = [choose(module, step, number=step, interval=3) for step in range(1, 10)]

    runs = [chosen[at : at + 3] for at in (0, 3, 6)]
    assert all(run[0] == run[1] == run[2] for run in runs)
    assert all(before[2] != after[0] for before, after in pairwise(runs))
    assert len(module.asked) == 3


def test_a_rung_edge_inside_an_interval_keeps_what_was_kept_and_more():
    module = SmallModule(importance="uniform", selection_groups=1)
    rates = [Fraction(3, 4), HALF, HALF, QUARTER]
    chosen = [set(choose(module, step, rate=rate, interval=4) or []) for step, rate in enumerate(rates, 1)]

    assert [len(units) for units in chosen] == [4, 8, 8, 12]
    assert chosen[0] < chosen[1] == chosen[2] < chosen[3]
    assert not module.asked  # uniform needs no token of any rank
    other_noise = set(choose(module, 5, interval=4) or [])
    assert not chosen[0] <= other_noise


def test_a_rung_that_keeps_as_many_units_keeps_the_same_ones():
    module = SmallModule("attention", selection_groups=4)  # quotas of 2 groups: all rates from .01 keep 1
    first = choose(module, 1, rate=HALF, interval=10)

    assert choose(module, 2, number=2, rate=Fraction(4, 10), interval=10) == first
    assert len(module.asked) == 1


def test_a_lagged_step_chooses_before_any_forward_from_the_step_before():
    lagged = SmallModule(statistics="lagged")
    choose(lagged, 1, number=7)
    with in_step(lagged, 2) as selector:
        early = selector.choice
        assert early is not None
        chosen = [lagged.forward(tokens_of(number)) for number in (8, 9)]

    assert chosen == [early.index.tolist()] * 2
    assert chosen[0] == choose(SmallModule(), 2, number=7)
    assert chosen[0] != choose(SmallModule(), 2, number=8)
    assert lagged.asked == ["inputs"] * 2  # once a step, for the next


def test_the_first_lagged_step_falls_back_to_its_own_first_micro_batch():
    lagged = SmallModule(statistics="lagged")
    with in_step(lagged, 1) as selector:
        assert selector.choice is None
        chosen = lagged.forward(tokens_of(7))

    assert chosen == choose(SmallModule(), 1, number=7)
    assert lagged.asked == ["inputs"]


def test_a_lagged_step_measures_only_when_the_next_one_chooses():
    lagged = SmallModule(statistics="lagged", importance="contribution")
    measured = []
    for step in range(1, 8):
        choose(lagged, step, number=step, interval=3)
        measured.append(lagged.dense_forwards)

    assert measured == [1, 1, 2, 2, 2, 3, 3]  # step 1 chooses; 3 and 6 measure for 4 and 7


def test_a_lagged_step_measures_at_its_first_forward_alone():
    once, again = (SmallModule(statistics="lagged") for _ in range(2))
    for module, numbers in ((once, [5]), (again, [5, 6, 5])):
        choose(module, 1)
        with in_step(module, 2):
            for number in numbers:
                module.forward(tokens_of(number))

    assert choose(once, 3) == choose(again, 3)
    assert len(again.asked) == 3


def test_a_lagged_step_before_a_dense_one_measures_nothing():
    lagged = SmallModule(statistics="lagged")
    choose(lagged, 1)
    choose(lagged, 2, next_rate=Fraction(0))

    assert len(lagged.asked) == 1


def test_lagged_sums_older_than_a_step_are_never_used():
    lagged = SmallModule(statistics="lagged")
    choose(lagged, 1, number=7)
    choose(lagged, 2, rate=Fraction(0))  # a dense step in between: its sums would be step 1's

    assert choose(lagged, 3, number=8) == choose(SmallModule(), 3, number=8)


@pytest.mark.parametrize("importance", ["uniform", "magnitude"])
def test_a_lagged_metric_of_weights_alone_chooses_before_any_forward_even_in_the_first_step(importance):
    lagged, fresh = (SmallModule(statistics=kind, importance=importance) for kind in ("lagged", "fresh"))
    early = []
    for step in (1, 2):
        with in_step(lagged, step) as selector:
            assert selector.choice is not None
            early.append(selector.choice.index.tolist())
            assert lagged.forward(tokens_of(step)) == early[-1]

    assert early == [choose(fresh, step) for step in (1, 2)]
    assert lagged.asked == []


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
def test_rate_zero_keeps_everything_and_looks_at_nothing(statistics):
    module = SmallModule(importance="contribution", statistics=statistics, rescale="inverse-keep")
    with in_step(module, 1, rate=Fraction(0)) as selector:
        assert module.forward(tokens_of(1)) is None
        assert selector.keeps_all
        assert selector.output_scale == 1.0

    assert (module.asked, module.dense_forwards) == ([], 0)


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
def test_outside_a_step_everything_is_kept_and_nothing_looked_at(statistics):
    module = SmallModule(importance="contribution", statistics=statistics, rescale="inverse-keep")
    assert module.forward(tokens_of(1)) is None
    choose(module, 1)
    looked = module.dense_forwards

    assert module.forward(tokens_of(1)) is None
    assert (module.chooser.choice, module.chooser.keeps_all, module.chooser.output_scale) == (None, True, 1.0)
    assert module.dense_forwards == looked == 1


def test_before_its_first_forward_a_step_has_no_choice_though_the_last_one_had():
    module = SmallModule()
    choose(module, 1)
    with in_step(module, 2) as selector:
        assert selector.choice is None
        assert not selector.keeps_all


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
def test_weights_that_are_still_on_their_way_are_waited_for_before_they_are_scored(statistics):
    settings = {"importance": "magnitude", "selection": "top-k", "statistics": statistics}
    late, whole = SmallModule(**settings), SmallModule(**settings)
    late.late = whole.column.detach().clone()
    late.column.data.zero_()

    assert choose(late) == choose(whole)


def test_weights_are_waited_for_once_a_choice_and_at_no_other_time():
    module = SmallModule()
    module.chooser.load_state(module.chooser.state())
    for step in range(1, 5):
        with in_step(module, step, interval=2):
            module.forward(tokens_of(step))
            module.forward(tokens_of(step))
    choose(module, 5, rate=Fraction(0))
    module.forward(tokens_of(1))

    assert module.arrivals == 2


@pytest.mark.parametrize("importance", METRICS)
def test_only_contribution_pays_a_dense_forward_and_one_alone(importance):
    module = SmallModule(importance=importance)
    with in_step(module, 1):
        module.forward(tokens_of(1))
        module.forward(tokens_of(2))

    assert module.dense_forwards == (1 if importance == "contribution" else 0)


def test_a_choice_holds_no_graph():
    module = SmallModule()
    with in_step(module, 1) as selector:
        module.forward(tokens_of(1).requires_grad_())
        assert selector.choice is not None
        assert not selector.choice.index.requires_grad
