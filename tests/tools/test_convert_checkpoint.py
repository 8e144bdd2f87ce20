"""tools/convert_checkpoint.py as a user calls it: a tiny model, a training run from it, and a real model (slow)."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_sat.checkpoint.hf_files import Tensors
from megatron_sat.checkpoint.hf_model import load_model
from tests.checkpoint.families import write_model
from tests.helpers.material import smollm2_gguf
from tests.helpers.program import prepare_text, start
from tests.helpers.ranks import run_ranks
from tests.helpers.zero_engine import needs_deepspeed
from tools import convert_checkpoint

ROOT = Path(__file__).parents[2]


def _tool(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _forked(*arguments: object) -> tuple[int, str, str]:
    """The same in a process that has imported everything: exit code, stdout, stderr."""
    (ended,) = run_ranks(_main, 1, [str(argument) for argument in arguments])
    return ended


def _main(_: int, argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = convert_checkpoint.main(argv)
    return code, out.getvalue(), err.getvalue()


def test_a_model_goes_in_is_compared_and_comes_out(tmp_path):
    hf = write_model("qwen3", tmp_path / "hf")
    done = _tool("import", "--hf", hf, "--save", tmp_path / "save", "--tensor-model-parallel-size", 2)
    assert done.returncode == 0, done.stderr
    assert "importing" in done.stdout and "largest difference of logits" in done.stdout
    assert f"--config {tmp_path}/save/model.yaml --load {tmp_path}/save --finetune" in done.stdout

    code, _, err = _forked("export", "--load", tmp_path / "save", "--hf", tmp_path / "out", "--max-shard-gb", 0.00005)
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_a_mistake_ends_in_one_line_and_code_2(tmp_path):
    code, _, err = _forked("import", "--hf", tmp_path / "nothing", "--save", tmp_path / "save")
    assert code == 2
    assert err.startswith("convert_checkpoint.py: a Hugging Face model must be a local folder with config.json")
    assert len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_verify_goes_through_the_layouts_of_two_ranks(tmp_path):
    hf = write_model("tinyllama", tmp_path / "hf")
    assert _tool("import", "--hf", hf, "--save", tmp_path / "save", "--skip-gate").returncode == 0
    done = _tool("verify", "--load", tmp_path / "save", "--hf", hf, ranks=2)
    assert done.returncode == 0, done.stderr
    layouts = [line.split(", float32")[0] for line in done.stdout.splitlines()]
    assert layouts == ["TP=1, PP=1", "TP=2, PP=1", "TP=1, PP=2"]


TRAINING = """
--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-4 --lr-decay-style constant --log-interval 1
--seq-length 32 --num-workers 0 --finetune --save-interval 2
"""


ON_DEEPSPEED = "--engine deepspeed --zero-stage 3"


@pytest.mark.parametrize("engine", ["", pytest.param(ON_DEEPSPEED, marks=[pytest.mark.slow, needs_deepspeed])])
def test_a_run_starts_from_an_import_in_another_layout_and_is_exported(tmp_path, engine):
    hf = write_model("mistral", tmp_path / "hf")
    code, _, err = _forked("import", "--hf", hf, "--save", tmp_path / "save")
    assert code == 0, err
    text = prepare_text(tmp_path)
    command = ["--config", str(tmp_path / "save" / "model.yaml"), "--load", str(tmp_path / "save"), *TRAINING.split()]
    command += ["--train-data-path", text.prefix("zh/poetry"), "--data-cache-path", str(tmp_path / "cache")]
    command += ["--save", str(tmp_path / "run"), "--tensor-model-parallel-size", "2", *engine.split()]
    ranks = 4 if engine else 2
    ended = start(command, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.err

    code, _, err = _forked("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")

    assert code == 0, err
    before, after = Tensors(hf), Tensors(tmp_path / "out")
    changes = {name: (before.read(name) - after.read(name)).abs().max().item() for name in before.shapes}
    assert all(0 < change < 1e-2 for change in changes.values()), changes


def test_what_is_no_gguf_file_is_not_unpacked_and_leaves_nothing(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    code, _, said = _forked("unpack", "--gguf", tmp_path / "broken.gguf", "--hf", tmp_path / "out")
    assert code == 2
    assert "broken.gguf must be a GGUF file that transformers reads" in said
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # four whole programs; 180 s on a busy machine
def test_smollm2_goes_in_from_its_gguf_and_comes_out_saying_the_same(tmp_path):
    gguf = smollm2_gguf()
    done = _tool("import", "--hf", gguf, "--save", tmp_path / "save")
    assert done.returncode == 0, done.stderr
    done = _tool("export", "--load", tmp_path / "save", "--hf", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    done = _tool("verify", "--load", tmp_path / "save", "--hf", tmp_path / "out", "--gate", "fp32")
    assert done.returncode == 0, done.stderr

    done = _tool("unpack", "--gguf", gguf, "--hf", tmp_path / "unpacked")
    assert done.returncode == 0, done.stderr
    assert _says(tmp_path / "out") == _says(tmp_path / "unpacked")


def _says(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    given = tokenizer("The capital of France is", return_tensors="pt")
    return tokenizer.decode(model.generate(**given, max_new_tokens=20, do_sample=False)[0])
