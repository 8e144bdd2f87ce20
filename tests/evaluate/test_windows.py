"""Windows cover a document, each token once and with the context that was promised; batches hold all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sat.evaluate.windows import UNSCORED, batches_of, check_sizes, windows_of

START = 99
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(sorted)


def cut(count: int, seq_length: int, stride: int):
    ids = np.arange(1, count + 1)
    return list(windows_of(ids, start=START, seq_length=seq_length, stride=stride))


@given(count=st.integers(0, 40), sizes=sizes)
def test_every_token_is_scored_exactly_once_and_the_start_never(count, sizes):
    stride, seq_length = sizes
    scored = [place for window in cut(count, seq_length, stride) for place in range(window.first, window.end)]
    assert scored == list(range(1, count + 1))


@given(count=st.integers(1, 40), sizes=sizes)
def test_a_scored_token_has_the_promised_context_or_all_there_is(count, sizes):
    stride, seq_length = sizes
    for window in cut(count, seq_length, stride):
        assert 1 <= window.length <= seq_length
        for place in range(window.first, window.end):
            assert place - window.begin >= min(place, max(1, seq_length - stride))


def test_windows_begin_every_stride_tokens():
    found = [(window.begin, window.first, window.end) for window in cut(10, 4, 3)]
    assert found == [(0, 1, 5), (3, 5, 8), (6, 8, 11)]


def test_a_document_without_tokens_has_no_window_and_one_of_a_token_has_one():
    assert cut(0, 4, 2) == []
    (window,) = cut(1, 4, 2)
    assert window.document.tolist() == [START, 1] and (window.length, window.scored) == (1, 1)


def test_a_batch_shows_what_follows_each_token_and_leaves_context_unscored():
    ((batch,),) = batches_of(cut(6, 4, 2)[:2], size=2, together=1, part=0, parts=1)
    assert batch.tokens.tolist() == [[START, 1, 2, 3], [2, 3, 4, 5]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [UNSCORED, UNSCORED, 5, 6]]


def test_filling_stands_behind_the_shorter_window():
    windows = cut(1, 4, 2) + cut(3, 4, 2)
    ((batch,),) = batches_of(windows, size=2, together=1, part=0, parts=1)
    assert batch.labels.tolist() == [[1, 2, 3], [1, UNSCORED, UNSCORED]]
    assert batch.tokens.tolist()[1][0] == START


@given(
    counts=st.lists(st.integers(1, 20), max_size=12),
    size=st.integers(1, 5),
    together=st.integers(1, 4),
    parts=st.integers(1, 3),
)
def test_batches_of_all_replicas_score_every_token_once(counts, size, together, parts):
    windows = [window for count in counts for window in cut(count, 6, 4)]
    scored, longest = [], []
    for part in range(parts):
        for batches in batches_of(windows, size=size, together=together, part=part, parts=parts):
            assert 1 <= len(batches) <= together
            assert len({batch.tokens.shape for batch in batches}) == 1
            assert len(batches[0].tokens) <= size
            longest.append(batches[0].tokens.shape[1])
            scored += [label for batch in batches for label in batch.labels.flatten().tolist() if label != UNSCORED]
    assert sorted(scored) == sorted(token for count in counts for token in range(1, count + 1))
    assert parts > 1 or longest == sorted(longest, reverse=True)


@pytest.mark.parametrize(
    ("seq_length", "stride", "said"),
    [
        (0, 1, "--seq-length must be between 1 and the model's 16 positions, got 0"),
        (17, 1, "--seq-length must be between 1 and the model's 16 positions, got 17"),
        (8, 0, r"--stride must be between 1 and --seq-length \(8\), got 0"),
        (8, 9, r"got 9: a larger one would leave tokens out; 4 gives each token half a window"),
    ],
)
def test_sizes_that_cannot_be_are_refused(seq_length, stride, said):
    with pytest.raises(ValueError, match=said):
        check_sizes(seq_length, stride=stride, longest=16)
    check_sizes(16, stride=16, longest=16)
