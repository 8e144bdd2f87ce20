"""What one device was measured to do: products of matrices by shape, attention, and what else a step is made of.

`benchmarks/bench_layer.py` measures it and leaves a JSON file, one a device, to which `benchmarks/bench_comm.py` adds
what several of them take to send each other tensors; nobody edits it. Between the shapes that were measured a rate is
interpolated in the logarithms of the sizes. Seconds are those of the device, but for `Choosing.seconds` and
`launch_seconds`, in which the host launches as it goes.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

NEIGHBOURS = 4
"""Measured shapes that a rate is interpolated from."""
FAR = math.log(4)
"""A shape this far (Euclidean distance of logarithms) from all that were measured is a guess, and is said to be one."""
Kind = Literal["forward", "input", "weight"]
Reduction = Literal["all-reduce", "reduce-scatter"]


@dataclass(frozen=True, kw_only=True)
class Product:
    """C [m, n] = A [m, k] · B [k, n], as a linear layer of a bf16 model asks for it.

    forward: activations [m, k] by a weight [n, k], transposed. input: the gradient [m, k] by a weight [k, n].
    weight: both factors are activations, and C is a sum in fp32 that is added to.
    """

    kind: Kind
    m: int
    n: int
    k: int
    seconds: float

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.m, self.n, self.k


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Causal attention, forward and backward, over a micro-batch."""

    batch: int
    sequence: int
    heads: int
    groups: int
    head_dim: int
    seconds: float

    @property
    def operations(self) -> int:
        """Of what is not masked, each query's own key included; a backward counts for two forwards."""
        return 3 * self.batch * self.heads * 2 * self.head_dim * self.sequence * (self.sequence + 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.batch * self.heads, self.sequence, self.head_dim


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """What a layer's two modules take once a step on top: choosing, packing, unpacking."""

    weights: int
    """Entries of the layer's matrices."""
    kept: int
    """Of those, what is packed."""
    seconds: float
    """As the host launches it, kernel by kernel."""
    device_seconds: float
    """The device's alone: of a choice that is replayed (--layer-graphs)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.weights, self.kept


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call over GPUs of one host, and nothing beside it."""

    kind: Reduction
    ranks: int
    size: int
    """Bytes that each rank hands in."""
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """That a rank sends."""
        return sent(self.kind, ranks=self.ranks, size=self.size) / self.seconds

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.ranks, self.size


def sent(kind: Reduction, *, ranks: int, size: int) -> float:
    """Bytes that a rank of a ring sends for a tensor of ``size`` bytes."""
    return (2 if kind == "all-reduce" else 1) * (ranks - 1) / ranks * size


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device."""

    name: str
    """As the driver calls it."""
    products: tuple[Product, ...]
    attention: tuple[Attended, ...]
    choosing: tuple[Choosing, ...]
    bytes_per_second: float
    """Of a kernel that reads and writes activations once."""
    loss_seconds_per_logit: float
    """Of embedding, head and loss, beyond the head's products: forward and backward, of a token and a row."""
    update_seconds_per_parameter: float
    """Of zeroing gradients, clipping, optimizer and copying weights back, once a step."""
    launch_seconds: float
    """What the host needs to ask for a layer's forward and backward, kernel by kernel."""
    about: dict[str, Any]
    """Command, commit, versions."""
    collectives: tuple[Collective, ...] = ()
    """Of several such devices in one host; none: nobody measured."""
    collectives_about: dict[str, Any] = field(default_factory=dict)
    """Command, commit, versions: theirs."""

    def __post_init__(self) -> None:
        for rows in (self.products, self.attention, self.collectives):
            for row in rows:
                if not row.seconds > 0:
                    raise ValueError(f"a measured time must be above 0, got {row}; measure again")
        if not self.bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be above 0, got {self.bytes_per_second}; measure again")
        if self.collectives and not {"command", "commit"} <= self.collectives_about.keys():
            raise ValueError(
                f"collectives_about must hold the command and commit of the collectives, got {self.collectives_about}; "
                "measure them again with benchmarks/bench_comm.py"
            )

    def product_seconds(self, kind: Kind, *, m: int, n: int, k: int) -> "Figure":
        """How long one product takes; sizes as in `Product`."""
        of_kind = [product for product in self.products if product.kind == kind]
        rate = interpolate((m, n, k), [(p.sizes, p.operations / p.seconds) for p in of_kind])
        return Figure(seconds=2 * m * n * k / rate.value, distance=rate.distance)

    def attention_seconds(self, *, batch: int, sequence: int, heads: int, groups: int, head_dim: int) -> "Figure":
        """Forward and backward over a micro-batch."""
        wanted = Attended(batch=batch, sequence=sequence, heads=heads, groups=groups, head_dim=head_dim, seconds=0.0)
        rate = interpolate(wanted.sizes, [(each.sizes, each.operations / each.seconds) for each in self.attention])
        return Figure(seconds=wanted.operations / rate.value, distance=rate.distance)

    def choosing_seconds(self, *, weights: int, kept: int, replayed: bool) -> "Figure":
        """Of a layer with so many entries in its matrices, and so many of them kept, once a step. replayed: recorded
        before, so that no launch is waited for."""
        rows = [(each.sizes, each.device_seconds if replayed else each.seconds) for each in self.choosing]
        found = interpolate((weights, kept), rows)
        return Figure(seconds=found.value, distance=found.distance)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Seconds, and how far from what was measured they are (`FAR`)."""

    seconds: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Interpolated:
    """A value, and the distance of the nearest one that was measured."""

    value: float
    distance: float


def interpolate(sizes: Sequence[int], measured: Sequence[tuple[Sequence[int], float]]) -> Interpolated:
    """A value at ``sizes`` from those of the nearest measured sizes, weighted by 1 / distance² of logarithms.

    What was measured at these very sizes is returned as it is. measured: (sizes, value) pairs, at least one.
    """
    near = sorted(((_distance(sizes, other), value) for other, value in measured), key=lambda pair: pair[0])
    distance, value = near[0]
    if distance == 0.0:
        return Interpolated(value=value, distance=0.0)
    near = near[:NEIGHBOURS]
    weights = [1 / distance**2 for distance, _ in near]
    mean = sum(w * value for w, (_, value) in zip(weights, near, strict=True)) / sum(weights)
    return Interpolated(value=mean, distance=distance)


def _distance(one: Sequence[int], other: Sequence[int]) -> float:
    return math.dist([math.log(size) for size in one], [math.log(size) for size in other])


# -- the file


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def save(hardware: Hardware, path: Path) -> None:
    """Write the file that `load` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(hardware), indent=1) + "\n")


