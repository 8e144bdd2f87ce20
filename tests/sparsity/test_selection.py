"""Counts against counting, top-k against sorting, sampling against the softmax by enumeration."""

import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sat.sparsity.selection import keep_count, select
from tests.helpers.noise import gumbel_noise
from tests.helpers.reference import literal_keep_count, literal_select, subset_probabilities
from tests.helpers.tolerances import EXACT, P_VALUE, STANDARD_DEVIATIONS

RATES = st.fractions(min_value=0, max_value=Fraction(99, 100), max_denominator=100)
SCORES = [0.0, 0.02, 0.05, 0.08, 0.11, -0.03]
TAU = 0.05
DRAWS = 6000


# -- how many


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 80), RATES, st.integers(1, 20))
def test_the_count_is_the_most_multiples_that_the_rate_allows(total, rate, multiple):
    multiple = min(multiple, total)
    kept = keep_count(total, rate, multiple=multiple)

    assert kept == literal_keep_count(total, rate, multiple=multiple)
    assert multiple <= kept <= total
    assert kept % multiple == 0 or rate == 0


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 20000), RATES, RATES, st.integers(1, 256))
def test_a_higher_rate_never_keeps_more(total, one, other, multiple):
    low, high = sorted([one, other])
    multiple = min(multiple, total)

    assert keep_count(total, low, multiple=multiple) >= keep_count(total, high, multiple=multiple)


@pytest.mark.parametrize(
    ("total", "rate", "multiple", "kept"),
    [
        (32, Fraction(96, 100), 1, 1),  # the paper's fine-tuning: one head of 32
        (4, Fraction(96, 100), 1, 1),  # and one on each of eight ranks
        (4, Fraction(5, 10), 1, 2),  # 32 heads at TP=8: rungs .5, .4 and .3 all keep 2 of 4
        (4, Fraction(4, 10), 1, 2),
        (4, Fraction(3, 10), 1, 2),
        (4, Fraction(2, 10), 1, 3),
        (11008, Fraction(1, 2), 128, 5504),
        (11008, Fraction(4, 10), 128, 6528),
        (11008, Fraction(96, 100), 128, 384),
        (100, Fraction(0), 48, 100),  # dense is dense, whatever the multiple
        (100, Fraction(1, 1000), 48, 96),
    ],
)
def test_counts_worth_knowing(total, rate, multiple, kept):
    assert keep_count(total, rate, multiple=multiple) == kept


