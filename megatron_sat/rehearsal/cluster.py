"""The machines that a rehearsed run is to have: what a GPU holds, computes, and passes to its neighbours.

Figures are those of the vendor's data sheets: memory as the driver reports it (a little below the name), dense bf16
operations, and NVLink in both directions together. A800 and H800 are A100 and H100 with a narrower NVLink.
"""

from dataclasses import dataclass

from megatron_sat.model.flops import ModelShape
from megatron_sat.rehearsal.memory import GIB

ROOM = 0.08
"""Share of a GPU's memory that an estimate must leave free: CUDA context, NCCL's buffers, what the allocator loses."""
UTILISATION = 0.5
"""Of the peak, that products are assumed to reach where time is compared."""
WIDE = 0.25
"""Communication of tensor parallelism over the time of its products, from which on a reader is warned."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    memory: int
    """Bytes."""
    flops: float
    """Dense bf16 operations a second at the peak."""
    nvlink: float
    """Bytes a second, both directions together."""


GPUS: dict[str, Gpu] = {
    "a100": Gpu(memory=int(79.2 * GIB), flops=312e12, nvlink=600e9),
    "a100-40g": Gpu(memory=int(39.4 * GIB), flops=312e12, nvlink=600e9),
    "a800": Gpu(memory=int(79.2 * GIB), flops=312e12, nvlink=400e9),
    "h100": Gpu(memory=int(79.2 * GIB), flops=989e12, nvlink=900e9),
    "h200": Gpu(memory=int(139.8 * GIB), flops=989e12, nvlink=900e9),
    "h800": Gpu(memory=int(79.2 * GIB), flops=989e12, nvlink=400e9),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many GPUs of one kind, in hosts of equal size."""

    gpu: str
    world_size: int
    per_host: int = 8

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu must be one of {', '.join(GPUS)}, got {self.gpu}; choose the one nearest to it")
        for name, value in (("--world-size", self.world_size), ("--gpus-per-host", self.per_host)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.world_size > self.per_host and self.world_size % self.per_host:
            raise ValueError(
                f"--gpus-per-host ({self.per_host}) must divide --world-size ({self.world_size}): hosts are of one "
                "size; change one of them"
            )

    @property
    def hosts(self) -> int:
        return max(1, self.world_size // self.per_host)

    @property
    def kind(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def usable(self) -> int:
        """Bytes that an estimate may fill."""
        return int(self.kind.memory * (1 - ROOM))


def tensor_parallel_cost(shape: ModelShape, *, tensor: int, gpu: Gpu, kept: float = 1.0) -> float:
    """Time of a layer's tensor-parallel sums over the time of its products, when neither hides the other.

    Forward and backward of a layer make four sums over [tokens, h] (Shoeybi et al. 2019, figure 4; sequence parallelism
    sends the same), each of which moves 2 (p-1)/p of them through a GPU, half of NVLink's bandwidth each way.
    kept: share of the layer's products that a sparse step computes; the sums stay whole.
    """
    if tensor == 1:
        return 0.0
    sent = 4 * 2 * (tensor - 1) / tensor * shape.hidden_size * 2 / (gpu.nvlink / 2)
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    channels = (3 if shape.gated else 2) * shape.ffn_hidden_size
    products = 6 * shape.hidden_size * (shape.kv_channels * heads + channels) * kept
    return sent / (products / tensor / (gpu.flops * UTILISATION))


def remarks(cluster: Cluster, shape: ModelShape, *, tensor: int, least_kept: float) -> list[str]:
    """What a reader should know of this layout on these machines. least_kept: share computed in the sparsest step."""
    if tensor == 1:
        return []
    if tensor > cluster.per_host:
        line = f"warning: tensor parallelism over {tensor} ranks leaves a host of {cluster.per_host} and its NVLink"
        return [f"{line}; use --pipeline-model-parallel-size for the rest"]
    dense = tensor_parallel_cost(shape, tensor=tensor, gpu=cluster.kind)
    sparse = tensor_parallel_cost(shape, tensor=tensor, gpu=cluster.kind, kept=least_kept)
    line = (
        f"tensor parallelism over {tensor}: its sums take about {dense:.0%} of the time of a dense layer's products, "
        f"{sparse:.0%} in the sparsest step ({cluster.gpu}: NVLink {cluster.kind.nvlink / 1e9:.0f} GB/s, products at "
        f"{UTILISATION:.0%} of the peak)"
    )
    if sparse > WIDE:
        line = f"warning: {line}; less tensor and more pipeline parallelism would save more"
    return [line]
