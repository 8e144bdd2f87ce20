"""Byte pair encoding by hand, and plans that leave no piece unreachable."""

import itertools

import pytest

from megatron_sat.vocab.plan import Vocabulary, plan_additions, segment


def vocabulary(*pieces: str) -> Vocabulary:
    """Ranked as listed; single letters are known."""
    return Vocabulary(
        known={*"abcdefg", *pieces},
        ranks={piece: float(i) for i, piece in enumerate(pieces)},
        by_piece=True,
        first_rank=len(pieces),
    )


def test_the_best_pair_is_joined_first_and_the_leftmost_of_equals() -> None:
    ranks = {("b", "c"): 0.0, ("a", "b"): 1.0, ("d", "d"): 2.0}
    assert segment("abcabddd", rank=lambda left, right: ranks.get((left, right))) == ["a", "bc", "ab", "dd", "d"]
    assert segment("", rank=lambda left, right: 0.0) == []


def test_a_piece_whose_halves_are_there_is_added_alone() -> None:
    plan = plan_additions(["abc"], add=1, vocabulary=vocabulary("ab"))
    assert [(a.piece, a.halves, a.wanted) for a in plan.additions] == [("abc", ("ab", "c"), True)]
    assert plan.between == plan.dropped == []


def test_missing_halves_are_added_before_it() -> None:
    plan = plan_additions(["abcd"], add=3, vocabulary=vocabulary())
    assert [a.piece for a in plan.additions] == ["ab", "abc", "abcd"]
    assert plan.between == ["ab", "abc"]


def test_an_old_piece_that_cuts_across_is_reckoned_with() -> None:
    """With "bc" old, "ab" can never be joined inside of "abcd": its halves are "a" and "bcd", or "abc" and "d"."""
    grown = vocabulary("bc")
    plan = plan_additions(["abcd"], add=2, vocabulary=grown)
    assert [(a.piece, a.halves) for a in plan.additions] == [("abc", ("a", "bc")), ("abcd", ("abc", "d"))]
    assert segment("abcd", rank=grown.rank) == ["abcd"]


def test_a_character_that_is_no_piece_becomes_one_first() -> None:
    plan = plan_additions(["xax"], add=3, vocabulary=vocabulary())
    assert [(a.piece, a.halves) for a in plan.additions] == [("x", None), ("xa", ("x", "a")), ("xax", ("xa", "x"))]


def test_a_candidate_without_room_for_its_halves_is_dropped_and_the_next_one_taken() -> None:
    plan = plan_additions(["ab", "cdef", "fg"], add=2, vocabulary=vocabulary())
    assert [a.piece for a in plan.additions] == ["ab", "fg"]
    assert plan.dropped == ["cdef"]


def test_known_pieces_are_passed_over() -> None:
    plan = plan_additions(["ab", "cd"], add=1, vocabulary=vocabulary("ab"))
    assert [a.piece for a in plan.additions] == ["cd"]
    assert plan.dropped == []


def test_a_listed_piece_that_nothing_joins_is_left_as_it_is() -> None:
    """Llama 3 looks whole words up: its list has pieces without a pair. Their ids keep their meaning."""
    pairs = Vocabulary(known={*"abc", "ab"}, ranks={}, by_piece=False, first_rank=0)
    plan = plan_additions(["abc", "bc"], add=1, vocabulary=pairs)
    assert [a.piece for a in plan.additions] == ["bc"]
    assert plan.dropped == ["abc"]


def test_too_few_candidates_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--add \\(3\\) needs as many new pieces, the text or model yields 1; give more text"
    ):
        plan_additions(["ab", "ab"], add=3, vocabulary=vocabulary())


@pytest.mark.parametrize("by_piece", [True, False])
def test_every_accepted_piece_is_produced_from_its_own_text(by_piece: bool) -> None:
    """All words of two and three letters, and some of five, after awkward old ones."""
    old = ("bc", "ca", "bca", "cc")
    halves = {"bc": ("b", "c"), "ca": ("c", "a"), "bca": ("bc", "a"), "cc": ("c", "c")}
    grown = Vocabulary(
        known={*"abc", *old},
        ranks={(piece if by_piece else halves[piece]): float(i) for i, piece in enumerate(old)},
        by_piece=by_piece,
        first_rank=len(old),
    )
    words = ["".join(w) for n in (5, 2, 3) for w in itertools.product("abc", repeat=n)][::3]
    plan = plan_additions(words, add=80, vocabulary=grown)
    assert all(segment(a.piece, rank=grown.rank) == [a.piece] for a in plan.additions)
    assert len({a.piece for a in plan.additions}) == 80
    assert plan.between


def test_appending_pieces_without_a_plan_leaves_some_unreachable() -> None:
    """The negative control, and the fault of the known recipe."""
    appended = vocabulary("bc")
    for piece in ("abcd", "cd"):
        appended.add(piece, halves=(piece[:2], piece[2:]), wanted=True)
    assert segment("abcd", rank=appended.rank) == ["a", "bc", "d"]
