"""The heat maps show the shares that the file holds, and the command says what it cannot draw."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sat.training.visits import KINDS, Visits, load_visits, save_visits
from tools import plot_selection

LAYERS, HEADS, CHANNELS, STEPS = 3, 8, 1100, 40
TOOL = Path(plot_selection.__file__)


@pytest.fixture
def file(tmp_path):
    generator = np.random.default_rng(0)
    counts = {f"attention.{layer}": generator.integers(0, STEPS + 1, HEADS) for layer in range(1, LAYERS + 1)}
    counts |= {f"mlp.{layer}": generator.integers(0, STEPS + 1, CHANNELS) for layer in range(1, LAYERS + 1)}
    counts["mlp.2"][17] = 0
    path = tmp_path / "run" / "visits.npz"
    path.parent.mkdir()
    save_visits(path, counts, steps=STEPS)
    return path


def literal_bins(row: list[float], columns: int) -> list[float]:
    """Means of consecutive parts, the first of which are one longer where the division leaves a rest."""
    size, rest = divmod(len(row), columns)
    means, start = [], 0
    for column in range(columns):
        end = start + size + (column < rest)
        means.append(sum(row[start:end]) / (end - start))
        start = end
    return means


def test_many_channels_share_columns_that_show_their_mean():
    shares = np.random.default_rng(1).random((2, CHANNELS))

    binned = plot_selection.binned(shares, 512)
    assert binned.shape == (2, 512)
    np.testing.assert_allclose(binned, [literal_bins(row, 512) for row in shares.tolist()], rtol=1e-12)


def test_few_units_have_a_column_each():
    shares = np.random.default_rng(2).random((2, HEADS))

    np.testing.assert_array_equal(plot_selection.binned(shares, 512), shares)


def test_the_picture_shows_the_shares_of_both_kinds_on_one_scale(file):
    visits = load_visits(file)
    figure = plot_selection.draw(visits)

    images = [ax.images[0] for ax in figure.axes if ax.images]
    for kind, image in zip(KINDS, images, strict=True):
        np.testing.assert_allclose(image.get_array(), plot_selection.binned(visits.shares(kind), 512))
        assert image.get_clim() == (0, 1)
    assert images[1].get_array().shape == (LAYERS, 512)


def test_layers_bear_their_numbers_and_the_axis_counts_units(file):
    figure = plot_selection.draw(load_visits(file))

    mlp = figure.axes[1]
    assert [label.get_text() for label in mlp.get_yticklabels()] == ["1", "2", "3"]
    assert mlp.images[0].get_extent() == [-0.5, CHANNELS - 0.5, LAYERS - 0.5, -0.5]


def test_many_layers_are_not_all_labelled():
    counts = {f"{kind}.{layer}": np.ones(4, dtype=int) for kind in KINDS for layer in range(1, 81)}
    labels = plot_selection.draw(Visits(steps=2, counts=counts)).axes[0].get_yticklabels()

    assert [label.get_text() for label in labels][:3] == ["1", "6", "11"]
    assert len(labels) == 16


def test_the_line_of_a_kind_tells_spread_and_what_was_never_kept():
    shares = np.array([[0.0, 0.25], [0.5, 1.0]])

    assert plot_selection.describe(shares, kind="mlp") == (
        "mlp: 2 layers of 2 units, kept in 0.0% to 100.0% of the steps, mean 43.8%, 1 never"
    )


def test_the_command_writes_a_png_beside_the_file_and_says_so(file, capsys):
    plot_selection.main([str(file)])

    picture = file.with_suffix(".png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    said = capsys.readouterr().out
    assert "mlp: 3 layers of 1,100 units, kept in 0.0% to 100.0% of the steps" in said
    assert "wrote" in said


def test_the_picture_goes_where_the_command_says(file, tmp_path):
    plot_selection.main([str(file), "--output", str(tmp_path / "new" / "picture.svg")])

    assert "<svg" in (tmp_path / "new" / "picture.svg").read_text()


def test_a_run_without_steps_cannot_be_drawn(tmp_path):
    save_visits(tmp_path / "visits.npz", {"mlp.1": np.zeros(2, dtype=int)}, steps=0)

    with pytest.raises(ValueError, match="visits must be of at least one step, got 0 steps"):
        plot_selection.main([str(tmp_path / "visits.npz")])


def test_the_script_ends_with_one_line_over_a_missing_file(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path / "nowhere.npz")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 1
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("plot_selection.py: visits must be a file,")
