"""The launch scripts: each one's dry run as it stands; hosts, Slurm, and what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.slow import mostly_slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("pretrain_*.sh"))
OUTER = re.compile(
    r"SLURM_|NCCL_|DS_|OMP_|CUDA_DEV|MASTER_|REPLAY|(MODEL|DATA|VALID|SAVE|HOSTS|HOSTFILE|NODES|GPUS?|ENGINE|NODE_RANK|"
    r"LAUNCHER)$"
)


def call(script: str, *arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a script with these variables and no others that it knows."""
    environment = {name: value for name, value in os.environ.items() if not OUTER.match(name)}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: str(value) for name, value in variables.items()}
    command = [str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def things(tmp_path: Path) -> dict[str, object]:
    """What a run needs: a checkpoint's folder, data, a place to save; and a Python that says what it is asked for."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "model" / "model.yaml").write_text("vocab_size: 65000\n")
    for ending in ("bin", "idx"):
        (tmp_path / f"zh.{ending}").touch()
    said = 'echo "rank ${RANK:-} of ${WORLD_SIZE:-} here ${LOCAL_RANK:-} of ${LOCAL_WORLD_SIZE:-}: $*"'
    return {
        "MODEL": tmp_path / "model",
        "DATA": f"zh={tmp_path}/zh",
        "SAVE": tmp_path / "save",
        "PYTHON": program(tmp_path / "python", said),
    }


# -- as they stand


def test_there_is_a_script_for_each_model_of_the_paper() -> None:
    assert SCRIPTS == ["pretrain_llama2_13b.sh", "pretrain_llama2_7b.sh", "pretrain_tinyllama_1.1b.sh"]


PAPER = {
    "pretrain_tinyllama_1.1b.sh": ("a100", "tensor 1 x pipeline 1 x context 1 x data 32", 0.561),
    "pretrain_llama2_7b.sh": ("a800", "tensor 2 x pipeline 1 x context 1 x data 16", 0.511),
    "pretrain_llama2_13b.sh": ("h100", "tensor 2 x pipeline 2 x context 1 x data 8", 0.512),
}
"""By script: a GPU, the layout, and the share of a dense step's operations that a step at rate .5 executes."""


@pytest.mark.parametrize("script", mostly_slow(SCRIPTS, fast=PAPER.keys() - {"pretrain_tinyllama_1.1b.sh"}))
def test_a_dry_run_says_the_papers_run_on_its_cluster_and_ends(script: str) -> None:
    gpu, layout, share = PAPER[script]
    done = call(script, DRY_RUN=1, GPU=gpu)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert f"32 {gpu} on 4 host(s) = {layout}" in said
    for line in ("lr: 5.0e-05", "lr_decay_style: cosine", "global_batch_size: 1024", "seq_length: 4096"):
        assert f"  {line}\n" in said
    assert re.search(rf"1-2000 +│ +2000 │ 0.5 .*│ {share} │", said)
    assert re.search(r"2484-3000 +│ +517 │ 0 .*│ 1.000 │", said)
    assert "3,000 steps of 4,194,304 tokens" in said
    assert f"dry run: the settings fit each other and 32 {gpu}; nothing was run" in said
    assert "not on this machine: --load /path/of/MODEL/latest_checkpointed_iteration.txt" in said
    assert said.splitlines()[-1].startswith("+ ") and "--nnodes 4 --node-rank NODE_RANK" in said.splitlines()[-1]


# -- what is missing


@pytest.mark.parametrize("name", ["MODEL", "DATA", "SAVE"])
def test_what_is_not_set_is_named(name: str, things: dict[str, object]) -> None:
    del things[name]
    done = call("pretrain_llama2_7b.sh", **things)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pretrain_llama2_7b.sh: {name} must be")
    assert "it is not set" in line


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"DATA": "zh=/none/zh"}, "DATA, REPLAY and VALID must name data sets, /none/zh.bin or .idx is not there;"),
        ({"VALID": "/none/en"}, "DATA, REPLAY and VALID must name data sets, /none/en.bin or .idx is not there;"),
        ({"MODEL": "/none"}, "MODEL must be a folder with a checkpoint, /none has no latest_checkpointed_iteration"),
        ({"HOSTFILE": "/none"}, "HOSTFILE must be a file with a host a line, /none is not there"),
        ({"HOSTFILE": "/dev/null"}, "HOSTFILE must be a file with a host a line, /dev/null is not there"),
        ({"GPUS": "all"}, "GPUS must be a whole number above 0, got 'all'"),
        ({"NODES": "0"}, "NODES must be a whole number above 0, got '0'"),
        ({"NODES": "2"}, "NODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR on every host; or set HOSTS"),
        ({"ENGINE": "jax"}, "ENGINE must be megatron or deepspeed, got jax"),
    ],
)
def test_what_cannot_be_is_one_line(changed: dict[str, object], said: str, things: dict[str, object]) -> None:
    done = call("pretrain_llama2_7b.sh", **things | changed)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pretrain_llama2_7b.sh: {said}")


