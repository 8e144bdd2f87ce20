"""The settings under --engine deepspeed: what is refused, what is filled in, and what goes to DeepSpeed."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.flags.defaults import Machine
from tests.helpers.command_line import LADDER, refusal, run

ON = "--engine deepspeed"


def file(folder: Path, content: Any) -> str:
    """A file of DeepSpeed's, as flags."""
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"{ON} --deepspeed-config {path}"


REFUSED = [
    ("--pipeline-model-parallel-size 2", 2, "--engine deepspeed needs --pipeline-model-parallel-size 1, got 2: ZeRO"),
    (f"{LADDER} --sat-weights compact", 1, "--engine deepspeed needs --sat-weights gather, got compact: packed gradi"),
    ("--optimizer sgd", 1, "--engine deepspeed needs --optimizer adam, got sgd: DeepSpeed steps on torch's AdamW here"),
    ("--fp16", 1, "--engine deepspeed needs no --fp16, got True: its loss scaling was never compared; use --bf16"),
    ("--exp-avg-dtype bf16", 1, "--engine deepspeed needs --exp-avg-dtype fp32, got bf16: DeepSpeed's moments are"),
    ("--main-grads-dtype bf16", 1, "--engine deepspeed needs --main-grads-dtype fp32, got bf16: use --no-accum"),
    ("--train-only new-embeddings", 1, "--engine deepspeed needs --train-only all, got new-embeddings: its shards"),
    ("--use-distributed-optimizer", 1, "--use-distributed-optimizer is for --engine megatron, got it with --engine d"),
    ("--overlap-grad-reduce", 1, "--overlap-grad-reduce is for --engine megatron, got it with --engine deepspeed; set"),
    ("--ddp-bucket-size 1000", 1, "--ddp-bucket-size is for --engine megatron, got it with --engine deepspeed; set z"),
    ("--gradient-accumulation-fusion", 1, "--gradient-accumulation-fusion is for --engine megatron, got it with"),
    ("--layer-graphs", 1, "--layer-graphs has no effect with model parallelism, recomputation"),
    (f"{LADDER} --sat-sparse-reduce", 2, "--sat-sparse-reduce is for --engine megatron, got it with --engine deeps"),
    ("--bf16 --zero-stage 0", 1, "--bf16 with --engine deepspeed needs --zero-stage 1 or above, got 0: without ZeRO"),
    ("--zero-stage 4", 1, "--zero-stage must be one of 0, 1, 2, 3, got '4'"),
]


@pytest.mark.parametrize(("more", "ranks", "said"), REFUSED)
def test_what_deepspeed_cannot_obey_is_refused(capsys, more, ranks, said):
    assert refusal(capsys, f"{ON} {more}", ranks=ranks).startswith(f"error: {said}")


@pytest.mark.parametrize("more", ["--zero-stage 1", "--deepspeed-config ds.json"])
def test_its_settings_are_refused_with_another_engine(capsys, more):
    name = more.split()[0]
    assert refusal(capsys, more) == f"error: {name} has no effect without --engine deepspeed; leave it out"


def test_only_a_gpu_could_offload_by_megatrons_flag(capsys):
    said = refusal(capsys, f"{ON} --optimizer-cpu-offload", machine=Machine(cuda=True))
    assert said.startswith("error: --optimizer-cpu-offload is for --engine megatron, got it with --engine deep")


def test_the_flags_alone_make_a_whole_configuration():
    config = run(f"{ON} --bf16 --clip-grad 0.5", ranks=2)
    assert (config.weights, config.transformer["gradient_accumulation_fusion"]) == ("gather", False)
    assert config.deepspeed == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }


def test_megatrons_engine_has_no_such_configuration():
    config = run()
    assert (config.deepspeed, "zero_stage" in config.settings) == ({}, False)


def test_the_stage_is_the_flags_or_the_files_or_one(tmp_path):
    asks = file(tmp_path, {"zero_optimization": {"stage": 3}})
    assert run(asks).deepspeed["zero_optimization"] == {"stage": 3}
    assert run(f"{asks} --zero-stage 3").settings["zero_stage"] == 3
    assert run(ON).settings["zero_stage"] == 1
    assert run(f"{ON} --zero-stage 0").deepspeed["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "--zero-stage 2", "zero_optimization.stage of --deepspeed-config (3) a"),
        ({"zero_optimization": {"stage": 5}}, "", "--zero-stage must be 0, 1, 2 or 3, got 5; change zero_optimization"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "--zero-stage 2",
            "zero_optimization.offload_param of --deepspeed-config needs --zero-stage 3, got 2; take it out",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "--zero-stage 0",
            "zero_optimization.offload_optimizer of --deepspeed-config needs --zero-stage 1, got 0; take it out",
        ),
        ("{", "", "--deepspeed-config must be JSON, "),
    ],
)
def test_a_file_that_contradicts_the_flags_is_refused(capsys, tmp_path, content, more, said):
    assert refusal(capsys, f"{file(tmp_path, content)} {more}").startswith(f"error: {said}")


def test_the_other_spelling_of_the_file_is_taken(tmp_path):
    path = file(tmp_path, {}).split()[-1]
    assert run(f"{ON} --deepspeed_config {path}").settings["deepspeed_config"] == path
