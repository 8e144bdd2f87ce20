"""The text of this folder's tests, and weights that do not depend on a layout."""

from pathlib import Path

import pytest

from tests.helpers.program import Text, prepare_text, start


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def weights(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process: pipeline stages of their own would draw other first weights."""
    folder = tmp_path_factory.mktemp("weights")
    ended = start(text.command(f"--save {folder} --train-iters 2 --lr-warmup-iters 0"))
    assert ended.codes == [0], ended.err
    return folder
