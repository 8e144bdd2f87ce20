"""Two thousand steps in four processes: the run goes on where it was, and no process grows."""

from pathlib import Path

import pytest

from tests.helpers.program import LADDER, Text, open_session, read_records
from tests.helpers.ranks import run_ranks

STEPS, PROCESSES = 2000, 4
SETTLED = 100
"""Steps of a process after which it has all the memory that it will need."""
GROWTH = 1.05
"""Most that it may have later, as a multiple: the allocator's unrest."""
RUN = f"--train-iters {STEPS} {LADDER} --sat-schedule-start 1200 --sat-statistics lagged"
PAUSES = "--log-interval 20 --eval-interval 250 --save-interval 100 --save-keep-last 2"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def watched(_: int, argv: list[str]) -> tuple[int, list[int]]:
    """Train on; the step it ended at, and the memory at each log line."""
    session = open_session(argv)
    seen: list[int] = []
    true = session.log

    def log() -> None:
        true()
        seen.append(resident())

    session.log = log  # type: ignore[method-assign]
    session.train()
    return session.progress.iteration, seen


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_steps_with_resumes_keep_their_memory(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{RUN} {PAUSES} --save {tmp_path} --load {tmp_path}", without="--log-interval --train-iters")
    each = STEPS // PROCESSES
    for process in range(1, PROCESSES + 1):
        ((step, memory),) = run_ranks(watched, 1, [*argv, "--exit-interval", str(each)], timeout=900)
        assert step == process * each
        settled, later = memory[SETTLED // 20 - 1], memory[SETTLED // 20 :]
        assert max(later) <= GROWTH * settled, [size >> 20 for size in memory]
    lines = read_records(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(20, STEPS + 1, 20))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
