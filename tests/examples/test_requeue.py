"""A job from Slurm's signal to its next start: a script of examples/ with real ranks, and a Slurm of two programs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.examples.test_launch import EXAMPLES, ROOT, program
from tests.helpers.program import TOKENIZER, Text, prepare_text

pytestmark = pytest.mark.slow
TINY = """
tokenizer_type: SentencePieceTokenizer
num_layers: 2
hidden_size: 64
num_attention_heads: 8
num_query_groups: 4
ffn_hidden_size: 96
seq_length: 32
max_position_embeddings: 32
"""
SMALL = """
--no-bf16 --vocab-size 4096 --make-vocab-size-divisible-by 64 --global-batch-size 4 --micro-batch-size 1 --train-iters
4000 --log-interval 1 --eval-iters 0 --num-workers 0 --save-interval 2000 --preflight
"""
SRUN = """
shift 2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & pids+=($!); done
echo "${pids[@]}" >"$0.pids"
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""
SCONTROL = '[ "$1" = show ] && echo 127.0.0.1 || echo "scontrol $*" >>"$0.asked"'


@pytest.fixture
def job(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """A command and its environment: a run of two ranks whose first steps are saved."""
    text: Text = prepare_text(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "model" / "model.yaml").write_text(f"{TINY}tokenizer_model: {TOKENIZER}\n")
    program(tmp_path / "srun", SRUN)
    program(tmp_path / "scontrol", SCONTROL)
    data = f"zh={text.prefix('zh/poetry')}"
    small = [*SMALL.split(), "--data-cache-path", str(tmp_path / "cache")]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "2",
        "MODEL": str(tmp_path / "model"), "DATA": data, "SAVE": str(tmp_path / "save"),
    }  # fmt: skip
    configs = [str(EXAMPLES / "configs" / f"{name}.yaml") for name in ("tinyllama_1.1b", "continual", "megatron")]
    configs.append(str(tmp_path / "model" / "model.yaml"))
    first = [sys.executable, str(ROOT / "pretrain_sat.py"), "--config", *configs]
    first += ["--train-data-path", data, "--save", str(tmp_path / "save"), *small, "--exit-interval", "2"]
    subprocess.run(first, env=environment, check=True, capture_output=True, timeout=200)
    return [str(EXAMPLES / "pretrain_tinyllama_1.1b.sh"), *small], environment


def test_a_signal_before_the_end_saves_and_asks_for_another_start(
    job: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    command, environment = job
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + 100
            while "\nstep " not in (tmp_path / "log").read_text() and running.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            for pid in (tmp_path / "srun.pids").read_text().split():
                os.kill(int(pid), signal.SIGUSR1)
            code = running.wait(timeout=100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert code == 75, said[-3000:]
    assert f"resumed from {tmp_path}/save/iter_0000002 at step 2" in said
    assert "asked to stop by signal: saving and ending" in said
    assert (tmp_path / "scontrol.asked").read_text() == f"scontrol requeue {environment['SLURM_JOB_ID']}\n"
    assert int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text()) > 2
