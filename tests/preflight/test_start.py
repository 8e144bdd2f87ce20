"""The preflight of the program itself: ranks that meet at an address, as torchrun would start them on two hosts."""

import contextlib
import io
import os
import socket

import pytest
import torch.distributed as dist

from megatron_sat.pretrain import main
from tests.helpers.command_line import refusal
from tests.helpers.program import Text, prepare_text
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return prepare_text(tmp_path_factory.mktemp("text"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def hosts_of_one(rank: int, argvs: list[list[str]], port: int) -> tuple[int, str, str]:
    """A rank alone on its host runs its own command line."""
    dist.destroy_process_group()
    os.environ.update(MASTER_PORT=str(port), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argvs[rank])
    return code, out.getvalue(), err.getvalue()


def run(*argvs: list[str]) -> list[tuple[int, str, str]]:
    return run_ranks(hosts_of_one, len(argvs), list(argvs), free_port())


def test_two_hosts_are_compared_before_they_train(text: Text) -> None:
    first, second = run(*[text.command("--train-iters 3 --eval-iters 0", without="--train-iters --eval-iters")] * 2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "preflight: 2 ranks on 2 host(s) are there and alike, and reach each other" in first[1]


def test_hosts_with_different_settings_do_not_start(text: Text) -> None:
    ended = run(text.command(), text.command("--lr 2e-3", without="--lr"))
    for code, out, err in ended:
        (line,) = err.splitlines()
        assert (code, out) == (2, "")
        assert line.startswith("error: --lr must be the same on all ranks, it is 0.001 on most and 0.002 on rank 1")


def test_without_a_preflight_nobody_compares(text: Text) -> None:
    short = "--train-iters 3 --eval-iters 0 --no-preflight"
    (code, out, err), _ = run(*[text.command(short, without="--train-iters --eval-iters")] * 2)
    assert (code, "preflight:" in out) == (0, False), err


def test_a_first_host_that_cannot_be_reached_is_said(text: Text) -> None:
    """Rank 1 alone."""
    argv = text.command("--preflight-timeout 1")
    (code, _, err) = run_ranks(lonely, 1, argv, free_port())[0]
    assert code == 5
    assert err.startswith("error: rank 1 must reach the first host within --preflight-timeout: ")


def lonely(_: int, argv: list[str], port: int) -> tuple[int, str, str]:
    os.environ.update(RANK="1", WORLD_SIZE="2")
    return hosts_of_one(0, [argv], port)


def test_a_timeout_must_be_above_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--preflight-timeout must be above 0 s, got 0; leave it out" in refusal(capsys, "--preflight-timeout 0")
