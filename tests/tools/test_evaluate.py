"""tools/evaluate.py as a user calls it: files that appear whole, results beside each other, mistakes in one line."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.convert.conversion import export_model, import_model
from megatron_sat.evaluate.result import Result
from megatron_sat.evaluation import job, tasks
from tests.checkpoint.families import write_model
from tests.helpers.program import prepare_text, start
from tests.helpers.ranks import run_ranks
from tools import evaluate

ROOT = Path(__file__).parents[2]
TEXT = {"text": "It is a truth universally acknowledged"}


def tool(*arguments: object, ranks: int = 1) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of rank 0, in processes that have imported everything."""
    return run_ranks(_main, ranks, [str(argument) for argument in arguments])[0]


def _main(_: int, argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = evaluate.main(argv)
    return code, out.getvalue(), err.getvalue()


def _import(_: int, folder: Path) -> None:
    import_model(folder / "hf", folder / "save", tp=2, gate=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model("tinyllama", folder / "hf")
    run_ranks(_import, 1, folder)
    (folder / "en.jsonl").write_text(json.dumps(TEXT) + "\n")
    return folder


def test_a_model_and_its_import_stand_beside_each_other(model, tmp_path):
    data = ("--data", f"en/prose={model / 'en.jsonl'}", "--seq-length", 16)
    code, out, err = tool("--hf", model / "hf", *data, "--output", tmp_path / "hf", "--name", "theirs")
    assert code == 0, err
    assert "bits per character" in out and f"written to {tmp_path / 'hf'}" in out
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["chart.png", "result.json", "table.md"]

    layout = ("--tensor-model-parallel-size", 2, "--beside", tmp_path / "hf" / "result.json")
    code, _, err = tool("--load", model / "save", *data, *layout, "--output", tmp_path / "new", ranks=2)
    assert code == 0, err
    theirs, ours = (Result.load(tmp_path / name / "result.json") for name in ("hf", "new"))
    assert (ours.name, ours.kind, ours.step, ours.stride) == ("save", "megatron", 0, 8)
    assert ours.average.loss == pytest.approx(theirs.average.loss, abs=1e-5)
    heads = (tmp_path / "new" / "table.md").read_text().splitlines()[0]
    assert heads.startswith("| domain | characters | bits per character, theirs | bits per character, save |")


TRAINING = """
--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --lr-decay-style constant --log-interval 1
--seq-length 32 --num-workers 0 --finetune --save-interval 2 --tensor-model-parallel-size 2
--sat-schedule constant --sat-omission-rate 0.5 --sat-importance maxip --sat-selection sampling
--sat-selection-interval 1
"""


def test_the_checkpoint_of_a_sparse_run_is_evaluated_dense_as_its_export_is(tmp_path):
    write_model("mistral", tmp_path / "hf")
    run_ranks(_import, 1, tmp_path)
    text = prepare_text(tmp_path)
    command = ["--config", str(tmp_path / "save" / "model.yaml"), "--load", str(tmp_path / "save"), *TRAINING.split()]
    command += ["--train-data-path", text.prefix("zh/religion"), "--data-cache-path", str(tmp_path / "cache")]
    ended = start([*command, "--save", str(tmp_path / "run")], ranks=2)
    assert ended.codes == [0, 0], ended.err
    run_ranks(_export, 1, tmp_path)

    data = ("--data", f"zh/poetry={text.prefix('zh/poetry')}", "--seq-length", 64)
    for kind, folder, ranks in (("--load", "run", 2), ("--hf", "out", 1), ("--load", "save", 1)):
        layout = ("--pipeline-model-parallel-size", 2) if ranks == 2 else ()
        code, _, err = tool(kind, tmp_path / folder, *data, *layout, "--output", tmp_path / f"of-{folder}", ranks=ranks)
        assert code == 0, err
    run, out, before = (Result.load(tmp_path / f"of-{name}" / "result.json") for name in ("run", "out", "save"))
    assert (run.step, before.step) == (2, 0)
    assert run.average.loss == pytest.approx(out.average.loss, abs=1e-5)
    assert run.average.loss < before.average.loss - 1e-3


def _export(_: int, folder: Path) -> None:
    export_model(folder / "run", folder / "out", gate=None)


def test_a_table_alone_needs_no_folder(model):
    code, out, err = tool("--hf", model / "hf", "--data", f"en={model / 'en.jsonl'}")
    assert code == 0, err
    assert "average" in out and "written" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hf {}/hf --data en={}/missing.jsonl", "--data must name existing files"),
        (
            "--hf {}/hf --data en={}/en.jsonl --stride 9 --seq-length 8",
            "--stride must be between 1 and --seq-length (8)",
        ),
        ("--hf {}/missing --data en={}/en.jsonl", "a Hugging Face model must be a local folder"),
        ("--load {}/hf --data en={}/en.jsonl", "--load must be a folder with latest_checkpointed_iteration.txt"),
        ("--hf {}/hf --data en={}/en.jsonl --ckpt-step 3", "--ckpt-step needs --load, got --hf; leave it out"),
        ("--hf {}/hf --data {}/en.jsonl", "--data must be NAME=PATH"),
        ("--hf {}/hf", "an evaluation needs --data or --harness, got neither"),
        ("--hf {}/hf --harness mmlu", "--harness needs --output, got none"),
        ("--hf {}/hf --data en={}/en.jsonl --output {}", "--output must be a new or empty folder"),
        ("--hf {}/hf --data en={}/en.jsonl --beside {}/en.jsonl", "{}/en.jsonl must be a result of tools/evaluate.py"),
        (
            "--load {}/save --data en={}/en.jsonl --tensor-model-parallel-size 2",
            "the number of ranks (1) must be a multiple of --tensor-model",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(model, arguments, said):
    code, _, err = tool(*arguments.replace("{}", str(model)).split())
    assert (code, len(err.splitlines())) == (2, 1)
    assert said.replace("{}", str(model)) in err


def test_a_mistake_ends_all_ranks(model, tmp_path):
    arguments = ["--hf", str(model / "hf"), "--data", f"en={model / 'en.jsonl'}", "--output", str(model)]
    ended = run_ranks(_main, 2, arguments)
    assert [code for code, _, _ in ended] == [2, 2]
    assert "--output must be a new or empty folder" in ended[0][2] and not ended[1][2]
    code, _, err = tool("--hf", model / "hf", "--harness", "mmlu", "--output", tmp_path / "out", ranks=2)
    assert code == 2 and "--harness is the work of one process, got 2 ranks; start without torchrun" in err


def _interrupted(_: int, argv: list[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    job.draw_chart = stop  # in this rank alone; the table is written by then
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(argv)


def test_an_interruption_leaves_no_half_folder(model, tmp_path):
    arguments = ["--hf", str(model / "hf"), "--data", f"en={model / 'en.jsonl'}", "--output", str(tmp_path / "out")]
    run_ranks(_interrupted, 1, arguments)
    assert list(tmp_path.iterdir()) == []


def _harness(_: int, argv: list[str]) -> tuple[int, list[dict]]:
    """The tool with a stand-in for lm-eval that says what it was asked."""
    asked = []

    def run_harness(hf_folder: Any, *, output: Path, about: Any = None, **settings: object) -> dict:
        folder = hf_folder if isinstance(hf_folder, Path) else hf_folder()
        asked.append(settings | {"files": sorted(path.name for path in folder.iterdir())})
        (output / "harness.json").write_text(json.dumps({"model": str(folder), "results": {}} | (about or {})))
        return {}

    tasks.run_harness = run_harness  # in this rank alone
    return evaluate.main(argv), asked


@pytest.mark.parametrize(("kind", "step"), [("hf", None), ("load", 0)])
def test_tasks_get_a_hugging_face_folder_of_either_kind_of_model(model, tmp_path, kind, step):
    folder = model / {"hf": "hf", "load": "save"}[kind]
    arguments = [f"--{kind}", folder, "--harness", "mmlu", "cmmlu", "--harness-limit", 3, "--output", tmp_path / "out"]
    ((code, (asked,)),) = run_ranks(_harness, 1, [str(argument) for argument in arguments])
    assert code == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(asked.pop("files"))
    assert asked == {"tasks": ["mmlu", "cmmlu"], "tasks_folder": None, "limit": 3, "batch_size": 8}
    report = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert report["model"] == str(folder) and report.get("step") == step


TASK = """\
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install 'megatron-sat[eval]'")
@pytest.mark.slow
def test_tasks_run_on_a_checkpoint(model, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(file=model / "en.jsonl"))
    asked = ("--harness", "own", "--harness-tasks-folder", tmp_path / "tasks", "--output", tmp_path / "out")
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--load", str(model / "save"), *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert report["model"] == str(model / "save")
    assert report["results"]["own"]["bits_per_byte,none"] > 0
