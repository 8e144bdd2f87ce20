"""tools/compare.py: a comparison of a tiny model that really trains; what it says, judges and remembers."""

import json
import lzma
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sat.compare import conduct, prepare, same, stages
from megatron_sat.compare.claim import claimed
from megatron_sat.compare.devices import Device
from megatron_sat.compare.runs import METRICS, read_run
from tests.helpers.ranks import run_ranks
from tools import compare

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
SMALL = ROOT / "examples" / "compare" / "small.yaml"
MINUTES = 60
STEPS, FITTING = 6, 4
"""Of every run, and of the control: so short a time says nothing."""


def _file(folder: Path) -> Path:
    """A file of the shipped example's keys: less of everything, one variant, one seed."""
    for name in ("zh/poetry", "en/technology"):
        with lzma.open(DATA / f"{name}.dev.jsonl.xz", "rt", encoding="utf-8") as shipped:
            lines = [line for line, _ in zip(shipped, range(60), strict=False)]
        (folder / f"{name.split('/')[0]}.jsonl").write_text("".join(lines), encoding="utf-8")
    given = yaml.safe_load(SMALL.read_text())
    given["model"]["tokenizer"] = str(DATA / "tokenizer.model")
    given["model"]["fresh"] |= {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    given["data"] |= {"train": {"zh": "zh.jsonl"}, "replay": {"en": "en.jsonl"}}
    given["data"]["valid"] = {"zh": "zh.jsonl", "en": "en.jsonl"}
    given["training"] |= {"eval_interval": 3, "eval_iters": 1, "log_interval": 1, "seq_length": 32}
    given["training"] |= {"save_interval": 3, "save_optim": True}
    schedule = {"sat_schedule": "constant", "sat_omission_rate": 0.5, "sat_importance": "contribution"}
    given |= {"budget": {"steps": STEPS}, "seeds": [1], "variants": {"sat": schedule}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def _here(self: stages.Runner, command: Sequence[str], *, stage: stages.Stage, place: stages.Place) -> int:
    """Instead of a process that imports everything anew: one that is forked from this one."""
    _, _, module, *arguments = command
    return int(run_ranks(_call, 1, module, arguments)[0])


def _call(_: int, module: str, arguments: list[str]) -> int:
    modules = {"megatron_sat.compare.prepare": prepare.main, "megatron_sat.compare.same": same.main}
    try:
        if module in modules:
            modules[module](arguments)
        else:
            sys.argv = ["measured", *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One comparison: its folder, its exit code, and what it said; likewise when it was asked for again, and when it
    was asked for after a run had ended before it was marked as done."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(stages.Runner, "_run", _here)
        patch.setattr(conduct, "equal_time_steps", lambda dense, variant: FITTING)
        patch.setattr(compare.log, "say", said.append)
        patch.setattr(stages, "say", said.append)
        argv = ["run", str(_file(folder)), "--out", str(folder / "out")]
        code = compare.main([*argv, "--require", "sat.zh_bpc > 0", "--require", "sat.flops >= dense.flops"])
        first = list(said)
        said.clear()
        again = compare.main([*argv, "--require", "sat_rate_0.zh_bpc == dense.zh_bpc"])
        second = list(said)
        said.clear()
        (folder / "out" / "runs" / "sat_rate_0" / "seed-1" / stages.MARKER).unlink()
        compare.main(argv)
    out = folder / "out"
    return {"out": out, "code": code, "said": first, "again": again, "said_again": second, "said_ended": said}


@pytest.mark.parametrize("file", sorted(SMALL.parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_can_be_read(file: Path) -> None:
    assert compare._read(file).name == file.stem


def test_the_exit_code_says_whether_all_requirements_hold(made: dict[str, Any]) -> None:
    assert (made["code"], made["again"]) == (1, 0)
    (holds, breaks) = [line for line in made["said"] if line.startswith("required: ")]
    assert ": holds, " in holds
    assert "sat.flops >= dense.flops: does not hold, " in breaks


def test_a_second_run_keeps_every_stage(made: dict[str, Any]) -> None:
    kept = [line for line in made["said_again"] if "done before, kept" in line]
    assert len(kept) == len(list(made["out"].glob(f"**/{stages.MARKER}")))
    assert any(line.endswith("remembered this already") for line in made["said_again"])


def test_rate_zero_is_dense_bit_for_bit_and_the_report_says_so(made: dict[str, Any]) -> None:
    assert "- sat at rate 0 is dense training bit for bit (seed 1)." in made["said"]
    found = json.loads((made["out"] / "report.json").read_text())
    assert found["rate_zero"] == {"sat": {"1": None}}
    with pytest.raises(AssertionError):
        assert same.difference(*(made["out"] / "runs" / name / "seed-1" for name in ("dense", "sat"))) is None


def test_a_run_that_ended_before_it_was_marked_goes_on_and_is_dense_still(made: dict[str, Any]) -> None:
    """It evaluates once more, and its control does not."""
    said = made["said_ended"]
    assert [line.split(":")[0] for line in said if ": going on: " in line] == ["sat_rate_0, seed 1"]
    lines = (made["out"] / "runs" / "sat_rate_0" / "seed-1" / METRICS).read_text().splitlines()
    last = [(entry["kind"], entry["step"]) for entry in map(json.loads, lines[-3:])]
    assert last == [("train", STEPS), ("validation", STEPS), ("validation", STEPS)]
    assert "- sat at rate 0 is dense training bit for bit (seed 1)." in said


def test_every_run_begins_with_the_same_model_and_reads_the_same_text(made: dict[str, Any]) -> None:
    """Of the first step the loss of what omits nothing is that of the start's one still update."""
    runs = made["out"] / "runs"
    first = {path.parent.name: read_run(path, name="r").windows[0].loss for path in runs.glob("*/seed-1")}
    (still,) = read_run(made["out"] / "start" / "seed-1", name="start").windows
    dense = {name: loss for name, loss in first.items() if name != "sat"}
    assert set(dense) == {"dense", "sat_rate_0", f"dense_{FITTING}_steps"}
    assert set(dense.values()) == {still.loss}
    assert first["sat"] != still.loss


def test_the_control_decays_over_its_own_steps(made: dict[str, Any]) -> None:
    found = json.loads((made["out"] / "report.json").read_text())
    assert found["equal_time"] == {"sat": f"dense_{FITTING}_steps"}
    settings = yaml.safe_load((made["out"] / "runs" / f"dense_{FITTING}_steps" / "seed-1" / "config.yaml").read_text())
    plain = {key: value for part in settings.values() for key, value in part.items()}
    assert plain["train_iters"] == FITTING
    assert "lr_decay_iters" not in plain  # so it is over all of them


def test_the_report_has_bits_memory_and_forgetting(made: dict[str, Any]) -> None:
    figures = json.loads((made["out"] / "report.json").read_text())["figures"]["sat"]
    assert 0 < figures["zh_bpc"]["mean"] < 20
    assert 0.05 < figures["peak_memory_gib"]["mean"] < 8
    assert figures["forgetting_bpc"]["mean"] < 0  # a model with random weights learns what is replayed
    assert (made["out"] / "report.html").is_file()


def test_the_history_beside_the_folder_shows_and_draws_the_trend(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = made["out"].parent / compare.HISTORY
    argv = ["history", "--history", str(store), "--figure", "zh_bpc", "--variant", "sat"]
    assert compare.main([*argv, "--out", str(tmp_path / "trend.png")]) == 0
    said = capsys.readouterr().out
    assert "zh_bpc" in said
    assert "small, on " in said
    assert (tmp_path / "trend.png").read_bytes().startswith(b"\x89PNG")


def test_a_requirement_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    argv = ["run", str(_file(tmp_path)), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="fast must be a group of this comparison; there are dense"):
        compare.main([*argv, "--require", "fast.zh_bpc < 1"])
    less = ["--without-control", "dense_equal_time"]
    with pytest.raises(ValueError, match="name the control: it was left out"):
        compare.main([*argv, *less, "--require", "sat.zh_bpc < dense_equal_time.zh_bpc"])
    assert not (tmp_path / "out").exists()


def _prepared(folder: Path, side: dict[str, Any] | None) -> Path:
    """A file whose held-out Chinese came prepared, with this side file."""
    path = _file(folder)
    given = yaml.safe_load(path.read_text())
    given["data"]["valid"]["zh"] = "held/zh"
    path.write_text(yaml.safe_dump(given))
    (folder / "held").mkdir()
    (folder / "held" / "zh.idx").write_text("")
    if side is not None:
        (folder / "held" / "zh.json").write_text(json.dumps(side))
    return path


SIDE = {"tokenizer": "t", "fingerprint": "f", "vocab_size": 9, "eod": 0, "options": {}, "sources": []}
SIDE |= {"dtype": "uint16", "bin_bytes": 1, "format": 1, "totals": {"tokens": 5, "characters": 10}}


@pytest.mark.parametrize("side", [None, {**SIDE, "totals": {"tokens": 5}}], ids=["no side file", "nothing counted"])
def test_bits_of_text_that_nobody_counted_cannot_be_required(side: dict[str, Any] | None, tmp_path: Path) -> None:
    """They were missed after all training, and the report with them."""
    argv = ["run", str(_prepared(tmp_path, side)), "--out", str(tmp_path / "out"), "--dry-run"]
    with pytest.raises(ValueError, match="zh_bpc must be a figure of this comparison; there are en_bpc, en_loss"):
        compare.main([*argv, "--require", "sat.zh_bpc < 1"])
    assert not (tmp_path / "out").exists()
    assert compare.main([*argv, "--require", "sat.zh_loss < 1", "--require", "sat.forgetting_bpc < 1"]) == 0


def test_bits_of_prepared_text_that_was_counted_can_be_required(tmp_path: Path) -> None:
    argv = ["run", str(_prepared(tmp_path, SIDE)), "--out", str(tmp_path / "out"), "--dry-run"]
    assert compare.main([*argv, "--require", "sat.zh_bpc < 1"]) == 0


def test_a_dry_run_says_the_commands_of_the_shipped_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", str(SMALL), "--out", str(tmp_path / "out"), "--dry-run", "--seeds", "3"]
    assert compare.main(argv) == 0
    said = capsys.readouterr().out
    for group in ("start", "dense", "sat", "contribution", "sat_rate_0", "contribution_rate_0"):
        assert f"{group}, seed 3: " in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings"]


def test_training_runs_are_spread_over_the_gpus_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [Device(handle=handle, name="H100") for handle in ("4", "5", "6")]
    monkeypatch.setattr(compare, "visible_devices", lambda environment, *, python: there)
    argv = ["run", str(SMALL), "--out", str(tmp_path / "out"), "--dry-run"]
    assert compare.main([*argv, "--gpus", "2"]) == 0
    assert "training runs: 2 at once, on the GPUs 4, 5" in capsys.readouterr().out
    assert compare.main([*argv, "--gpus", "2", "--jobs", "6", "--without-control", "dense_equal_time"]) == 0
    assert "training runs: 6 at once, on the GPUs 4, 5" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--gpus must be at most the number of GPUs that are visible \(3\), got 4"):
        compare.main([*argv, "--gpus", "4"])
    with pytest.raises(ValueError, match="--gpus must be at least 1, got 0"):
        compare.main([*argv, "--gpus", "0"])


def test_one_gpu_is_not_asked_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "visible_devices", lambda environment, *, python: pytest.fail("it was asked"))
    assert compare.main(["run", str(SMALL), "--out", str(tmp_path / "out"), "--dry-run", "--gpus", "1"]) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "FILE must be a readable YAML file, .* is not"), ("a: [", "readable YAML"), ("[]", "hold keys with")],
)
def test_a_file_that_cannot_be_read_is_refused(content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=says):
        compare.main(["run", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out")])


def test_a_variant_given_twice_is_refused(tmp_path: Path) -> None:
    """The first would be lost, unsaid."""
    (tmp_path / "x.yaml").write_text("variants:\n  sat: {lr: 1}\n  sat: {lr: 2}\n")
    with pytest.raises(ValueError, match="FILE must be a readable YAML file, .* is not: sat is given twice; mend it"):
        compare.main(["run", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_an_out_below_a_file_is_refused_before_anything_runs(dry: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out must lie where a folder can be, .*/file/out cannot be made: "):
        compare.main(["run", str(SMALL), "--out", str(tmp_path / "file" / "out"), *dry])


@pytest.mark.parametrize(
    ("store", "error", "says"),
    [
        ("file/x.sqlite", ValueError, "--history must lie where a folder can be, .*/file cannot be made"),
        (".", RuntimeError, "--history must be a file that can be read and written, .* is not: unable to open"),
        ("text", ValueError, "--history must be a store of comparisons, .* is not: file is not a database"),
    ],
)
def test_a_history_that_cannot_be_written_is_refused_before_anything_runs(
    store: str, error: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found after all training."""
    monkeypatch.setattr(conduct.Conduct, "study", lambda self: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    (tmp_path / "text").write_text("no database, but a text of some length\n" * 90)
    with pytest.raises(error, match=says):
        compare.main(["run", str(SMALL), "--out", str(tmp_path / "out"), "--history", str(tmp_path / store)])


def test_two_commands_in_one_folder_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct.Conduct, "study", lambda self: pytest.fail("it ran"))
    with claimed(tmp_path / "out"), pytest.raises(RuntimeError, match="one command at a time may work in .*/out, anot"):
        compare.main(["run", str(SMALL), "--out", str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.timeout(20 * MINUTES)
def test_the_shipped_example_runs_as_a_user_would_run_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "run", str(SMALL), "--out", str(tmp_path / "out")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=19 * MINUTES, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["rate_zero"] == {"sat": {"1": None}, "contribution": {"1": None}}
    assert set(found["equal_time"]) == {"sat", "contribution"}
    seeds = {name: set(figures["zh_bpc"]["seeds"]) for name, figures in found["figures"].items()}
    assert all(found == ({"1"} if "rate_0" in name else {"1", "2"}) for name, found in seeds.items())
    assert (tmp_path / compare.HISTORY).is_file()
