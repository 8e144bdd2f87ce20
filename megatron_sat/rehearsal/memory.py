"""How much of a GPU's memory a run takes, from sizes alone.

State, bytes a parameter (ZeRO, Rajbhandari et al. 2020, section 3.1; megatron.core's docs of its distributed
optimizer): bf16 weights 2, fp32 gradients 4, fp32 master weights and Adam's two moments 12, each over as many ranks
as hold a part of it. Activations are what autograd keeps (Korthikanti et al. 2022, section 4, counted again for this
program's layers: RMSNorm or LayerNorm, rotary positions in one kernel, an attention that builds no s x s matrix, SwiGLU
in one kernel on a GPU), times the micro-batches that a pipeline has under way (1F1B: Narayanan et al. 2021).

Not counted: what the driver, NCCL and the allocator take beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_sat.model.flops import KeptShape, ModelShape, Recompute, whole

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a model lies on its ranks."""

    tensor: int
    context: int
    layers: tuple[int, ...]
    """Layers of each pipeline rank, in order."""
    virtual: int = 1
    """Model chunks a pipeline rank."""
    in_flight: int | None = None
    """Micro-batches that an interleaved pipeline passes on at a time; None: as many as it has ranks."""
    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a model has besides a Llama's matrices and weights of norms."""

    linear_biases: bool = False
    """Of every matrix of a layer."""
    qkv_biases: bool = False
    """Of queries, keys and values; `linear_biases` has them too."""
    norm_biases: bool = False
    """LayerNorm, which also keeps two numbers of each token for its backward, not one."""
    positions: int = 0
    """Rows of learned positions, on the first pipeline rank."""
    rotates: bool = True
    """Whether queries and keys are rotated, to values of their own."""


LLAMA = Beside()
"""Nothing."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of one number."""

    weight: int
    """Also of an activation."""
    gradient: int
    optimizer: int
    """All that the optimizer keeps of one parameter: 12 for Adam with master weights, 8 without."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Ranks over which each part of a replica's state is divided; 1: every rank has it whole."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    buffers: int = 0
    """Bytes that an engine takes to pass parts on."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What decides the activations."""

    micro_batch_size: int
    num_micro_batches: int
    recompute: Recompute
    recompute_unit: int = 1
    """Layers that are recomputed together, for the whole granularity."""
    fused_swiglu: bool = True
    dropout: bool = False
    """Of the hidden state; a mask of one byte a number is kept."""
    beside: Beside = LLAMA


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the rank that needs most."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    packed: int
    """Copies of the kept weights, packed once a step, or cut for each micro-batch and kept for its backward."""
    activations: int
    transient: int
    """The larger of what the loss and what one layer's backward need on top."""
    stage: int
    """The pipeline rank in question, from 0."""

    @property
    def total(self) -> int:
        state = self.weights + self.gradients + self.optimizer + self.buffers
        return state + self.packed + self.activations + self.transient

    def rows(self) -> list[tuple[str, int]]:
        """What each part is called, and its bytes."""
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("engine's buffers", self.buffers),
            ("cut weights", self.packed),
            ("activations", self.activations),
            ("loss, or one layer's backward", self.transient),
            ("together", self.total),
        ]


def estimate(
    shape: ModelShape,
    *,
    cut: Cut,
    size: Bytes,
    shards: Shards,
    work: Work,
    kept: Sequence[KeptShape],
    packs: bool,
    tied: bool = False,
) -> Memory:
    """The most that any rank needs at any time of a run.

    kept: what each rung computes, in order. packs: weights are packed (--sat-weights compact), or else cut for every
    micro-batch. tied: the head is the embedding.
    """
    stages = (
        _on_stage(shape, stage, cut=cut, size=size, shards=shards, work=work, kept=kept, packs=packs, tied=tied)
        for stage in range(len(cut.layers))
    )
    return max(stages, key=lambda memory: memory.total)


