"""How long one training step takes on one GPU of many: the sum of what it asks of the device, measured part by part.

A layer's micro-batch is its products (a forward and two of the backward each, interpolated from measured shapes), its
attention (measured rate), and what it streams through memory between them (bytes over measured bandwidth); it takes
the host's launches where those are longer and it is not replayed. To all micro-batches come embedding, head and
loss, and once a step the choosing and packing, the update, and what communication does not hide, at the pace of the
links (`links`). Nothing else overlaps, and nothing is fitted to whole steps.

Shapes: `h` hidden, `d` head dim, `f` channels, `p` TP size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from megatron_sat.estimate.hardware import Figure, Hardware, Kind, Reduction
from megatron_sat.estimate.links import Link
from megatron_sat.model.flops import NO_RECOMPUTE, KeptShape, ModelShape, Recompute, whole
from megatron_sat.rehearsal.memory import LLAMA, Beside, Cut, layer_matrices, parameters

KINDS: tuple[Kind, ...] = ("forward", "input", "weight")
ACTIVATION = 2
"""Bytes of an activation, bf16."""
GRADIENT = 4
"""Bytes of a gradient that is reduced, fp32."""
PARAMETER = 2
"""Bytes of a parameter that is gathered, bf16."""
ATTENTION_FORWARD = 2 / 7
"""Of an attention's time: its kernel does two products forward, and five backward."""
UNJOINED = Link(source="nobody", bytes_per_second=0.0)
"""Of ranks that send nothing."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a replica reads in a step."""

    micro_batch_size: int
    micro_batches: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the work lies on GPUs, and what joins them."""

    layers: tuple[int, ...]
    """Of each pipeline rank."""
    virtual: int = 1
    """Model chunks a pipeline rank."""
    tensor: int = 1
    sequence_parallel: bool = False
    tensor_link: Link = UNJOINED
    data: int = 1
    data_link: Link = UNJOINED
    shards_update: bool = False
    """Replicas share the update: the distributed optimizer."""
    overlaps_reduction: bool = False
    """Gradients are reduced while the last micro-batch's backward computes the others."""
    overlaps_gathering: bool = False
    """What each replica has updated reaches the others while the next forward computes."""
    sparse_reduction: bool = False
    """Only kept rows and columns are reduced."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what they go to."""

    layers: float
    loss: float
    """Embedding, head and loss."""
    choosing: float
    """Scores, choice, packing and unpacking."""
    update: float
    """Zeroing gradients, clipping, optimizer."""
    tensor: float
    """Sums over tensor-parallel ranks."""
    waiting: float
    """A pipeline's ranks for each other."""
    reduction: float
    """Over replicas, as far as it is not hidden: of gradients, divided before, and of parameters that each updates a
    part of."""
    distance: float
    """Of the shape that is farthest from all that were measured; `hardware.FAR` is far."""

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by name, in the order of the fields."""
        return {name: value for name, value in vars(self).items() if name != "distance"}


def predict_step(
    shape: ModelShape,
    kept: KeptShape,
    *,
    hardware: Hardware,
    batch: Batch,
    spread: Spread,
    recompute: Recompute = NO_RECOMPUTE,
    graphs: bool = False,
    interval: int = 1,
    tied: bool = False,
    beside: Beside = LLAMA,
) -> StepTime:
    """A step in which each layer computes ``kept``, on the pipeline rank that takes longest.

    graphs: layers and choices are replayed, so no launch is waited for. interval: steps that a choice is kept. tied:
    the head is the embedding. beside: parameters that are updated too; a layer's time is that of Llama's.
    """
    dense, parts, tokens = whole(shape), list[Figure](), batch.micro_batch_size * shape.seq_length
    of_layer = partial(
        layer_seconds,
        shape,
        hardware=hardware,
        batch=batch,
        spread=spread,
        recompute=recompute,
        graphs=graphs,
        seen=parts,
    )
    layer, whole_share = of_layer(kept), kept.whole_layers / shape.num_layers
    if whole_share:
        layer = (1 - whole_share) * layer + whole_share * of_layer(dense)  # as if each rank had as many of them
    layer = layer if graphs else max(layer, hardware.launch_seconds)
    sums = tensor_seconds(shape, tokens=tokens, spread=spread)
    head = _head_seconds(shape, tokens=tokens, hardware=hardware, tensor=spread.tensor, seen=parts)
    stage, longest = _longest_stage(spread, layer=layer + sums, head=head)
    here, last = spread.layers[stage], stage == len(spread.layers) - 1
    cut = Cut(tensor=spread.tensor, context=1, layers=spread.layers)
    number = parameters(shape, stage, cut=cut, tied=tied, beside=beside)
    choosing = 0.0
    if kept != dense:
        every, some = (layer_matrices(shape, each, tensor=spread.tensor) for each in (dense, kept))
        found = hardware.choosing_seconds(weights=every, kept=some, replayed=graphs)
        parts.append(found)
        choosing = (1 - whole_share) * here * found.seconds / interval
    matrices = here * layer_matrices(shape, dense, tensor=spread.tensor)
    omitted = 0
    if spread.sparse_reduction:
        omitted = int((1 - whole_share) * (matrices - here * layer_matrices(shape, kept, tensor=spread.tensor)))
    return StepTime(
        layers=batch.micro_batches * here * layer,
        loss=batch.micro_batches * head if last else 0.0,
        choosing=choosing,
        update=number * hardware.update_seconds_per_parameter / (spread.data if spread.shards_update else 1),
        tensor=batch.micro_batches * here * sums,
        waiting=(len(spread.layers) - 1) * longest / spread.virtual,
        reduction=_dividing_seconds(number, spread=spread, bytes_per_second=hardware.bytes_per_second)
        + _reduction_seconds(number - omitted, spread=spread, backward=2 / 3 * here * layer)
        + _gathering_seconds(number, spread=spread, forward=1 / 3 * here * layer),
        distance=max(figure.distance for figure in parts),
    )


def linears(shape: ModelShape, kept: KeptShape, *, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a layer's four products on one TP rank: QKV, O, gate and up, down."""
    h, d = shape.hidden_size, shape.kv_channels
    return {
        "qkv": (h, (kept.heads + 2 * kept.groups) * d // tensor),
        "proj": (kept.heads * d // tensor, h),
        "fc1": (h, (2 if shape.gated else 1) * kept.channels // tensor),
        "fc2": (kept.channels // tensor, h),
    }


def product_sizes(kind: Kind, *, tokens: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """(m, n, k) of one of a linear layer's three products."""
    if kind == "forward":
        return tokens, outputs, inputs
    return (tokens, inputs, outputs) if kind == "input" else (outputs, inputs, tokens)


def linear_seconds(
    hardware: Hardware, *, tokens: int, inputs: int, outputs: int, kinds: tuple[Kind, ...] = KINDS
) -> Iterator[Figure]:
    """Of one linear layer, a figure a product."""
    for kind in kinds:
        m, n, k = product_sizes(kind, tokens=tokens, inputs=inputs, outputs=outputs)
        yield hardware.product_seconds(kind, m=m, n=n, k=k)


def layer_seconds(
    shape: ModelShape,
    kept: KeptShape,
    *,
    hardware: Hardware,
    batch: Batch,
    spread: Spread,
    recompute: Recompute,
    graphs: bool,
    seen: list[Figure],
) -> float:
    """Forward and backward of a layer and micro-batch on the device. graphs: it is replayed. seen: takes the figures
    it is made of."""
    tokens, tensor = batch.micro_batch_size * shape.seq_length, spread.tensor
    matrices = linears(shape, kept, tensor=tensor)
    products = [
        figure
        for inputs, outputs in matrices.values()
        for figure in linear_seconds(hardware, tokens=tokens, inputs=inputs, outputs=outputs)
    ]
    attention = hardware.attention_seconds(
        batch=batch.micro_batch_size,
        sequence=shape.seq_length,
        heads=kept.heads // tensor,
        groups=kept.groups // tensor,
        head_dim=shape.kv_channels,
    )
    split = spread.sequence_parallel
    streamed = streamed_bytes(shape, kept, tokens=tokens, tensor=tensor, split=split, replayed=graphs)
    between = streamed / hardware.bytes_per_second
    seen += [*products, attention]
    seconds = sum(figure.seconds for figure in products) + attention.seconds + between
    forward = {
        name: sum(f.seconds for f in linear_seconds(hardware, tokens=tokens, inputs=i, outputs=o, kinds=("forward",)))
        for name, (i, o) in matrices.items()
    }
    again = {
        "full": sum(forward.values()) + ATTENTION_FORWARD * attention.seconds + between / 3,
        "core_attn": ATTENTION_FORWARD * attention.seconds,
        "mlp": forward["fc1"] + forward["fc2"],
    }
    share = Fraction(shape.num_layers if recompute.layers is None else recompute.layers, shape.num_layers)
    return seconds + float(share) * sum(again.get(part, 0.0) for part in recompute.parts)


def streamed_bytes(
    shape: ModelShape, kept: KeptShape, *, tokens: int, tensor: int, split: bool, replayed: bool
) -> int:
    """Read and written between a layer's products, forward and backward, in kernels that hold nothing back.

    split: norms and residuals see a part of the sequence on each TP rank. replayed: a recording of each half of the
    layer has a place of its own for the gradient that comes in.
    """
    hidden = tokens // (tensor if split else 1) * shape.hidden_size
    norms = 2 * (2 + 3 + 2)  # two of them; x and y; x, dy and dx; x and dy again, for the weight's gradient
    residuals = 2 * (3 + 3)  # two sums of two; two sums of two gradients
    heads, groups, channels = (number // tensor for number in (kept.heads, kept.groups, kept.channels))
    rotation = (2 + 2) * (heads + groups)
    merging = 2 * (heads + 2 * groups)  # the gradients of Q, K and V become one
    # SwiGLU's backward: gate, up and dy make one gradient, gate and dy the other, a half of one tensor each
    activation = (3 + 4 + 3) if shape.gated else (2 + 3)
    wide = tokens * (shape.kv_channels * (rotation + merging) + activation * channels)
    copies = 2 * 2 if replayed else 0
    return ACTIVATION * ((norms + residuals + copies) * hidden + wide)


def _head_seconds(
    shape: ModelShape, *, tokens: int, hardware: Hardware, tensor: int, seen: list[Figure]
) -> float:
    """Embedding, head and loss of a micro-batch."""
    rows = shape.padded_vocab_size // tensor
    products = list(linear_seconds(hardware, tokens=tokens, inputs=shape.hidden_size, outputs=rows))
    seen += products
    return sum(figure.seconds for figure in products) + tokens * rows * hardware.loss_seconds_per_logit


def _longest_stage(spread: Spread, *, layer: float, head: float) -> tuple[int, float]:
    """(number, seconds of a micro-batch) of the pipeline rank that the others wait for."""
    last = len(spread.layers) - 1
    seconds = [count * layer + (head if stage == last else 0.0) for stage, count in enumerate(spread.layers)]
    stage = max(range(len(seconds)), key=lambda each: (seconds[each], each))
    return stage, seconds[stage]


def tensor_seconds(shape: ModelShape, *, tokens: int, spread: Spread) -> float:
    """A layer's four sums over [tokens, h] (Shoeybi et al. 2019, figure 4), none of them hidden.

    With sequence parallelism each is two halves: ranks get parts of the sum, and gather them when they need the whole.
    """
    if spread.tensor == 1:
        return 0.0
    seconds = partial(spread.tensor_link.seconds, ranks=spread.tensor, size=tokens * shape.hidden_size * ACTIVATION)
    return 4 * (2 * seconds("reduce-scatter") if spread.sequence_parallel else seconds("all-reduce"))


def _dividing_seconds(number: int, *, spread: Spread, bytes_per_second: float) -> float:
    """Before replicas send ``number`` gradients they divide them: Megatron's DDP, in a kernel that nothing hides."""
    return 0.0 if spread.data == 1 else 2 * number * GRADIENT / bytes_per_second


def _reduction_seconds(number: int, *, spread: Spread, backward: float) -> float:
    """Of ``number`` gradients over the replicas; what is left of it beside the last micro-batch's backward.

    A replica that updates a part alone needs the sum of that part alone.
    """
    if spread.data == 1:
        return 0.0
    kind: Reduction = "reduce-scatter" if spread.shards_update else "all-reduce"
    seconds = spread.data_link.seconds(kind, ranks=spread.data, size=number * GRADIENT)
    return max(seconds - backward, 0.0) if spread.overlaps_reduction else seconds


def _gathering_seconds(number: int, *, spread: Spread, forward: float) -> float:
    """Of ``number`` parameters, updated in parts; what is left of it beside the next step's first forward."""
    if spread.data == 1 or not spread.shards_update:
        return 0.0
    seconds = spread.data_link.seconds("reduce-scatter", ranks=spread.data, size=number * PARAMETER)
    return max(seconds - forward, 0.0) if spread.overlaps_gathering else seconds
