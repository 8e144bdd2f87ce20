"""Several hosts on one machine: two agents of torchrun and a rendezvous between them train what one agent does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.program import SPARSE, Text, prepare_text

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
RANKS = "--tensor-model-parallel-size 2 --use-distributed-optimizer"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return prepare_text(tmp_path_factory.mktemp("text"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agent(*torchrun: str, argv: list[str], inside: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """One agent; ``inside``: the command that puts it into a network namespace."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    command = [*inside, sys.executable, "-m", "torch.distributed.run", *torchrun, str(ROOT / "pretrain_sat.py"), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(*agents: subprocess.Popen[str], timeout: int = 200) -> list[tuple[int, str, str]]:
    """Wait for all; whatever happens none outlives this."""
    try:
        outputs = [each.communicate(timeout=timeout) for each in agents]
    finally:
        for each in agents:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
    return [(each.returncode, *output) for each, output in zip(agents, outputs, strict=True)]


def losses(jsonl: Path) -> list[tuple[float, float]]:
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    return [(each["loss"], each["grad_norm"]) for each in records if each["kind"] == "train"]


@pytest.fixture(scope="module")
def alone(text: Text, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Four ranks of one agent."""
    jsonl = tmp_path_factory.mktemp("alone") / "metrics.jsonl"
    argv = text.command(f"{SPARSE} {RANKS} --log-jsonl {jsonl}")
    ((code, out, err),) = finish(agent("--nproc-per-node", "4", "--standalone", argv=argv))
    assert code == 0, err[-3000:]
    assert "preflight:" not in out
    return losses(jsonl)


def static(rank: int, address: str, port: int) -> list[str]:
    meeting = ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(rank)]
    return [*meeting, "--master-addr", address, "--master-port", str(port)]


def dynamic(rank: int, address: str, port: int) -> list[str]:
    del rank  # c10d gives the ranks out
    meeting = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    return [*meeting, "--rdzv-endpoint", f"{address}:{port}", "--local-addr", address]


@pytest.mark.parametrize("meeting", [static, dynamic])
def test_two_agents_train_what_one_does(meeting, text: Text, alone: list[tuple[float, float]], tmp_path: Path) -> None:
    jsonl, port = tmp_path / "metrics.jsonl", free_port()
    argv = text.command(f"{SPARSE} {RANKS} --log-jsonl {jsonl}")
    ended = finish(*[agent(*meeting(rank, "127.0.0.1", port), argv=argv) for rank in (0, 1)])
    assert [code for code, _, _ in ended] == [0, 0], "".join(err[-2000:] for _, _, err in ended)
    said = "preflight: 4 ranks on 2 host(s) are there and alike"
    assert sum(said in out for _, out, _ in ended) == 1
    assert losses(jsonl) == alone
    assert len(alone) == 7


def test_an_agent_with_other_settings_stops_both(text: Text, tmp_path: Path) -> None:
    port = free_port()
    argvs = [text.command(RANKS), text.command(f"{RANKS} --clip-grad 2.0", without="--clip-grad")]
    ended = finish(*[agent(*static(rank, "127.0.0.1", port), argv=argv) for rank, argv in enumerate(argvs)])
    for code, _, err in ended:
        assert code != 0
        assert "error: --clip-grad must be the same on all ranks, it is 1.0 on most and 2.0 on ranks 2-3" in err


@contextmanager
def two_hosts() -> Iterator[list[tuple[str, ...]]]:
    """Commands that run something on either of two hosts: network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip (iproute2), which is not here")
    tag = f"sat{os.getpid() % 10_000}"
    names, made = (f"{tag}a", f"{tag}b"), False
    try:
        for name in names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
            made = True
        cable = f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"
        done = subprocess.run(cable.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a cable between network namespaces is not permitted here: {done.stderr.strip()}")
        for number, name in enumerate(names, start=1):
            for command in (f"addr add 10.77.0.{number}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names if made else ():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_two_hosts_with_networks_of_their_own_train_what_one_does(
    text: Text, alone: list[tuple[float, float]], tmp_path: Path
) -> None:
    jsonl = tmp_path / "metrics.jsonl"
    argv = text.command(f"{SPARSE} {RANKS} --log-jsonl {jsonl}")
    with two_hosts() as hosts:
        agents = [
            agent(*static(rank, "10.77.0.1", 29500), argv=argv, inside=inside, GLOO_SOCKET_IFNAME="eth0")
            for rank, inside in enumerate(hosts)
        ]
        ended = finish(*agents)
    assert [code for code, _, _ in ended] == [0, 0], "".join(err[-2000:] for _, _, err in ended)
    assert losses(jsonl) == alone