_Row = TypeVar("_Row")


def load(path: Path) -> Hardware:
    """Read what `save` wrote. Raises ValueError, with the way to make it, where that is not there or broken."""
    way_out = "measure this device with: python benchmarks/bench_layer.py"
    if not path.is_file():
        raise ValueError(f"the table of measured products must be a file, {path} is none; {way_out}")
    try:
        stored = json.loads(path.read_text())
        hardware = Hardware(
            **{
                **stored,
                "products": _rows(Product, stored["products"]),
                "attention": _rows(Attended, stored["attention"]),
                "choosing": _rows(Choosing, stored["choosing"]),
                "collectives": _rows(Collective, stored.get("collectives", ())),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        what = f"{path} must be a table of measured products, it cannot be read: {error}"
        raise ValueError(f"{what}; {way_out}") from error
    kinds = {product.kind for product in hardware.products}
    if kinds != {"forward", "input", "weight"} or not hardware.attention or not hardware.choosing:
        raise ValueError(
            f"{path} must hold products of all three kinds, attention and choosing, some are missing; {way_out}"
        )
    return hardware


def _rows(row: type[_Row], stored: Iterable[dict[str, Any]]) -> tuple[_Row, ...]:
    return tuple(row(**each) for each in stored)


def find(folder: Path, *, name: str | None) -> Path:
    """The file of the device ``name``, a part of its name, in ``folder``; the only one there where it is None.

    Raises ValueError where there is none, or more than one.
    """
    files = sorted(folder.glob("gemm-*.json"))
    there = [file for file in files if name is None or slug(name) in file.stem]
    if len(there) == 1:
        return there[0]
    wanted = "a device" if name is None else name
    have = ", ".join(file.stem.removeprefix("gemm-") for file in files) or "none"
    raise ValueError(
        f"there must be one table of measured products for {wanted} in {folder}, there are {len(there)} (for all: "
        f"{have}); name another device, or make the table on this one with: python benchmarks/bench_layer.py"
    )

