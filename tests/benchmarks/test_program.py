"""Where a result comes from: a command that can be given again."""

import shlex

import pytest

from benchmarks.program import about


def test_the_command_keeps_its_quotes(monkeypatch: pytest.MonkeyPatch):
    words = ["bench_step.py", "--flags=--layer-graphs --cross-entropy-loss-fusion", "--out", "step.json"]
    monkeypatch.setattr("sys.argv", ["anywhere/" + words[0], *words[1:]])
    command = about()["command"]
    assert shlex.split(command) == ["python", "benchmarks/bench_step.py", *words[1:]]