def test_an_empty_hostfile_is_refused(things: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# nobody\n\n")
    done = call("pretrain_llama2_7b.sh", **things, HOSTFILE=tmp_path / "hosts")
    assert (done.returncode, "names none" in done.stderr) == (2, True)


# -- starting


def test_one_host_is_started_by_torchrun_here(things: dict[str, object]) -> None:
    done = call("pretrain_llama2_7b.sh", "--lr", "1e-5", **things, REPLAY=things["DATA"], VALID=things["DATA"], GPUS=4)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "-m torch.distributed.run --nproc-per-node 4 --standalone" in line
    data = things["DATA"]
    assert f"--train-data-path {data} --replay-data-path {data} --replay-share 0.2 --valid-data-path {data}" in line
    model = things["MODEL"]
    configs = f"{EXAMPLES}/configs/continual.yaml {EXAMPLES}/configs/megatron.yaml {model}/model.yaml"
    assert f"{configs} --load {model} --finetune --save" in line
    assert line.endswith("--lr 1e-5")


def test_a_second_start_goes_on_where_the_run_was(things: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("250")
    done = call("pretrain_llama2_7b.sh", **things)
    assert f"--load {tmp_path}/save --save {tmp_path}/save" in done.stdout
    assert "--finetune" not in done.stdout


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    """An ssh whose hosts are this machine; `bad` does not work, `slow` takes a minute."""
    text = """
        while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
        host=$1; shift
        case $host in bad) exit 7 ;; slow) exec sleep 60 ;; esac
        bash -c "$*" | sed "s/^/$host: /"
    """
    return program(tmp_path / "ssh", text)


def test_hosts_get_their_ranks_and_the_first_one_to_meet_at(things: dict[str, object], ssh: Path) -> None:
    done = call("pretrain_llama2_7b.sh", **things, SSH=ssh, HOSTS="a b c", NCCL_DEBUG="IN FO")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    for rank, (host, line) in enumerate(zip("abc", lines, strict=True)):
        assert line.startswith(f"{host}: ")
        assert f"--nnodes 3 --node-rank {rank} --master-addr a --master-port 29500" in line


def test_a_hostfile_of_deepspeed_is_understood(things: dict[str, object], ssh: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\n# not this one\nb slots=8\n")
    done = call("pretrain_llama2_7b.sh", **things, SSH=ssh, HOSTFILE=tmp_path / "hosts")
    assert [line[:3] for line in sorted(done.stdout.splitlines())] == ["a: ", "b: "]


def test_a_host_that_fails_ends_the_others(things: dict[str, object], ssh: Path) -> None:
    done = call("pretrain_llama2_7b.sh", **things, SSH=ssh, HOSTS="slow bad")
    assert done.returncode == 7


def test_deepspeeds_launcher_gets_its_hostfile_and_environment(things: dict[str, object], tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=8\nb slots=8\n")
    variables = {**things, "LAUNCHER": "deepspeed", "ENGINE": "deepspeed", "NCCL_DEBUG": "INFO"}
    done = call("pretrain_llama2_7b.sh", **variables, HOSTFILE=hostfile)
    assert done.returncode == 0, done.stderr
    assert f"-m deepspeed.launcher.runner --hostfile {hostfile} --launcher pdsh --force_multi" in done.stdout
    assert "--master_addr a --master_port 29500 --no_local_rank" in done.stdout
    assert "configs/deepspeed.yaml" in done.stdout and "--engine deepspeed" in done.stdout
    environment = (tmp_path / "save" / "deepspeed.env").read_text().splitlines()
    assert {"OMP_NUM_THREADS=1", "CUDA_DEVICE_MAX_CONNECTIONS=1", "NCCL_DEBUG=INFO"} <= set(environment)
    missing = call("pretrain_llama2_7b.sh", **variables)
    assert "LAUNCHER=deepspeed needs HOSTFILE" in missing.stderr
    hostfile.write_text("a\nb\n")
    plain = call("pretrain_llama2_7b.sh", **variables, HOSTFILE=hostfile)
    assert (plain.returncode, "HOSTFILE must say slots" in plain.stderr) == (2, True)


def slurm(folder: Path, *, code: int) -> dict[str, object]:
    """A job of two hosts with a task each, whose ranks end with ``code``."""
    tasks = """
        [ "$1 $2" = "--wait 120" ] || exit 99
        shift 2
        for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NTASKS=2 "$@" || code=$?; done
        exit ${code:-0}
    """
    program(folder / "srun", tasks)
    asked = f'echo "scontrol $*" >>{folder}/asked'
    program(folder / "scontrol", f'[ "$1" = show ] && printf "first\\nsecond\\n" || {asked}')
    said = 'echo "rank $RANK of $WORLD_SIZE here of $LOCAL_WORLD_SIZE at $MASTER_ADDR $1"'
    program(folder / "python", f"{said}; exit {code}")
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": 41,
        "SLURM_JOB_NODELIST": "[first,second]",
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_TASKS_PER_NODE": "1(x2)",
    }


def test_under_slurm_a_task_is_a_rank(things: dict[str, object], tmp_path: Path) -> None:
    done = call("pretrain_llama2_7b.sh", **things | slurm(tmp_path, code=0))
    assert done.returncode == 0, done.stderr
    program_path = ROOT / "pretrain_sat.py"
    assert done.stdout.splitlines() == [f"rank {rank} of 2 here of 1 at first {program_path}" for rank in (0, 1)]
    assert not (tmp_path / "asked").exists()


def test_under_slurm_the_run_minds_the_signal(things: dict[str, object], tmp_path: Path) -> None:
    variables = things | slurm(tmp_path, code=0)
    program(tmp_path / "python", 'echo "$*"')
    done = call("pretrain_llama2_7b.sh", **variables)
    assert "--exit-signal-handler --exit-signal SIGUSR1 --requeue-exit-code 75" in done.stdout


@pytest.mark.parametrize(("code", "asked"), [(75, True), (1, False)])
def test_only_a_run_that_asks_for_it_is_started_again(
    code: int, asked: bool, things: dict[str, object], tmp_path: Path
) -> None:
    done = call("pretrain_llama2_7b.sh", **things | slurm(tmp_path, code=code))
    assert done.returncode == code
    assert (tmp_path / "asked").exists() == asked
    if asked:
        assert (tmp_path / "asked").read_text() == "scontrol requeue 41\n"


def test_sbatch_runs_a_copy_that_finds_the_repository(things: dict[str, object], tmp_path: Path) -> None:
    copy = tmp_path / "slurm_script"
    copy.write_text((EXAMPLES / "pretrain_llama2_7b.sh").read_text())
    copy.chmod(0o755)
    environment = slurm(tmp_path, code=0)
    done = call(str(copy), **things | environment, SLURM_SUBMIT_DIR=ROOT)
    assert done.returncode == 0, done.stderr
    lost = call(str(copy), **things | environment, SLURM_SUBMIT_DIR=tmp_path)
    assert (lost.returncode, "run sbatch in the repository's root" in lost.stderr) == (2, True)


def test_a_task_outside_of_slurm_is_refused() -> None:
    done = call("launch/slurm_rank.sh", "true")
    assert done.returncode == 2
    assert done.stderr.startswith("slurm_rank.sh: SLURM_PROCID must be set")


def test_every_script_asks_slurm_for_the_signal_and_another_start() -> None:
    for script in SCRIPTS:
        text = (EXAMPLES / script).read_text()
        assert "#SBATCH --signal=USR1@600\n#SBATCH --requeue\n" in text
