"""Names and values of one setting."""

import pytest

from megatron_sat.flags.flag import Flag, layer_pattern, option, switch


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "12", 12),
        ("int", 12, 12),
        ("int", 12.0, 12),
        ("float", "1e-5", 1e-5),
        ("float", 3, 3.0),
        ("str", 98, "98"),
        ("rate", 0.1, "0.1"),
        ("rate", "1/3", "1/3"),
        ("bool", "true", True),
        ("bool", False, False),
        ("pattern", "4", 4),
        ("pattern", "([0]*3+[1])*2", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("pattern", [1, 0], [1, 0]),
    ],
)
def test_a_value_is_read_alike_from_text_and_from_yaml(kind, text, value):
    read = Flag(key="x", kind=kind).read(text, said="x")
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "wrong", "noun"),
    [
        ("int", "1.5", "a whole number"),
        ("int", 1.5, "a whole number"),
        ("int", True, "a whole number"),
        ("float", "fast", "a number"),
        ("float", False, "a number"),
        ("str", ["a"], "a text"),
        ("rate", True, "a number such as 0.5 or 1/2"),
        ("bool", "maybe", "true or false"),
        ("bool", 1, "true or false"),
        ("pattern", "[1]*x", "a whole number, or a list such as"),
        ("pattern", "len([1])", "a whole number, or a list such as"),
        ("pattern", "[1", "a whole number, or a list such as"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(kind, wrong, noun):
    with pytest.raises(ValueError, match=f"^--x must be {noun}.*, got "):
        Flag(key="x", kind=kind).read(wrong, said="--x")


def test_a_value_that_is_no_choice_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"^--x must be one of a, b, got 'c'$"):
        Flag(key="x", choices=("a", "b")).read("c", said="--x")


def test_several_values_come_as_a_list_or_as_words():
    flag = Flag(key="x", kind="int", many="+")
    assert flag.read([1, "2"], said="x") == flag.read("1 2", said="x") == [1, 2]


def test_nothing_is_read_as_nothing():
    assert Flag(key="x", kind="int").read(None, said="x") is None


def test_a_switch_goes_by_its_key_its_negation_and_further_names():
    flag = switch("apply_fusion", yes=("--fusion",), no=("--disable-fusion",))
    assert flag.presets == {
        "--apply-fusion": True,
        "--fusion": True,
        "--disable-fusion": False,
        "--no-apply-fusion": False,
    }


def test_an_option_goes_by_its_key_first():
    assert option("save_interval", "int", "--persistent-save-interval").names == (
        "--save-interval",
        "--persistent-save-interval",
    )


def test_a_key_of_a_file_stands_for_the_value_of_that_name():
    flag = switch("add_bias", no=("--disable-bias",))
    assert (flag.preset("disable-bias"), flag.preset("no_add_bias"), flag.preset("add_bias")) == (
        False,
        False,
        None,
    )


def test_a_pattern_that_is_no_list_is_refused():
    with pytest.raises(ValueError, match="x"):
        layer_pattern("x")
