"""Index caches after a crash and between two builders, and megatron's helper that nobody may compile."""

import os
import sys
import time
from pathlib import Path

import pytest
from megatron.core.datasets import utils as megatron_utils

from megatron_sat.data.blend import DataConfig, build_datasets
from megatron_sat.data.index_cache import building, use_prebuilt_index_helpers
from tests.helpers.ranks import run_ranks


def test_caches_of_a_builder_that_died_are_built_again(tmp_path, corpus, ids):
    config = DataConfig(
        seq_length=8,
        seed=1,
        train_data_path=(corpus("a", [[1, 2, 3]] * 40),),
        data_cache_path=str(tmp_path / "cache"),
    )

    def samples(rank: int) -> list[list[int]]:
        train = build_datasets(config, tokenizer=ids, train_samples=12).train
        return [train[i]["tokens"].tolist() for i in range(12)]

    first = run_ranks(samples, 1)
    (written,) = (tmp_path / "cache").glob("*shuffle_index.npy")
    os.truncate(written, 100)
    with pytest.raises(RuntimeError, match="EOF: reading array header"):
        run_ranks(samples, 1)  # megatron takes what exists for whole
    begun = written.stat().st_mtime_ns
    lock = tmp_path / "cache" / "building.lock"
    assert (
        lock.read_text() == "building\n"
    )  # the run that failed left it so; put its beginning before the damage
    os.utime(lock, ns=(begun, begun))
    assert run_ranks(samples, 1) == first
    assert lock.read_text() == ""


def test_older_caches_survive_a_builder_that_died(tmp_path):
    for name in ("old-GPTDataset-train-x.npy", "new-GPTDataset-train-x.npy", "new-other.npy"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "old-GPTDataset-train-x.npy", ns=(10**18, 10**18))
    (tmp_path / "building.lock").write_text("building\n")
    os.utime(tmp_path / "building.lock", ns=(10**18 + 1, 10**18 + 1))
    with building(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "building.lock",
            "new-other.npy",
            "old-GPTDataset-train-x.npy",
        ]


def test_a_second_builder_waits_for_the_first(tmp_path):
    def build(rank: int) -> tuple[float, float]:
        time.sleep(0.1 * rank)
        with building(tmp_path):
            entered = time.monotonic()
            time.sleep(0.3)
            return entered, time.monotonic()

    (_, left), (entered, _) = sorted(run_ranks(build, 2))
    assert entered >= left


def test_nothing_compiles_megatrons_helpers(monkeypatch):
    monkeypatch.setattr(megatron_utils, "compile_helpers", lambda: sys.exit(1))
    use_prebuilt_index_helpers()
    assert megatron_utils.compile_helpers() is None


def test_a_missing_helper_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(
        RuntimeError, match="megatron.core's compiled index helper must be importable, it is not"
    ):
        use_prebuilt_index_helpers()


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), building(Path(tmp_path / "file" / "cache")):
        pass
