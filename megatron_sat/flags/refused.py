"""What Megatron-LM can and this program cannot: each name with the reason and the way out.

Matched by pattern, in order, so that a setting and a field of megatron.core's classes meet the same answer,
also where the installed release has never heard of it. `NEUTRAL` are values that say "off": with them a
refused name is let pass.
"""

from fnmatch import fnmatchcase

_FP8 = (
    "fp8 and fp4 act inside Transformer Engine's linear layers, the sparse layers are Megatron's own; use "
    "--bf16"
)
_TE = "it acts inside Transformer Engine's linear layers, the sparse layers are Megatron's own; leave it out"
_GRAPHS = "a captured graph would replay the neurons of its first step; leave it out"
_FSDP = "gradients are reduced by Megatron's own data parallelism here; use --use-distributed-optimizer"
_GROUPS = "the process groups are megatron.core's plain ones here; leave it out"
_LLAMA = "the sparse layers are those of dense Llama-like models and GPT-2; leave it out"
_ONE_SIZE = "schedule, plan and data order count steps of one batch size; use --global-batch-size"
_RESUME = (
    "a run resumes from the newest checkpoint of --load, and its shape comes from the flags; leave it out"
)
_DIAGNOSIS = "this program does not write tensors for inspection; leave it out"
_TOKENIZER = (
    "tokenizers are SentencePiece files and Hugging Face folders here; use --tokenizer-type, "
    "--tokenizer-model"
)
_TIMING = "it injects or handles faults of Megatron-LM's own trainer; leave it out"

