"""A rehearsed run: the cluster's own configuration, what is said of it, and when it is refused."""

import re
from pathlib import Path

import pytest

from megatron_sat import cli
from megatron_sat.build import build_run
from megatron_sat.engines.sparse_reduce import ROUND
from megatron_sat.pretrain import main
from megatron_sat.rehearsal.cluster import Cluster
from megatron_sat.rehearsal.memory import GIB, Memory
from megatron_sat.rehearsal.rehearse import _optimizer_bytes, _shards, layers_by_rank, memory_of, take
from tests.helpers.command_line import LADDER, llama, run
from tests.helpers.program import LADDER as SHORT_LADDER
from tests.helpers.program import Text, prepare_text
from tests.helpers.ranks import run_ranks


def dry(capsys: pytest.CaptureFixture[str], more: str = "", *, argv: list[str] | None = None) -> tuple[int, str, str]:
    code = main([*(llama() if argv is None else argv), "--dry-run", *more.split()])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_is_resolved_for_the_ranks_and_the_gpu_of_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dry(capsys, f"{LADDER} --world-size 4 --gpu h100 --gpus-per-host 2 --bf16")
    assert (code, err) == (0, "")
    assert "distributed_backend: nccl" in out
    assert "accumulate_allreduce_grads_in_fp32: true" in out
    assert "4 h100 on 2 host(s) = tensor 1 x pipeline 1 x context 1 x data 4" in out
    assert "global batch 8 = 2 samples x 4 replicas x 1 micro-batches" in out
    assert "100 steps of 512 tokens" in out
    assert "dry run: the settings fit each other and 4 h100; nothing was run" in out


