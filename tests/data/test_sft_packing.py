"""Windows: every example once an epoch, none overfull, the same on every call, and few of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sat.data.sft_packing import pack, windows_in_order, windows_of_epoch

SIZE = 32
LENGTHS = st.lists(st.integers(1, SIZE), min_size=1, max_size=60)


def best_fit_written_out(order: list[int], lengths: list[int], size: int) -> list[list[int]]:
    """Of the windows with room the one with the least, the youngest among equals; else a new one."""
    windows: list[list[int]] = []
    touched: list[int] = []  # when each window was last laid into
    for time, example in enumerate(order):
        rooms = [size - sum(lengths[i] for i in window) for window in windows]
        fitting = [n for n, room in enumerate(rooms) if room >= lengths[example]]
        if fitting:
            best = min(fitting, key=lambda n: (rooms[n], -touched[n]))
            windows[best].append(example)
            touched[best] = time
        else:
            windows.append([example])
            touched.append(time)
    return windows


@given(lengths=LENGTHS, seed=st.integers(0, 3))
def test_packing_is_best_fit(lengths, seed):
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    packed = [window.tolist() for window in pack(order, lengths=lengths, size=SIZE)]
    assert packed == best_fit_written_out(order, lengths, SIZE)


@given(lengths=LENGTHS, packed=st.booleans(), epoch=st.integers(0, 2))
def test_an_epoch_holds_every_example_once_and_no_window_too_many_tokens(lengths, packed, epoch):
    lengths = np.array(lengths)
    windows = windows_of_epoch(epoch, lengths=lengths, size=SIZE, seed=1, packed=packed)
    assert sorted(itertools.chain(*windows)) == list(range(len(lengths)))
    assert max(lengths[window].sum() for window in windows) <= SIZE
    assert packed or all(len(window) == 1 for window in windows)


@pytest.mark.parametrize("packed", [True, False])
def test_epochs_and_seeds_differ_and_each_is_the_same_again(packed):
    lengths = np.random.default_rng(0).integers(1, SIZE, 200)

    def plain(**changed: int) -> list[list[int]]:
        how = {"epoch": 0, "seed": 5} | changed
        found = windows_of_epoch(how["epoch"], lengths=lengths, size=SIZE, seed=how["seed"], packed=packed)
        return [window.tolist() for window in found]

    assert plain() == plain()
    assert plain() != plain(epoch=1)
    assert plain() != plain(seed=6)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(8, 400, 2000)
    windows = windows_of_epoch(0, lengths=lengths, size=1024, seed=0, packed=True)
    assert lengths.sum() / (len(windows) * 1024) > 0.97


def test_an_evaluation_reads_examples_as_they_come():
    assert [w.tolist() for w in windows_in_order(lengths=np.array([3, 3, 2]), size=5, packed=False)] == [[0], [1], [2]]
    assert [w.tolist() for w in windows_in_order(lengths=np.array([3, 3, 2]), size=5, packed=True)] == [[0], [1, 2]]
