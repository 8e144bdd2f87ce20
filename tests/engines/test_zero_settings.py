"""DeepSpeed's configuration: the flags rule, a file tunes, and what contradicts or is not supported is named."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.engines.zero_settings import TUNABLE, Said, merge, offloads, read_file, stage_in

SAID = Said(
    zero_stage=2,
    micro_batch_size=2,
    global_batch_size=16,
    num_micro_batches=4,
    clip_grad=1.0,
    bf16=True,
    fp32_gradients=True,
)
AGREEING = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale_window": 1000},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 2},
}


def test_a_file_that_says_the_same_or_auto_changes_nothing() -> None:
    alone = merge({}, said=SAID)
    assert merge(AGREEING, said=SAID) == alone
    auto = {key: "auto" for key in AGREEING if not isinstance(AGREEING[key], dict)}
    auto |= {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": "auto", "overlap_comm": "auto"}}
    assert merge(auto, said=SAID) == alone


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_batch_size": 32}, "train_batch_size of --deepspeed-config (32) and --global-batch-size 16 must"),
        ({"train_micro_batch_size_per_gpu": 4}, "(4) and --micro-batch-size 2 must say the same; change one of them,"),
        ({"gradient_accumulation_steps": 1}, "(1) and --global-batch-size 16 on these replicas (4 micro-batches) must"),
        ({"gradient_clipping": 0.5}, "gradient_clipping of --deepspeed-config (0.5) and --clip-grad 1.0 must say"),
        ({"bf16": {"enabled": False}}, "bf16.enabled of --deepspeed-config (False) and --bf16 must say the same"),
        ({"fp16": {"enabled": True}}, "fp16.enabled of --deepspeed-config (True) and no --fp16 must say the same"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "(bf16) and --accumulate-allreduce-grads-in-fp32 must say"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage of --deepspeed-config (3) and --zero-stage 2"),
    ],
)
def test_a_contradiction_names_both_sides(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        merge(content, said=SAID)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer in --deepspeed-config is not supported; use --optimizer, --lr"),
        ({"scheduler": {}}, "scheduler in --deepspeed-config is not supported; use --lr-decay-style"),
        ({"tensor_parallel": {}}, "tensor_parallel in --deepspeed-config is not supported; use --tensor-model-parall"),
        ({"elasticity": {}}, "elasticity in --deepspeed-config is not supported; no run here was tried with it, and"),
        ({"bf16": True}, "bf16 in --deepspeed-config must hold keys and values, got True; mend it"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "bf16.immediate_grad_update in --deepspeed-conf"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights in --deep"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device in --deepspeed-config must be cpu or none, got nvme; use cpu",
        ),
        (
            {"zero_optimization": {"offload_param": {"nvme_path": "/x"}}},
            "zero_optimization.offload_param in --deepspeed-config may hold device and pin_memory, got {'nvme_path'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        merge(content, said=SAID)


def test_a_file_tunes_zero() -> None:
    zero = {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}
    merged = merge({"zero_optimization": zero, "wall_clock_breakdown": True}, said=SAID)
    assert merged["zero_optimization"] == zero
    assert merged["wall_clock_breakdown"] is True
    assert offloads(merged) == ["offload_optimizer"]
    assert offloads(merge({"zero_optimization": {"offload_param": {"device": "none"}}}, said=SAID)) == []


def test_gradients_are_in_fp32_unless_bf16_is_asked_for() -> None:
    half = merge({}, said=replace(SAID, fp32_gradients=False))
    assert (half["data_types"], half["communication_data_type"]) == ({"grad_accum_dtype": "bf16"}, "bf16")
    assert merge({}, said=replace(SAID, bf16=False, fp32_gradients=False))["communication_data_type"] == "fp32"


def test_the_stage_in_a_file_may_be_left_open() -> None:
    assert stage_in({}) is stage_in({"zero_optimization": {"stage": "auto"}}) is None
    assert stage_in({"zero_optimization": {"stage": 0}}) == 0
    with pytest.raises(ValueError, match="zero_optimization.stage of --deepspeed-config must lie in a mapping"):
        stage_in({"zero_optimization": 3})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "--deepspeed-config must hold keys and values, "),
        ("{", "--deepspeed-config must be JSON, "),
        ('{"a": 1, "a": 2}', "a is given twice; mend it"),
        (None, "--deepspeed-config must be a readable file, "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_file(str(path))


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AGREEING))
    assert read_file(str(path)) == AGREEING


def test_every_tunable_key_is_one_of_deepspeeds() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    names = set(config.model_fields) | {field.alias for field in config.model_fields.values()}
    assert names >= TUNABLE