def test_without_a_cluster_it_is_the_ranks_there_are_of_a100(capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 a100 on 1 host(s)" in dry(capsys)[1]


def test_what_cannot_be_is_refused_as_in_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dry(capsys, "--world-size 3 --tensor-model-parallel-size 2")
    assert (code, out) == (2, "")
    assert err.startswith("error: the number of ranks (3) must be a multiple of --tensor-model-parallel-size")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--gpu v100", "error: --gpu must be one of a100"),
        ("--world-size many", "error: --world-size: invalid int value: 'many'"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_line(more: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dry(capsys, more)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(said)


@pytest.mark.parametrize("name", ["--gpu a800", "--world-size 8", "--gpus-per-host 4"])
def test_a_cluster_without_a_dry_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.split()[0]} describes the cluster of a --dry-run, got it without"):
        take(name.split(), world_size=1)


def test_the_rest_of_the_command_line_is_left_to_the_run() -> None:
    cluster, rest = take(["--lr", "1", "--dry-run", "--gpu=a800", "--bf16"], world_size=6)
    assert (cluster, rest) == (Cluster(gpu="a800", world_size=6), ["--lr", "1", "--bf16"])
    assert take(["--lr", "1"], world_size=6) == (None, ["--lr", "1"])


HUGE = "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672 --num-query-groups 8"


def test_what_does_not_fit_the_memory_is_refused_after_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dry(capsys, f"{HUGE} --bf16 --world-size 4")
    assert (code, "an estimate" in out, "nothing was run" in out) == (2, True, False)
    assert err.startswith("error: a GPU must hold the estimate with room to spare (72.9 GiB of an a100), got 1")
    assert "try a smaller --micro-batch-size, --use-distributed-optimizer" in err


def test_what_the_machine_lacks_is_said_and_not_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = llama("--tokenizer-type HuggingFaceTokenizer", without="--tokenizer-type --vocab-size")
    more = f"--tokenizer-model {tmp_path}/none --load {tmp_path}"
    code, _, err = dry(capsys, more, argv=argv)
    assert code == 2
    assert err.startswith(f"error: --tokenizer-model ({tmp_path}/none) must be on this machine where neither")
    code, out, _ = dry(capsys, f"{more} --vocab-size 200", argv=argv)
    assert code == 0
    assert "the tokenizer is not on this machine: the vocabulary is taken to have 256 rows" in out
    assert f"not on this machine: --tokenizer-model {tmp_path}/none" in out
    assert "not on this machine: --data-path data/en.bin, .idx" in out
    assert f"not on this machine: --load {tmp_path}/latest_checkpointed_iteration.txt" in out
    assert "0 of 4 paths are on this machine" in out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return prepare_text(tmp_path_factory.mktemp("text"))


def test_data_that_are_here_are_counted_in_epochs(text: Text, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dry(capsys, argv=text.command(SHORT_LADDER))
    assert code == 0
    assert "epochs: poetry" in out
    assert "5 of 5 paths are on this machine" in out


def test_data_that_cannot_be_used_are_refused(text: Text, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = dry(capsys, argv=text.command("--seq-length 65536 --max-position-embeddings 65536"))
    assert (code, "must hold one sample" in err) == (2, True)


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.mark.parametrize("gpu", ["a100", "a800", "h100"])
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("model", ["tinyllama_1.1b", "llama2_7b", "llama2_13b"])
def test_the_papers_runs_fit_their_gpus(
    model: str, engine: str, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(CONFIGS / f"{name}.yaml") for name in (model, "continual", engine)]
    paths = ["--tokenizer-model", "/none", "--train-data-path", "/none"]
    argv = ["--config", *files, "--engine", engine, *paths, "--world-size", "32", "--gpu", gpu]
    code, out, err = dry(capsys, argv=argv)
    assert (code, err) == (0, "")
    assert f"the settings fit each other and 32 {gpu}" in out
    assert "warning: tensor" not in out


@pytest.mark.parametrize("method", ["", "mst", "mst-structured"])
def test_gpt2_small_is_124_million_parameters_and_fits_one_gpu(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--baseline {method} --mst-rate 0.8 --mst-warmup 2000 --mst-restoration 4000" if method else ""
    paths = ["--tokenizer-model", "/none", "--train-data-path", "/none"]
    code, out, err = dry(capsys, argv=["--config", str(CONFIGS / "gpt2-small.yaml"), *paths, *flags.split()])
    assert (code, err) == (0, "")
    assert "50304 rows" in out and "dry run: the settings fit each other and 1 a100" in out
    number = 124_439_808 + (50304 - 50257) * 768  # as published, and the padding of the vocabulary
    assert re.search(rf"gradients +│ {4 * number / GIB:.2f} ", out)
    assert re.search(rf"optimizer +│ {12 * number / GIB:.2f} ", out)


# -- memory, from settings

GPT2 = "--swiglu --normalization --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type"
"""Left out of the command line, they leave Megatron-LM's defaults: GPT-2's, but for grouped queries."""


@pytest.mark.parametrize("without", ["", GPT2], ids=["llama", "gpt2"])
def test_the_estimate_of_a_run_knows_its_state_to_the_byte(without: str, text: Text) -> None:
    """Weights, gradients and Adam's moments of a model that is built; the distributed optimizer pads its parts."""

    def state(_: int, argv: list[str]) -> tuple[Memory, int]:
        built = build_run(cli.parse(argv, world_size=1, cuda=False))
        memory = memory_of(built.config, shape=built.shape, plan=built.plan)
        return memory, sum(p.numel() for chunk in built.engine.chunks for p in chunk.parameters())

    ((memory, number),) = run_ranks(state, 1, text.command(SHORT_LADDER, without=without))
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * number, 4 * number, 8 * number)
    assert memory.packed > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_stages_divide_the_state(stage: int) -> None:
    config = run(f"--engine deepspeed --zero-stage {stage} --bf16", ranks=4)
    shards = _shards(config, weight=2, gradient=4)
    assert (shards.optimizer, shards.gradients, shards.weights) == (4, 4 if stage > 1 else 1, 4 if stage > 2 else 1)
    assert shards.buffers >= 10**9


@pytest.mark.parametrize("sharded", ["", "--use-distributed-optimizer"])
def test_what_is_packed_for_the_reduction_lies_beside_the_gradients(sharded: str) -> None:
    without, packing = (
        _shards(run(f"{LADDER} {sharded} {more}", ranks=4), weight=2, gradient=4)
        for more in ("", "--sat-sparse-reduce")
    )
    assert (without.buffers, without.optimizer) == (0, packing.optimizer)
    assert 2 * 4 * ROUND < packing.buffers < 4 * 4 * ROUND  # two rounds under way


def test_an_optimizer_on_the_host_takes_no_memory_of_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    config = run(f"--engine deepspeed --deepspeed-config {tmp_path}/ds.json")
    assert _optimizer_bytes(config, weight=4) == 0


@pytest.mark.parametrize(("flags", "expected"), [("", 8), ("--optimizer sgd", 4)])
def test_the_optimizer_keeps_moments_and_master_weights(flags: str, expected: int) -> None:
    assert [_optimizer_bytes(run(flags), weight=weight) for weight in (4, 2)] == [expected, expected + 4]


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("", 1, (4,)),
        ("--pipeline-model-parallel-size 2", 2, (2, 2)),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2, (1, 3)),
        ("--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1", 2, (3, 1)),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|t|tL", 2, (2, 2)),
    ],
)
def test_layers_are_those_of_each_pipeline_rank(flags: str, ranks: int, expected: tuple[int, ...]) -> None:
    assert layers_by_rank(run(flags, ranks=ranks)) == expected
