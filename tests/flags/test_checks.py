"""Contradictions between settings: each is refused in one line with name, rule, value and way out."""

import pytest

from megatron_sat.flags.defaults import Machine
from tests.helpers.command_line import refusal, run

GPU = Machine(cuda=True)


@pytest.mark.parametrize(
    "name",
    "--num-layers --hidden-size --num-attention-heads --seq-length --max-position-embeddings "
    "--micro-batch-size --lr --tokenizer-type".split(),
)
def test_a_required_setting_that_is_missing_is_named(capsys, name):
    assert refusal(capsys, without=name) == f"error: {name} is required and not given; add it"


@pytest.mark.parametrize(
    ("more", "without", "said"),
    [
        ("", "--train-iters", "one of --train-iters and --train-samples is required, got neither; give one"),
        (
            "--train-samples 800",
            "",
            "one of --train-iters and --train-samples is required, got both; give one",
        ),
        (
            "",
            "--data-path --split",
            "data are required, got neither --data-path nor --train-data-path; prepare",
        ),
        ("--num-layers 0", "", "--num-layers must be at least 1, got 0"),
        ("--micro-batch-size 0", "", "--micro-batch-size must be at least 1, got 0"),
        ("--tensor-model-parallel-size 0", "", "--tensor-model-parallel-size must be at least 1, got 0"),
        ("--num-attention-heads 7", "", "--num-attention-heads (7) must divide --hidden-size (64); try"),
        (
            "--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 1",
            "",
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank say the",
        ),
    ],
)
def test_what_everything_else_needs_is_asked_for_first(capsys, more, without, said):
    assert refusal(capsys, more, without=without).startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "--ckpt-format torch",
            "--ckpt-format must be torch_dist, which fits any parallel layout, got torch; leave",
        ),
        ("--squared-relu", "an MLP has one activation, got --swiglu and --squared-relu; leave one out"),
        ("--openai-gelu", "an MLP has one activation, got --swiglu and --openai-gelu; leave one out"),
        (
            "--no-swiglu --add-bias-linear --no-openai-gelu --bias-gelu-fusion",
            "--bias-gelu-fusion computes GELU's tanh form, which is --openai-gelu, got --no-openai-gelu beside it; l",
        ),
        ("--bf16 --fp16", "--bf16 and --fp16 exclude each other, got both; leave one out"),
        ("--fp16-lm-cross-entropy", "--fp16-lm-cross-entropy needs --fp16, got it without; leave it out"),
        ("--num-query-groups 3", "--num-query-groups (3) must divide --num-attention-heads (8); try"),
        ("--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", "--grad-reduce-in-bf16 and"),
        (
            "--overlap-param-gather",
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad",
        ),
        ("--use-distributed-optimizer --overlap-param-gather", "--overlap-param-gather needs"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(capsys, more, said):
    assert refusal(capsys, more).startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("more", "ranks", "said"),
    [
        ("--tensor-model-parallel-size 2", 3, "the number of ranks (3) must be a multiple of"),
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2",
            12,
            "the number of ranks (12) must be a multiple of --tensor-model-parallel-size x",
        ),
        (
            "--tensor-model-parallel-size 16 --ffn-hidden-size 256",
            16,
            "--tensor-model-parallel-size (16) must divide --num-attention-heads (8); try",
        ),
        (
            "--tensor-model-parallel-size 8",
            8,
            "--tensor-model-parallel-size (8) must divide --num-query-groups (4)",
        ),
        (
            "--tensor-model-parallel-size 4 --ffn-hidden-size 178",
            4,
            "--tensor-model-parallel-size (4) must divide --ffn-hidden-size (178); try",
        ),
        (
            "--tensor-model-parallel-size 4 --padded-vocab-size 258",
            4,
            "--tensor-model-parallel-size (4) must divide --padded-vocab-size (258); try",
        ),
        (
            "--pipeline-model-parallel-size 3",
            3,
            "--num-layers (4) must fill 3 pipeline ranks of 1 chunks evenly",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
            2,
            "--num-layers (4) must fill 2 pipeline ranks of 3 chunks evenly",
        ),
        (
            "--num-virtual-stages-per-pipeline-rank 2",
            1,
            "interleaving needs --pipeline-model-parallel-size above 1",
        ),
        (
            "--pipeline-model-parallel-layout zz",
            1,
            "--pipeline-model-parallel-layout must be a layout of megatron.core, got 'zz': Invalid layer",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4",
            2,
            "interleaving needs --pipeline-model-parallel-size above 1 and a layer in every chunk, got 2",
        ),
    ],
)
def test_a_layout_that_does_not_come_out_even_is_refused(capsys, more, ranks, said):
    assert refusal(capsys, more, ranks=ranks).startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("more", "ranks", "said"),
    [
        (
            "--max-position-embeddings 63",
            1,
            "--max-position-embeddings must be at least --seq-length (64), got 63",
        ),
        (
            "--context-parallel-size 2 --seq-length 62",
            2,
            "--seq-length (62) must be a multiple of 4: twice the context-parallel size, times",
        ),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 62",
            4,
            "--seq-length (62) must be a multiple of 4: ",
        ),
        (
            "--global-batch-size 6",
            4,
            "--global-batch-size (6) must be a multiple of --micro-batch-size x replicas (2 x 4)",
        ),
        ("--lr-decay-samples 80", 1, "--lr-decay-samples (80) needs --train-samples; use --lr-decay-iters"),
    ],
)
def test_lengths_and_batches_that_do_not_fit_are_refused(capsys, more, ranks, said):
    assert refusal(capsys, more, ranks=ranks).startswith(f"error: {said}")