REASONS: tuple[tuple[str, str], ...] = (
    (
        _FP8,
        """fp8-* no-fp8-* disable-fp8-* fp8 fp4-* fp4 activation-func-fp8-input-store
        te-precision-config-file""",
    ),
    (
        _FP8,
        "tp-only-amax-red reuse-grad-buf-for-mxfp8-param-ag keep-fp8-transpose-cache* quant-recipe",
    ),
    (
        _FP8,
        """first-last-layers-bf16 num-layers-at-*-in-bf16 use-kitchen* kitchen-*
        disable-parameter-transpose-cache""",
    ),
    (
        _TE,
        """tp-comm-* no-tp-comm-* disable-tp-comm-* delay-wgrad-compute symmetric-ar-type
        use-te-activation-func""",
    ),
    (
        _TE,
        "use-transformer-engine-op-fuser fused-residual-rmsnorm te-rng-tracker use-te-rng-tracker",
    ),
    (
        _TE,
        """fine-grained-*offload* offload-modules min-offloaded-* delta-offload-* activation-offload-*
        delay-offload-*""",
    ),
    (
        _GRAPHS,
        "*cuda-graph*",
    ),
    (
        "this program pre-trains; use Megatron-LM for RL",
        "rl-* no-rl-* grpo-* langrl-* perform-rl-step refit-method",
    ),
    (
        "this program trains; export the checkpoint to generate",
        "*inference* flash-decode enable-chunked-prefill disable-chunked-prefill num-speculative-tokens",
    ),
    (
        "this program trains; export the checkpoint to generate",
        """mlp-chunks-for-prefill nccl-all-reduce-for-prefill batch-invariant-mode
        use-same-sampling-seed-across-dp-ranks max-tokens-to-oom output-bert-embeddings bert-*
        use-legacy-static-engine""",
    ),
    (
        "experts are not sparse neurons; " + _LLAMA,
        """moe-* num-experts num-moe-experts expert-* *experts* overlap-moe-*
        ep-overlap-* high-priority-a2a-comm-stream use-fused-weighted-squared-relu use-grouped-gemm-*
        save-tokens-per-expert-interval""",
    ),
    (
        "latent attention has no heads to omit; " + _LLAMA,
        """multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
        mscale* rotary-scaling-factor cache-mla-latents mla-*""",
    ),
    (
        _LLAMA,
        """experimental-attention-variant dsa-* no-dsa-* disable-dsa-* linear-* mamba-* disable-mamba-*
        use-mamba-* is-hybrid-model hybrid-layer-pattern hybrid-override-pattern hybrid-attention-ratio
        hybrid-mlp-ratio mtp-* attention-output-gate qk-l2-norm qk-clip* heterogeneous-* hetereogenous-*
        mrope-section yarn-* no-yarn-* rope-type glu-linear-offset activation-func-clamp-value
        mlp-chunks-for-training use-mup mup-* apply-residual-connection-post-layernorm
        onnx-safe decoder-num-layers decoder-seq-length relative-attention-* spec
        enable-experimental""",
    ),
    (
        "attention is causal over the whole sequence; " + _LLAMA,
        "window-size window-attn-skip-freq softmax-type",
    ),
    (
        "the norm's weight is stored itself, not less one; leave it out",
        "apply-layernorm-1p layernorm-zero-centered-gamma",
    ),
    (
        "sparse attention cuts queries, keys and values apart; leave it out",
        "fused-single-qkv-rope",
    ),
    (
        _FSDP,
        """*fsdp* data-parallel-sharding-strategy outer-dp-sharding-strategy enable-full-sharding-in-hsdp
        create-all-gather-group suggested-communication-unit-size init-model-with-meta-device""",
    ),
    (
        "weights are sharded by tensor parallelism alone; use --tensor-model-parallel-size",
        "*num-weight-shards gtp-*",
    ),
    (
        (
            "all sequences have --seq-length and each rank gathers its keys and values; use "
            "--context-parallel-size alone"
        ),
        "*hierarchical-context* hybrid-context-parallel max-seqlen-per-dp-cp-rank variable-seq-lengths",
    ),
    (
        _GROUPS,
        """use-tp-pp-dp-mapping nccl-communicator-config-path use-sharp sharp-enabled-group
        high-priority-stream-groups num-distributed-optimizer-instances lazy-mpu-init fake-process-group
        distributed-timeout-seconds-after-init""",
    ),
    (
        _ONE_SIZE,
        """rampup-batch-size step-batch-size-schedule decrease-batch-size-if-needed eval-global-batch-size
        eval-micro-batch-size""",
    ),
    (
        _RESUME,
        """override-ckpt-iteration use-checkpoint-args use-mp-args-from-checkpoint-args
        pretrained-checkpoint load-main-params-from-ckpt non-persistent-* ckpt-convert-*
        dist-ckpt-save-pre-mcore-014 replication* save-retain-interval load-model-opt-format""",
    ),
    (
        _DIAGNOSIS,
        """save-params-interval save-activations-interval save-wgrads-interval save-dgrads-interval
        logits-* dump-param-to-param-group-map result-rejected-tracker-filename""",
    ),
    (
        "it belongs to Muon's own distributed optimizer; use --optimizer dist_muon",
        "use-layer-wise-distributed-optimizer no-use-layer-wise-param-layout",
    ),
    (
        "Megatron-LM renamed it; use --apply-wd-to-qk-layernorm",
        "no-weight-decay-cond-type",
    ),
    (
        "nothing would be trained; leave it out",
        "freeze-all-layers",
    ),
    (
        "megatron.core no longer reads it; leave it out",
        "async-tensor-model-parallel-allreduce",
    ),
    (
        _TOKENIZER,
        """vocab-file merge-file vocab-extra-ids tokenizer-metadata tokenizer-special-tokens
        tokenizer-sentencepiece-legacy tokenizer-hf-* tiktoken-special-tokens trust-remote-code
        null-tokenizer-* no-tokenizer-* disable-tokenizer-* chat-template sft-*
        allow-ambiguous-pad-tokens""",
    ),
    (
        "there is no invented text here; prepare one with tools/preprocess_data.py and give --data-path",
        "mock-data",
    ),
    (
        "the shell can do it; use --data-path $(cat FILE)",
        "data-args-path per-split-data-args-path",
    ),
    (
        "samples are drawn in the order of one global shuffle; leave it out",
        "dataloader-type",
    ),
    (
        "attention is causal over the whole sample; leave it out",
        "reset-attention-mask reset-position-ids dataloader-inter-document-masking",
    ),
    (
        "data are .bin/.idx files, blended by weight, with one validation set a domain; leave it out",
        """fim-* phase-transition-iterations per-dataset-sequences-path dataloader-*
        object-storage-cache-path s3-cache-path enable-msc multiple-validation-sets full-validation
        validation-set-names start-eval-at-iter""",
    ),
    (
        "it changes which updates are made, or how; leave it out",
        "iterations-to-skip skip-train data-parallel-random-init disable-jit-fuser",
    ),
    (
        "a signal ends the run after the step under way, its readers are let finish; use --exit-signal-handler",
        "exit-signal-handler-for-*",
    ),
    (
        _TIMING,
        """inprocess-* ft-* enable-ft-package calc-ft-timeouts fault-injector-* error-injection-*
        adlr-autoresume*""",
    ),
    (
        "it belongs to another kind of model; leave it out",
        """ict-* biencoder-* titles-data-path query-in-block-prob use-one-sent-docs evidence-data-path
        retriever-* block-data-path embedding-path indexer-* retro-* sample-rate mask-prob
        short-seq-prob mask-type mask-factor vision-* num-classes img-* num-channels patch-dim
        classes-fraction data-per-class-fraction no-data-sharding head-lr-mult swin-* iter-per-epoch
        dino-* encoder-tensor-model-parallel-size encoder-pipeline-model-parallel-size
        pipeline-model-parallel-split-rank standalone-embedding-stage use-legacy-models export-*""",
    ),
    (
        "use --config FILE.yaml",
        "yaml-cfg",
    ),
    (
        "Megatron-LM renamed it; use --micro-batch-size",
        "batch-size",
    ),
    (
        "Megatron-LM renamed it; use --lr-warmup-fraction",
        "warmup",
    ),
    (
        "Megatron-LM renamed it; use --tensor-model-parallel-size",
        "model-parallel-size",
    ),
    (
        "Megatron-LM renamed it; use --recompute-granularity, --recompute-method and --recompute-num-layers",
        """checkpoint-activations distribute-checkpointed-activations checkpoint-num-layers
        activations-checkpoint-*""",
    ),
)
"""(reason and way out, patterns of names without their dashes)."""

NEUTRAL: dict[str, tuple[str, ...]] = {
    "--expert-model-parallel-size": ("1",),
    "--expert-tensor-parallel-size": ("1",),
    "--num-distributed-optimizer-instances": ("1",),
    "--dataloader-type": ("single",),
    "--mtp-num-layers": ("0",),
    "--num-experts": ("0",),
    "--vocab-extra-ids": ("0",),
    "--rope-type": ("rope",),
    "--softmax-type": ("vanilla",),
    "--cuda-graph-impl": ("none",),
    "--error-injection-rate": ("0",),
    "--data-parallel-sharding-strategy": ("no_shard",),
}
"""Refused names, and the value after them that asks for nothing."""


def refusal(name: str) -> str | None:
    """Why ``--name`` is refused and what to do instead; None where it is not."""
    bare = name.removeprefix("--")
    for reason, patterns in REASONS:
        if any(fnmatchcase(bare, pattern) for pattern in patterns.split()):
            return reason
    return None
