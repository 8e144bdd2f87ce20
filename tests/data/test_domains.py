"""Megatron's forms of --data-path, names, and everything that cannot be meant."""

import pytest
from megatron.core.datasets.utils import get_blend_from_list

from megatron_sat.data.domains import parse_domains


@pytest.mark.parametrize(
    "values",
    [["data/zh"], ["0.3", "a/zh", "0.7", "a/en"], ["30", "zh", "70", "en"], ["a", "b", "c"], ["a", "b"], []],
)
def test_megatrons_forms_mean_what_megatron_means(values):
    domains = parse_domains(values, flag="--data-path")
    prefixes, weights = get_blend_from_list(values) if values else ([], None)
    assert [domain.prefix for domain in domains] == prefixes
    assert [domain.weight for domain in domains] == (weights or [None] * len(prefixes))


@pytest.mark.parametrize(
    "values, names",
    [
        (["data/zh_text_document"], ["zh"]),
        (["a/law", "b/poetry"], ["law", "poetry"]),
        (["zh/law", "en/law", "x/news"], ["zh/law", "en/law", "news"]),
        (["a/zh/law", "a/en/law"], ["zh/law", "en/law"]),
        (["0.5", "chinese=a/x", "0.5", "a/y"], ["chinese", "y"]),
        (["./odd=name/x"], ["x"]),
    ],
)
def test_names_are_those_given_or_the_shortest_that_differ(values, names):
    assert [domain.name for domain in parse_domains(values, flag="--data-path")] == names


def test_a_named_domain_keeps_its_path_without_the_name():
    assert parse_domains(["zh=a/b=c"], flag="--data-path")[0].prefix == "a/b=c"


@pytest.mark.parametrize(
    "values, message",
    [
        (["0", "a", "1", "b"], "--x: a weight must be positive, got 0; leave the data set out"),
        (["-0.5", "a"], "--x: a weight must be positive, got -0.5"),
        (["nan", "a"], "--x: a weight must be positive, got nan"),
        (["inf", "a"], "--x: a weight must be positive, got inf"),
        (["0.3", "a", "b"], "--x must be paths, or weights and paths in turn, got '0.3' for a path"),
        (["a", "0.3"], "--x must be paths, or weights and paths in turn, got '0.3' for a path"),
        (["1", "2"], "--x must be paths, or weights and paths in turn, got '2' for a path"),
        ([""], "--x must be paths, or weights and paths in turn, got '' for a path"),
        (["0.3", "a", "0.7", "a"], "--x must name a data set once, a is named 2 times; add up weights"),
        (["n=a", "n=b"], "--x: domains must have different names, n is there 2 times; name them NAME=PATH"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        parse_domains(values, flag="--x")