def test_the_way_out_of_what_is_uneven_is_a_number_that_fits(capsys):
    cube = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2"
    assert refusal(capsys, cube, ranks=12).endswith("(2 x 2 x 2); start 16 ranks")
    wide = "--tensor-model-parallel-size 16 --ffn-hidden-size 256"
    assert refusal(capsys, wide, ranks=16).endswith("try --tensor-model-parallel-size 8")
    assert refusal(capsys, "--context-parallel-size 2 --seq-length 62", ranks=2).endswith("try 64")
    assert refusal(capsys, "--global-batch-size 6", ranks=4).endswith("try 8")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "--train-samples 7",
            "--train-samples (7) must be at least --global-batch-size (8), one update; raise it",
        ),
        ("--train-samples 800", "--lr-warmup-iters (5) needs --train-iters; use --lr-warmup-samples"),
    ],
)
def test_a_run_said_in_samples_is_said_in_samples_throughout(capsys, more, said):
    assert refusal(capsys, more, without="--train-iters").startswith(f"error: {said}")


INTERLEAVED = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 2"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--global-batch-size 2", "passes on 2 micro-batches at a time, got 1 in a step; try --global-batch-size 4"),
        ("--global-batch-size 6", "passes on 2 micro-batches at a time, got 3 in a step; try --global-batch-size 8"),
        (
            "--global-batch-size 8 --microbatch-group-size-per-virtual-pipeline-stage 1",
            "--microbatch-group-size-per-virtual-pipeline-stage (1) must be at least --pipeline-model-parallel-size",
        ),
    ],
)
def test_micro_batches_that_do_not_fill_an_interleaved_pipeline_are_refused(capsys, more, said):
    assert said in refusal(capsys, f"{INTERLEAVED} {more}", ranks=2)


def test_a_last_round_of_an_interleaved_pipeline_may_be_shorter_than_the_others():
    more = "--global-batch-size 10 --microbatch-group-size-per-virtual-pipeline-stage 3"
    assert run(f"{INTERLEAVED} {more}", ranks=2).training.num_micro_batches == 5


ON_A_GPU = [
    ("--use-flash-attn", "--attention-backend flash (or --use-flash-attn)", "flash-attn"),
    ("--attention-backend flash", "--attention-backend flash (or --use-flash-attn)", "flash-attn"),
    ("--apply-rope-fusion", "--apply-rope-fusion", "Transformer Engine"),
    ("--memory-efficient-layer-norm", "--memory-efficient-layer-norm", "apex"),
    ("--cpu-offloading-num-layers 2", "--cpu-offloading", "Transformer Engine"),
    ("--use-precision-aware-optimizer", "--use-precision-aware-optimizer", "Transformer Engine"),
    ("--cross-entropy-fusion-impl te", "--cross-entropy-fusion-impl te", "Transformer Engine"),
    ("--cross-entropy-loss-fusion", "--cross-entropy-loss-fusion", None),
    ("--masked-softmax-fusion", "--masked-softmax-fusion", None),
    ("--distributed-backend nccl", "--distributed-backend nccl", None),
    ("--pipeline-model-parallel-comm-backend ucc", "--pipeline-model-parallel-comm-backend ucc", None),
    ("--optimizer-cpu-offload", "--optimizer-cpu-offload", None),
    ("--use-ring-exchange-p2p", "--use-ring-exchange-p2p", None),
    ("--use-nccl-ub", "--nccl-ub", None),
    ("--deallocate-pipeline-outputs", "--deallocate-pipeline-outputs", None),
]


@pytest.mark.parametrize(("more", "said", "library"), ON_A_GPU)
def test_what_only_a_gpu_can_do_is_refused_without_one(capsys, more, said, library):
    assert refusal(capsys, more) == f"error: {said} needs a GPU, this machine has none; leave it out"


@pytest.mark.parametrize(("more", "said", "library"), [case for case in ON_A_GPU if case[2]])
def test_what_only_a_library_can_do_is_refused_without_it(capsys, more, said, library):
    assert refusal(capsys, more, machine=GPU) == (
        f"error: {said} needs {library}, which cannot be imported; install it or leave it out"
    )


@pytest.mark.parametrize("more", [more for more, _, library in ON_A_GPU if library is None])
def test_what_only_a_gpu_can_do_is_taken_on_one(more):
    run(more, machine=GPU)


def test_an_optimizer_of_another_library_is_refused_without_it(capsys):
    assert "--optimizer muon needs megatron-core 0.19 and the emerging-optimizers package" in refusal(
        capsys, "--optimizer muon"
    )


@pytest.mark.parametrize(
    ("more", "ranks"),
    [
        ("--recompute-granularity full", 1),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettttt|ttL", 2),
    ],
)
def test_what_megatrons_classes_refuse_is_said_in_their_words(capsys, more, ranks):
    said = refusal(capsys, more, ranks=ranks)
    assert said.startswith("error: megatron.core's TransformerConfig refuses these settings: ")
    assert said.endswith("; change the flags it names")
