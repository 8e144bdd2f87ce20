"""The table as a whole: what a name that is no setting is told, and the page that lists them all."""

from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_sat.flags.document import markdown
from megatron_sat.flags.known import NAMES
from megatron_sat.flags.refused import NEUTRAL, refusal
from megatron_sat.flags.table import complaint, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
OLDER_NAMES = """
--DDP-impl --activations-checkpoint-method --async-tensor-model-parallel-allreduce --checkpoint-num-layers
--data-impl --delay-grad-reduce
--delay-param-gather --disable-chunked-prefill --distribute-checkpointed-activations --enable-one-logger
--encoder-pipeline-model-parallel-size --encoder-tensor-model-parallel-size --export-te-mcore-model
--hybrid-attention-ratio --hybrid-mlp-ratio --keep-fp8-transpose-cache-when-using-custom-fsdp
--kitchen-config-file --kitchen-recipe-number --langrl-external-server --legacy-tokenizer
--load-model-opt-format --log-batch-size-to-tensorboard --mmap-warmup --moe-extended-tp
--moe-token-dropping --no-async-tensor-model-parallel-allreduce --no-contiguous-buffers-in-local-ddp
--no-delay-grad-reduce --no-log-learnig-rate-to-tensorboard --no-query-key-layer-scaling
--no-scatter-gather-tensors-in-pipeline --override-lr-scheduler --pipeline-model-parallel-split-rank
--renormalize-blend-weights --retriever-seq-length --retro-add-retriever --s3-cache-path
--standalone-embedding-stage --tiktoken-special-tokens --tokenizer-hf-use-fast --use-checkpoint-lr-scheduler
--use-contiguous-buffers-in-ddp --use-custom-fsdp --use-legacy-models
""".split()
"""Names that earlier releases of Megatron-LM, or of its classes, had and 0.19 has not."""


def test_every_name_of_an_earlier_release_is_a_setting_or_refused():
    lost = [name for name in OLDER_NAMES if (name in table().by_name) == (refusal(name) is not None)]
    assert lost == []


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--num-layer", "--num-layers"),
        ("--sat-omision-rate", "--sat-omission-rate"),
        ("--sat-rung", "--sat-rungs"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--lr-decay-iter", "--lr-decay-iters"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(typo, meant):
    assert complaint(typo) == f"{typo} is unknown; the nearest known is {meant}, --help lists all"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("--num-experts", "experts are not sparse neurons"),
        ("--moe-router-topk", "experts are not sparse neurons"),
        ("--multi-latent-attention", "latent attention has no heads to omit"),
        ("--attention-output-gate", "dense Llama-like models and GPT-2"),
        ("--fp8-format", "use --bf16"),
        ("--cuda-graph-impl", "captured graph"),
        ("--use-megatron-fsdp", "use --use-distributed-optimizer"),
        ("--rampup-batch-size", "use --global-batch-size"),
        ("--yaml-cfg", "use --config FILE.yaml"),
        ("--batch-size", "use --micro-batch-size"),
        ("--mock-data", "tools/preprocess_data.py"),
        ("--apply-layernorm-1p", "leave it out"),
    ],
)
def test_a_refused_name_is_told_the_reason_and_the_way_out(name, reason):
    said = complaint(name)
    assert said.startswith(f"{name} is not supported: ")
    assert reason in said


def test_a_name_of_a_newer_release_is_told_so():
    missing = [name for name in NAMES if name not in table().by_name and refusal(name) is None]
    if version("megatron-core").startswith("0.16"):
        assert complaint("--ddp-num-buckets") == (
            "--ddp-num-buckets must be a setting of the installed megatron.core, 0.16.1 has none of that "
            "name; install 0.19 or leave it out"
        )
        assert "--ddp-num-buckets" in missing
    else:
        assert missing == []


def test_what_is_let_pass_with_a_neutral_value_is_refused_otherwise():
    assert all(refusal(name) for name in NEUTRAL)


def test_a_file_finds_a_setting_by_key_and_by_any_name_with_dashes_or_underscores():
    meant = table().by_name["--norm-epsilon"]
    found = [
        table().find(key) for key in ("layernorm_epsilon", "norm-epsilon", "norm_epsilon", "no_such_thing")
    ]
    assert found == [meant, meant, meant, None]


def test_the_page_of_settings_is_up_to_date():
    if not version("megatron-core").startswith("0.19"):
        pytest.skip("docs/flags.md is made with megatron-core 0.19")
    assert PAGE.read_text() == markdown(), "run: python -m megatron_sat.flags.document > docs/flags.md"
