"""What the profile of a step says, from a trace that is small enough to add up by hand."""

from pathlib import Path

import pytest

from benchmarks import profile_step
from benchmarks.program import Size

SIZE = Size(model="tiny", layers=1, seq_length=8, micro_batch_size=1, micro_batches=1)


GRAPH, EAGER = 7, 8


def launch(name: str, *, start: int, micros: int, call: int = EAGER) -> dict[str, object]:
    """A kernel as the profiler writes it; call: of the host, that launched it."""
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": micros, "args": {"correlation": call}}


DENSE = [
    launch("nvjet_sm90_tst", start=0, micros=600, call=GRAPH),
    launch("cudnn_sdpa_flash_fprop", start=600, micros=100, call=GRAPH),
    launch("triton_red_fused_mean_rsqrt", start=700, micros=100, call=GRAPH),
    launch("nvjet_sm90_tst", start=900, micros=100),
    launch("multi_tensor_apply_kernel", start=950, micros=100),
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9, "args": {"correlation": GRAPH}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9, "args": {"correlation": EAGER}},
]


def work_of(trace: list[dict[str, object]]) -> list[profile_step.Work]:
    return profile_step.launches(trace)


def test_launches_are_told_apart_by_place_and_kind() -> None:
    found = profile_step.by_kind(work_of(DENSE))
    assert found == pytest.approx(
        {
            "layers: products": 600e-6,
            "layers: attention": 100e-6,
            "layers: norms": 100e-6,
            "outside: products": 100e-6,
            "outside: optimizer": 100e-6,
        }
    )


def test_the_device_is_idle_where_nothing_overlaps() -> None:
    assert profile_step.idle_seconds(work_of(DENSE)) == pytest.approx(100e-6)


def test_only_heads_and_channels_shrink() -> None:
    """700 of 1000 microseconds become 350."""
    bound = profile_step.amdahl(profile_step.by_kind(work_of(DENSE)), share=0.5)
    assert bound == pytest.approx(1000 / 650)


def test_the_longest_kernels_come_first() -> None:
    longest = profile_step.longest_kernels(work_of(DENSE))
    assert longest[0] == ("nvjet_sm90_tst", pytest.approx(700e-6), 2)


def test_the_report_holds_both_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = [{**DENSE[0], "dur": 300}, *DENSE[1:]]
    found = {"0": work_of(DENSE), "1/2": work_of(half)}
    profile_step.report(found, size=SIZE, share=0.5, out=tmp_path / "found.json")
    said = capsys.readouterr().out
    assert "1.429 times as fast; bound 1.538; reached 92.9% of it" in said
    assert '"speed": 1.42' in (tmp_path / "found.json").read_text()


def test_a_profile_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.arguments([])
    assert "a GPU must be there, found none" in capsys.readouterr().err


def test_the_rate_must_leave_something_and_take_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.arguments(["--rate", "1"])
    assert "--rate must lie between 0 and 1, got 1" in capsys.readouterr().err
