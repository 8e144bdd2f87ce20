"""The visits file: what is written is read, and nothing else is."""

import numpy as np
import pytest
import torch

from megatron_sat.training.visits import Visits, load_visits, save_visits

COUNTS = {
    "attention.2": torch.tensor([3, 0, 5], dtype=torch.int32),
    "attention.10": torch.tensor([1, 2, 5], dtype=torch.int32),
    "mlp.2": np.array([5, 5, 0, 0], dtype=np.int64),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "visits.npz"
    save_visits(path, COUNTS, steps=5)
    return path


def test_what_is_saved_is_loaded(file):
    visits = load_visits(file)

    assert visits.steps == 5
    assert {name: row.tolist() for name, row in visits.counts.items()} == {n: r.tolist() for n, r in COUNTS.items()}


def test_the_file_holds_no_pickle_and_leaves_no_draft_beside_it(file):
    with np.load(file, allow_pickle=False) as arrays:
        assert set(arrays.files) == {"steps", *COUNTS}
    assert list(file.parent.iterdir()) == [file]


def test_shares_are_rows_by_layer_number_not_by_name(file):
    visits = load_visits(file)

    assert visits.layers("attention") == [2, 10]
    assert visits.shares("attention").tolist() == [[0.6, 0.0, 1.0], [0.2, 0.4, 1.0]]


def test_a_second_save_replaces_the_first(file):
    save_visits(file, {"mlp.1": np.array([1])}, steps=1)

    assert list(load_visits(file).counts) == ["mlp.1"]


def test_a_refused_save_leaves_the_file_as_it_was(file):
    with pytest.raises(ValueError, match="visits of mlp.1"):
        save_visits(file, {"mlp.1": np.array([9])}, steps=1)

    assert load_visits(file).steps == 5


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mlp", [1], r"named attention.<layer> or mlp.<layer> from 1, got 'mlp'"),
        ("mlp.0", [1], r"named attention.<layer> or mlp.<layer> from 1, got 'mlp.0'"),
        (
            "mlp.1",
            [0.5],
            r"visits of mlp.1 must be a row of whole numbers, one a neuron, got float64 of shape \(1,\)",
        ),
        (
            "mlp.1",
            [[1]],
            r"visits of mlp.1 must be a row of whole numbers, one a neuron, got int64 of shape \(1, 1\)",
        ),
        (
            "mlp.1",
            np.zeros(0, dtype=int),
            r"must be a row of whole numbers, one a neuron, got int64 of shape \(0,\)",
        ),
        ("mlp.1", [3, 9], r"visits of mlp.1 must be between 0 and the steps counted \(5\), got 3 to 9"),
        ("mlp.1", [-1, 2], r"visits of mlp.1 must be between 0 and the steps counted \(5\), got -1 to 2"),
    ],
)
def test_counts_that_cannot_be_are_refused(name, row, message):
    with pytest.raises(ValueError, match=message):
        Visits(steps=5, counts={name: np.asarray(row)})


def test_no_step_has_no_shares():
    with pytest.raises(ValueError, match="visits must be of at least one step, got 0 steps; plot them after"):
        Visits(steps=0, counts={"mlp.1": np.zeros(4, dtype=int)}).shares("mlp")


def test_layers_of_different_sizes_and_kinds_without_layers_have_no_shares():
    ragged = Visits(steps=1, counts={"mlp.1": np.ones(3, dtype=int), "mlp.2": np.ones(4, dtype=int)})

    with pytest.raises(ValueError, match=r"mlp must have as many units in every layer, got \[3, 4\]; one run's"):
        ragged.shares("mlp")
    with pytest.raises(ValueError, match="attention must have as many units in every layer, got no layer"):
        ragged.shares("attention")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"visits must be a file, .*nowhere.npz does not exist; a sparse run writes"):
        load_visits(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("content", ["", "neither zip nor array"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "visits.npz"
    path.write_text(content)

    with pytest.raises(ValueError, match=r"visits must be what a sparse run wrote, .* is damaged: .*; copy it again"):
        load_visits(path)


def test_arrays_of_another_kind_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "without.npz", **{"mlp.1": np.ones(3, dtype=int)})
    np.savez(tmp_path / "many.npz", steps=np.ones(2, dtype=int))
    np.savez(tmp_path / "pickled.npz", steps=np.int64(1), **{"mlp.1": np.array([object()])})

    for name in ("one.npy", "without.npz", "many.npz", "pickled.npz"):
        with pytest.raises(ValueError, match="visits must be what a sparse run wrote"):
            load_visits(tmp_path / name)


def test_a_file_cut_anywhere_is_refused(file):
    whole = file.read_bytes()

    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="visits must be what a sparse run wrote"):
            load_visits(file)


def test_a_flipped_bit_never_changes_a_count(file):
    whole, read = file.read_bytes(), load_visits(file)

    refused = 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            again = load_visits(file)
        except ValueError:
            refused += 1
            continue
        assert again.steps == read.steps
        assert all(row.tolist() == read.counts[name].tolist() for name, row in again.counts.items())
    assert refused > len(whole) // 2
