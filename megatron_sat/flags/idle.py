"""What Megatron-LM's launch scripts carry and nothing here needs: taken with one warning each that says why.

Only what cannot change a result is idle: how a thing is watched or stored, which of several exact kernels
runs, what newer releases do anyway. What would change weights or losses works, or is refused (`refused`).
"""

from megatron_sat.flags.flag import Flag, underscored

_ATTENTION = "attention is flash-attn's or torch's, which mask, scale and sum in their own kernels"
_LOG = "console, TensorBoard and JSONL have loss, grad norm, rates, tokens/s, TFLOP/s and step time"
_CHECKPOINT = "checkpoints are torch_dist; each rank reads, and writes with one process (--async-save), its own part"

FIELDS: dict[str, str] = {
    "masked_softmax_fusion": _ATTENTION,
    "attention_softmax_in_fp32": _ATTENTION,
    "apply_query_key_layer_scaling": _ATTENTION,
    "flash_attention_version": _ATTENTION,
    "cp_comm_type": "under context parallelism each rank gathers the keys and values of all",
    "persist_layer_norm": "the norm is Transformer Engine's, apex' or torch's, none of which has the choice",
    "transformer_impl": "sparse layers are Megatron's local ones; norm and optimizer are fused if installed",
    "barrier_with_L1_time": "Megatron's timers are not used; each step's time is logged",
    "log_num_zeros_in_grad": "gradients of omitted neurons are zero; each log line has the omission rate",
    "log_max_attention_logit": _ATTENTION,
    "test_mode": "it only checks Megatron's own attention",
}
"""Fields of megatron.core's classes that no module here reads."""

_REASONS: tuple[tuple[str, str, str], ...] = (
    (
        _LOG,
        """log-params-norm log-throughput log-progress log-timers-to-tensorboard
        no-log-loss-scale-to-tensorboard disable-log-loss-scale-to-tensorboard
        log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-device-memory-used
        log-world-size-to-tensorboard log-energy log-straggler disable-straggler-on-startup
        log-batch-size-to-tensorboard log-learning-rate-to-tensorboard
        no-log-learnig-rate-to-tensorboard run-workload-inspector-server""",
        """timing-log-level timing-log-option tensorboard-log-interval tensorboard-queue-size
        log-memory-interval logging-level straggler-ctrlr-port straggler-minmax-count""",
    ),
    (
        "Weights & Biases is not called; `wandb sync --sync-tensorboard` takes the TensorBoard folder",
        "",
        "wandb-project wandb-exp-name wandb-save-dir wandb-entity",
    ),
    (
        "no profiler is attached; run the command under nsys or py-spy",
        """profile use-pytorch-profiler pytorch-profiler-collect-shapes pytorch-profiler-collect-callstack
        pytorch-profiler-collect-chakra record-memory-history record-shapes nvtx-ranges""",
        "profile-step-start profile-step-end profile-ranks memory-snapshot-path",
    ),
    (
        "this program does not report to OneLogger",
        "no-one-logger enable-one-logger one-logger-async",
        "one-logger-project one-logger-run-name one-logger-entity app-tag-run-name app-tag-run-version",
    ),
    (
        _CHECKPOINT,
        """use-persistent-ckpt-worker async-ckpt-use-cpu-shm ckpt-fully-parallel-load
        no-ckpt-fully-parallel-save ckpt-fully-parallel-save ckpt-assume-constant-structure
        auto-detect-ckpt-format use-dist-ckpt verify-integrity no-ckpt-load-validate-sharding-integrity
        disable-ckpt-load-validate-sharding-integrity no-stream-ckpt-dequant disable-stream-ckpt-dequant
        dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient
        no-use-tokenizer-model-from-checkpoint-args disable-use-tokenizer-model-from-checkpoint-args""",
        """async-strategy async-ckpt-cpu-priority async-ckpt-io-priority
        ckpt-fully-parallel-load-exchange-algo ckpt-fully-parallel-save-process-group
        ckpt-fully-parallel-load-process-group dist-ckpt-format dist-ckpt-workers dist-ckpt-strictness""",
    ),
    (
        "Python's and CUDA's memory management is left as it is",
        "manual-gc no-manual-gc-eval disable-manual-gc-eval",
        "manual-gc-interval empty-unused-memory-level",
    ),
    (
        "NaN and overflow are watched for by --check-for-nan-in-loss-and-grad; there is no rerun engine",
        "check-for-spiky-loss",
        "rerun-mode check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval",
    ),
    (
        "gloo groups are always made, collectives are never timed by a flight recorder",
        """disable-gloo-process-groups no-flight-recorder-dump-on-timeout
        disable-flight-recorder-dump-on-timeout flight-recorder-include-stack-trace
        no-flight-recorder-include-only-active disable-flight-recorder-include-only-active
        no-flight-recorder-extra-dump-on-exec disable-flight-recorder-extra-dump-on-exec""",
        "flight-recorder-dump-path flight-recorder-trace-buffer-size train-sync-interval",
    ),
    ("attention is causal without a mask from the data", "no-create-attention-mask-in-dataloader", ""),
    ("rank 0 builds the indices in one thread", "", "num-dataset-builder-threads"),
    ("the launcher's environment says it", "", "local-rank"),
    ("only tokenizers of tiktoken's format read it", "", "tiktoken-pattern tiktoken-num-special-tokens"),
    ("--position-embedding-type says it", "no-position-embedding", ""),
    (
        "newer releases of Megatron do this always, or no longer do it at all",
        """use-mcore-models no-async-tensor-model-parallel-allreduce no-scatter-gather-tensors-in-pipeline
        use-contiguous-buffers-in-ddp use-contiguous-buffers-in-local-ddp
        no-contiguous-buffers-in-local-ddp mmap-warmup no-delay-grad-reduce delay-grad-reduce
        delay-param-gather no-query-key-layer-scaling renormalize-blend-weights disable-msc
        legacy-tokenizer""",
        "DDP-impl data-impl",
    ),
)
"""(reason, names without a value, names with one)."""


def idle_flags() -> tuple[Flag, ...]:
    """All of them as settings, so that their values are consumed."""
    flags = {}
    for reason, switches, options in _REASONS:
        for name in switches.split():
            flags[name] = Flag(key=underscored(name), kind="bool", presets={f"--{name}": True}, idle=reason)
        for name in options.split():
            flags[name] = Flag(key=underscored(name), names=(f"--{name}",), many="*", idle=reason)
    return tuple(flags.values())