def _on_stage(
    shape: ModelShape,
    stage: int,
    *,
    cut: Cut,
    size: Bytes,
    shards: Shards,
    work: Work,
    kept: Sequence[KeptShape],
    packs: bool,
    tied: bool,
) -> Memory:
    number = parameters(shape, stage, cut=cut, tied=tied, beside=work.beside)
    state = Memory(
        weights=_share(number * size.weight, shards.weights),
        gradients=_share(number * size.gradient, shards.gradients),
        optimizer=_share(number * size.optimizer, shards.optimizer),
        buffers=shards.buffers,
        packed=0,
        activations=0,
        transient=0,
        stage=stage,
    )
    dense, packed, found = whole(shape), 0, state
    last = stage == len(cut.layers) - 1
    chunks = under_way(stage, cut=cut, num_micro_batches=work.num_micro_batches)
    for each in kept:
        one = layer_matrices(shape, each, tensor=cut.tensor) * size.weight
        if not packs:
            packed = 0 if each == dense else chunks * (cut.layers[stage] // cut.virtual) * one
        elif each != dense:  # a dense rung after it leaves the last pack where it is
            packed = cut.layers[stage] * one
        loss = loss_bytes(shape, cut=cut, size=size, work=work) if last else 0
        once = _working_bytes(shape, each, cut=cut, size=size, work=work)
        now = replace(
            state,
            packed=packed,
            activations=_kept_bytes(shape, each, stage=stage, cut=cut, size=size, work=work),
            transient=max(loss, once),
        )
        found = max(found, now, key=lambda memory: memory.total)
    return found


def _share(number: int, parts: int) -> int:
    return math.ceil(Fraction(number, parts))


def layer_matrices(shape: ModelShape, kept: KeptShape, *, tensor: int) -> int:
    """Entries of a layer's matrices on one rank, for what is kept of them: QKV, O, gate, up, down."""
    heads = 2 * kept.heads + 2 * kept.groups
    channels = (3 if shape.gated else 2) * kept.channels
    return shape.hidden_size * (shape.kv_channels * heads + channels) // tensor


def parameters(shape: ModelShape, stage: int, *, cut: Cut, tied: bool, beside: Beside = LLAMA) -> int:
    """Parameters on each rank of a pipeline stage; norms, positions and biases of sums are whole on every rank."""
    norm = (1 + beside.norm_biases) * shape.hidden_size
    matrices = layer_matrices(shape, whole(shape), tensor=cut.tensor)
    number = cut.layers[stage] * (matrices + 2 * norm + _layer_biases(shape, tensor=cut.tensor, beside=beside))
    rows = shape.hidden_size * shape.padded_vocab_size // cut.tensor
    first, last = stage == 0, stage == len(cut.layers) - 1
    number += rows + beside.positions * shape.hidden_size if first else 0
    if last:
        number += norm + (0 if tied and first else rows)
    return number


def _layer_biases(shape: ModelShape, *, tensor: int, beside: Beside) -> int:
    """Of one layer on one rank: QKV and fc1 are cut with their rows; those of O and down are added to whole sums."""
    of_qkv = shape.kv_channels * (shape.num_attention_heads + 2 * shape.num_query_groups) // tensor
    of_fc1 = (2 if shape.gated else 1) * shape.ffn_hidden_size // tensor
    if beside.linear_biases:
        return of_qkv + of_fc1 + 2 * shape.hidden_size
    return of_qkv if beside.qkv_biases else 0


def layer_bytes(shape: ModelShape, kept: KeptShape, *, cut: Cut, size: Bytes, work: Work) -> dict[str, int]:
    """What autograd keeps of one layer and micro-batch on one rank, by what would free it when recomputed.

    "inputs" of the norms; "layernorm", their outputs; "qkv", fused projection and rotated Q, K; "core_attn", its sums;
    "proj", its input; "mlp", everything between fc1's input and fc2's output; "dropout".
    """
    tokens = work.micro_batch_size * shape.seq_length // cut.context
    split = tokens // cut.tensor if cut.sequence_parallel else tokens
    hidden, head = split * shape.hidden_size * size.weight, tokens * shape.kv_channels * size.weight
    heads, groups, channels = (number // cut.tensor for number in (kept.heads, kept.groups, kept.channels))
    wide = tokens * channels * size.weight
    # fc1's output and fc2's input; without the fused kernel also σ(gate), and up after an offset of 0 is added to it
    factor = (3 if work.fused_swiglu else 5) if shape.gated else 2
    rotated = heads + groups
    if not work.beside.rotates:  # Q, K and V are views of the projection, but where several heads share a group
        rotated = 0 if shape.heads_per_group == 1 else heads
    statistics = 2 if work.beside.norm_biases else 1
    return {
        "inputs": 2 * hidden + 2 * 4 * statistics * split,  # and each token's scale, and mean, fp32
        "layernorm": 2 * hidden,
        "qkv": head * ((heads + 2 * groups) + rotated),  # V is a view that keeps the projection alive
        "core_attn": 4 * tokens * heads,  # the log of each sum, fp32; its output is proj's input
        "proj": head * heads,
        "mlp": factor * wide,
        "dropout": 2 * split * shape.hidden_size if work.dropout else 0,
    }


def _kept_bytes(shape: ModelShape, kept: KeptShape, *, stage: int, cut: Cut, size: Bytes, work: Work) -> int:
    """Activations of a pipeline rank while as many micro-batches are under way as its place allows."""
    per_chunk = cut.layers[stage] // cut.virtual
    chunks = under_way(stage, cut=cut, num_micro_batches=work.num_micro_batches)
    parts = layer_bytes(shape, kept, cut=cut, size=size, work=work)
    recompute = work.recompute
    if "full" not in recompute.parts:
        one = sum(number for part, number in parts.items() if part not in recompute.parts)
        return chunks * per_chunk * one
    stage_layers = per_chunk
    if recompute.layers is not None:  # the first layers of every chunk
        stage_layers = min(per_chunk, recompute.layers * per_chunk // sum(cut.layers))
    again = math.ceil(stage_layers / work.recompute_unit) * parts["inputs"] // 2
    return chunks * (again + (per_chunk - stage_layers) * sum(parts.values()))


def _working_bytes(shape: ModelShape, kept: KeptShape, *, cut: Cut, size: Bytes, work: Work) -> int:
    """On top of that during a backward: what is recomputed at once, and the gradients of the widest activations."""
    parts = layer_bytes(shape, kept, cut=cut, size=size, work=work)
    if "full" in work.recompute.parts:
        again = work.recompute_unit * sum(parts.values())
    else:
        again = sum(parts.get(part, 0) for part in work.recompute.parts)
    return again + parts["mlp"]


def loss_bytes(shape: ModelShape, *, cut: Cut, size: Bytes, work: Work) -> int:
    """Around the loss: the head's input, logits and their gradient in the model's precision, probabilities in fp32."""
    tokens = work.micro_batch_size * shape.seq_length // cut.context
    split = tokens // cut.tensor if cut.sequence_parallel else tokens
    logits = tokens * shape.padded_vocab_size // cut.tensor
    return 2 * split * shape.hidden_size * size.weight + logits * (2 * size.weight + 4)


def under_way(stage: int, *, cut: Cut, num_micro_batches: int) -> int:
    """Forwards of one chunk whose backward is still to come, at most, on a pipeline rank under 1F1B."""
    ranks = len(cut.layers)
    if cut.virtual == 1:
        return min(ranks - stage, num_micro_batches)
    group = cut.in_flight or ranks
    warm_up = 2 * (ranks - stage - 1) + (cut.virtual - 1) * group
    return min(warm_up + 1, num_micro_batches * cut.virtual)