def test_counting_in_floats_is_off_by_one_where_fractions_are_not():
    cases = [(total, tenths) for total in range(1, 41) for tenths in range(1, 10)]
    in_floats = {(n, t): max(1, math.floor(n * (1.0 - t / 10))) for n, t in cases}
    exact = {(n, t): keep_count(n, Fraction(t, 10)) for n, t in cases}

    assert exact == {(n, t): max(1, n * (10 - t) // 10) for n, t in cases}
    assert (in_floats[10, 8], exact[10, 8]) == (1, 2)
    assert (in_floats[20, 9], exact[20, 9]) == (1, 2)


@pytest.mark.parametrize("rate", [Fraction(1), Fraction(-1, 10), Fraction(3, 2)])
def test_a_rate_outside_zero_to_one_is_refused(rate):
    with pytest.raises(ValueError, match=rf"omission rate must be in \[0, 1\), got {rate}; 0 is dense"):
        keep_count(10, rate)


@pytest.mark.parametrize("multiple", [0, 11])
@pytest.mark.parametrize("rate", [Fraction(0), Fraction(1, 2)])
def test_a_multiple_that_no_group_can_hold_is_refused_at_any_rate(multiple, rate):
    with pytest.raises(
        ValueError,
        match=rf"multiple of kept units must be between 1 and .* group \(10\), got {multiple}; lower --sat-",
    ):
        keep_count(10, rate, multiple=multiple)


# -- which


def chosen(scores: Iterable[float], *, groups: int = 1, keep: int) -> list[int]:
    """Plain top-k."""
    return select(torch.tensor(list(scores)), groups=groups, keep=keep, noise=None, temperature=1.0).tolist()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_top_k_is_what_sorting_every_group_gives(data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    keep = data.draw(st.integers(1, size))
    few = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # few values, so that many are equal
    scores = data.draw(st.lists(few, min_size=groups * size, max_size=groups * size))

    assert chosen(scores, groups=groups, keep=keep) == literal_select(scores, groups=groups, keep=keep)


def test_equal_scores_go_to_the_lower_index_even_in_long_rows():
    assert chosen([1.0] * 5000, keep=2000) == list(range(2000))
    assert chosen([0.0, 1.0, 1.0, 1.0, 0.0, 0.0], keep=4) == [0, 1, 2, 3]


def test_every_group_keeps_its_quota_though_another_scores_higher():
    assert chosen([9.0, 8.0, 7.0, 1.0, 2.0, 3.0], groups=2, keep=2) == [0, 1, 4, 5]
    assert chosen([9.0, 8.0, 7.0, 1.0, 2.0, 3.0], groups=1, keep=4) == [0, 1, 2, 5]


def test_the_choice_is_ascending_whole_numbers():
    index = select(torch.tensor([1.0, 5.0, 3.0]), groups=1, keep=2, noise=None, temperature=1.0)

    assert (index.dtype, index.tolist()) == (torch.int64, [1, 2])


def test_sampling_is_the_top_k_of_scores_over_temperature_plus_noise():
    noise = gumbel_noise(12, seed=1, step=2, layer=3, kind="mlp")
    scores = torch.linspace(-0.1, 0.2, 12)

    index = select(scores, groups=3, keep=2, noise=noise, temperature=TAU)
    keys = (scores / TAU + noise).tolist()
    assert index.tolist() == literal_select(keys, groups=3, keep=2)


# -- how often


def draw(*, keep: int, temperature: float, scores: list[float] = SCORES) -> Counter[tuple[int, ...]]:
    """The sets that DRAWS steps of one layer choose."""
    drawn: Counter[tuple[int, ...]] = Counter()
    for step in range(1, DRAWS + 1):
        noise = gumbel_noise(len(scores), seed=7, step=step, layer=1, kind="attention")
        index = select(torch.tensor(scores), groups=1, keep=keep, noise=noise, temperature=temperature)
        drawn[tuple(index.tolist())] += 1
    return drawn


def chi_square_p_value(drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How likely counts at least this far from the expected ones are."""
    statistic = sum((drawn[key] - DRAWS * p) ** 2 / (DRAWS * p) for key, p in expected.items())
    half_freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def inclusion_deviations(drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The largest distance, in standard deviations, of a unit's count from its inclusion probability."""
    worst = 0.0
    for unit in range(len(SCORES)):
        p = sum(probability for subset, probability in expected.items() if unit in subset)
        count = sum(times for subset, times in drawn.items() if unit in subset)
        worst = max(worst, abs(count - DRAWS * p) / math.sqrt(DRAWS * p * (1 - p)))
    return worst


@pytest.fixture(scope="module")
def drawn() -> dict[int, Counter[tuple[int, ...]]]:
    return {keep: draw(keep=keep, temperature=TAU) for keep in (1, 3)}


@pytest.mark.parametrize("keep", [1, 3])
def test_sets_are_drawn_as_often_as_one_by_one_from_the_softmax_without_replacement(drawn, keep):
    expected = subset_probabilities(SCORES, keep=keep, temperature=TAU)

    assert sum(expected.values()) == pytest.approx(1.0)
    assert chi_square_p_value(drawn[keep], expected) > P_VALUE


@pytest.mark.parametrize("keep", [1, 3])
def test_every_unit_is_kept_as_often_as_its_inclusion_probability_says(drawn, keep):
    expected = subset_probabilities(SCORES, keep=keep, temperature=TAU)

    assert inclusion_deviations(drawn[keep], expected) < STANDARD_DEVIATIONS


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("wrong", [0.8 * TAU, 1.25 * TAU])
def test_the_same_bounds_reject_another_temperature(drawn, keep, wrong):
    expected = subset_probabilities(SCORES, keep=keep, temperature=wrong)

    assert chi_square_p_value(drawn[keep], expected) < P_VALUE
    assert inclusion_deviations(drawn[keep], expected) > STANDARD_DEVIATIONS


def test_the_same_bounds_reject_inclusion_in_proportion_to_the_softmax(drawn):
    single = subset_probabilities(SCORES, keep=1, temperature=TAU)
    weights = {
        subset: math.prod(single[(unit,)] for unit in subset)  # as if kept ones were drawn at once
        for subset in subset_probabilities(SCORES, keep=3, temperature=TAU)
    }
    expected = {subset: weight / sum(weights.values()) for subset, weight in weights.items()}

    assert chi_square_p_value(drawn[3], expected) < P_VALUE


def test_a_high_temperature_draws_every_set_alike_and_a_low_one_the_best():
    flat = subset_probabilities([0.0] * 6, keep=3, temperature=TAU)

    assert chi_square_p_value(draw(keep=3, temperature=1e6), flat) > P_VALUE
    assert set(draw(keep=3, temperature=1e-6)) == {(2, 3, 4)}


# -- the noise


def noise(total: int = 64, **changes) -> torch.Tensor:
    return gumbel_noise(total, **({"seed": 1, "step": 5, "layer": 2, "kind": "mlp"} | changes))


def test_noise_is_a_function_of_its_arguments_whatever_the_global_generator_does():
    torch.manual_seed(1)
    first = noise()
    torch.manual_seed(2)
    state = torch.get_rng_state()

    torch.testing.assert_close(noise(), first, **EXACT)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "changed", [{"seed": 2}, {"step": 6}, {"layer": 3}, {"kind": "attention"}, {"seed": 15, "step": 2}]
)
def test_any_other_seed_step_layer_or_kind_draws_other_noise(changed):
    overlap = torch.isin(noise(**changed), noise())

    assert not overlap.any()


def test_noise_is_fp32_and_follows_the_gumbel_distribution():
    values = noise(40_000)
    below = {x: math.exp(-math.exp(-x)) for x in (-1.0, 0.0, 1.0, 3.0)}

    assert values.dtype == torch.float32
    for x, p in below.items():
        count = int((values < x).sum())
        assert abs(count - 40_000 * p) < STANDARD_DEVIATIONS * math.sqrt(40_000 * p * (1 - p))


def test_noise_stays_finite_where_the_generator_gives_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda total, **kw: torch.zeros(total, dtype=kw["dtype"]))

    assert torch.isfinite(noise(4)).all()
