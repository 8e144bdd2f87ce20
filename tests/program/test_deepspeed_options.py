"""What Megatron's flags and DeepSpeed's file offer beside stages and layouts holds on DeepSpeed too."""

import json
from pathlib import Path

import pytest
from torch.testing import assert_close

from megatron_sat.engines import zero_adam
from tests.helpers.program import SPARSE, Text, Trained, trained
from tests.helpers.slow import mostly_slow
from tests.helpers.tolerances import RUN_LOSS_BF16
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_deepspeed import SHARDED
from tests.program.test_layouts import TP, WIDE, assert_same_run

pytestmark = needs_deepspeed
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
QK = "--qk-layernorm"
OPTIONS = {
    "recomputation": (2, f"--zero-stage 2 {RECOMPUTE}", f"{WIDE} {RECOMPUTE}"),
    "recomputation, zero 1": (2, f"--zero-stage 1 {RECOMPUTE}", f"{WIDE} {RECOMPUTE}"),
    "recomputation, zero 3": (2, f"--zero-stage 3 {RECOMPUTE}", f"{WIDE} {RECOMPUTE}"),
    "recomputed modules, zero 3": (
        2,
        "--zero-stage 3 --recompute-granularity selective --recompute-modules core_attn mlp",
        f"{WIDE} --recompute-granularity selective --recompute-modules core_attn mlp",
    ),
    "context parallelism": (2, "--zero-stage 1 --context-parallel-size 2", ""),
    "context parallelism, zero 3": (2, "--zero-stage 3 --context-parallel-size 2", ""),
    "the mean over tokens": (
        2,
        "--zero-stage 2 --calculate-per-token-loss --eod-mask-loss",
        f"{WIDE} --calculate-per-token-loss --eod-mask-loss",
    ),
    "no clipping": (2, "--zero-stage 2 --clip-grad 0", f"{WIDE} --clip-grad 0"),
    "no clipping, zero 0": (2, "--zero-stage 0 --clip-grad 0", f"{WIDE} --clip-grad 0"),
    "norms of queries and keys, tp 2": (2, f"--zero-stage 3 {TP} {QK}", QK),
    "a decoupled rate": (2, "--zero-stage 2 --decoupled-lr 3e-4", f"{WIDE} --decoupled-lr 3e-4"),
    "biases, tp 2, sequence parallel": (2, f"--zero-stage 1 {TP} --sequence-parallel --add-qkv-bias", "--add-qkv-bias"),
}


@pytest.fixture(scope="module")
def text(text: Text) -> Text:
    load_library()
    return text


def run(text: Text, folder: Path, flags: str, *, ranks: int = 1, file: str = SHARDED) -> Trained:
    """From random weights, which depend on no layout here."""
    if "--zero-stage" in flags:
        (folder / "ds.json").write_text(file)
        flags += f" --engine deepspeed --deepspeed-config {folder / 'ds.json'}"
    jsonl = folder / f"{len(list(folder.iterdir()))}.jsonl"
    return trained(text.command(f"{SPARSE} {flags}"), jsonl, ranks=ranks)


@pytest.mark.parametrize("option", mostly_slow(OPTIONS, fast=()))
def test_an_option_trains_as_on_megatrons_engine(option: str, text: Text, tmp_path: Path) -> None:
    ranks, flags, alone = OPTIONS[option]
    assert_same_run(run(text, tmp_path, flags, ranks=ranks), run(text, tmp_path, alone))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_embeddings_train_alike(stage: int, text: Text, tmp_path: Path) -> None:
    def tied(flags: str, ranks: int) -> Trained:
        argv = text.command(flags, without="--untie-embeddings-and-output-weights")
        return trained(argv, tmp_path / f"{ranks}.jsonl", ranks=ranks)

    (tmp_path / "ds.json").write_text(SHARDED)
    on = f"--engine deepspeed --zero-stage {stage} --deepspeed-config {tmp_path / 'ds.json'}"
    assert_same_run(tied(on, 2), tied(WIDE, 1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_replicas_that_choose_alone_choose_as_on_megatrons_engine(stage: int, text: Text, tmp_path: Path) -> None:
    local = "--sat-dp-selection local --sat-selection top-k"
    assert_same_run(run(text, tmp_path, f"--zero-stage {stage} {local}", ranks=2), run(text, tmp_path, local, ranks=2))


FILES = {
    "the defaults of stage 3": (3, {}),
    "an offloaded optimizer": (2, {"offload_optimizer": {"device": "cpu"}}),
    "everything offloaded": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    "small buckets": (2, {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000, "overlap_comm": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_tunes_without_changing_the_run(
    name: str, text: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a compiler; with one: test_deepspeed_on_host."""
    monkeypatch.setattr(zero_adam, "_compiled_everywhere", lambda _: "no compiler")
    stage, zero = FILES[name]
    file = json.dumps({"zero_optimization": zero})
    assert_same_run(run(text, tmp_path, f"--zero-stage {stage}", ranks=2, file=file), run(text, tmp_path, WIDE))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_megatrons(stage: int, text: Text, tmp_path: Path) -> None:
    one = run(text, tmp_path, f"--bf16 {WIDE}")
    two = run(text, tmp_path, f"--bf16 --zero-stage {stage}", ranks=2)
    assert_close(two.losses, one.losses, **RUN_LOSS_BF16)
    fp32 = run(text, tmp_path, WIDE)
    assert two.losses != fp32.losses
