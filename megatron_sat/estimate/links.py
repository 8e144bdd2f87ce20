"""What joins the GPUs of a run, and how long a collective over it takes.

Inside a host a collective takes what it was measured to take, where the device's table holds that
(`benchmarks/bench_comm.py` adds it); else, and between hosts, what it sends over a bandwidth that somebody said. What
it sends is what a ring sends: of n ranks each (n - 1)/n of a tensor that is reduced into parts, or gathered from them,
and twice that where all get the sum.
"""

from dataclasses import dataclass

from megatron_sat.estimate.hardware import Collective, Hardware, Reduction, interpolate, sent, slug
from megatron_sat.rehearsal.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between a GPU and others."""

    source: str
    """Who says how fast it is."""
    bytes_per_second: float
    """That a GPU sends, each way."""
    measured: tuple[Collective, ...] = ()
    """Collectives over it; for a kind that is among them ``bytes_per_second`` is not asked."""

    def seconds(self, kind: Reduction, *, ranks: int, size: int) -> float:
        """Of one collective over ``size`` bytes. A gathering of parts sends what reducing into them sends."""
        rows = [row for row in self.measured if row.kind == kind]
        rate = self.bytes_per_second
        if rows:
            rate = interpolate((ranks, size), [(row.sizes, row.bytes_per_second) for row in rows]).value
        return sent(kind, ranks=ranks, size=size) / rate


@dataclass(frozen=True, kw_only=True)
class Links:
    """Of every GPU of a cluster."""

    inside: Link
    """To GPUs of its host."""
    across: Link | None
    """To other hosts; None: nobody said."""


def links_of(hardware: Hardware, *, cluster: Cluster, network: float | None) -> Links:
    """network: bytes a second that each GPU sends to other hosts; None: nobody said.

    What ``hardware`` measured joins its own kind of GPU alone: an H800 computes as an H100 does and has less NVLink.
    """
    own = cluster.gpu in slug(hardware.name).split("-")
    across = None
    if network is not None:
        across = Link(source=f"--network ({network / 1e9:.3g} GB/s a GPU), not measured", bytes_per_second=network)
    return Links(inside=_inside(cluster, measured=hardware if own else None), across=across)


def _inside(cluster: Cluster, *, measured: Hardware | None) -> Link:
    """measured: the device whose collectives are those of the cluster; None: there is none."""
    sheet = cluster.kind.nvlink / 2
    if measured is None or not measured.collectives:
        said = f"the data sheet ({sheet / 1e9:.0f} GB/s a GPU), not measured: benchmarks/bench_comm.py adds that"
        return Link(source=said, bytes_per_second=sheet)
    rows, about = measured.collectives, measured.collectives_about
    ranks, sizes = {row.ranks for row in rows}, {round(row.size / 1e6) for row in rows}
    of = f"{_range(ranks)} ranks and {_range(sizes)} MB a call"
    said = f"what was measured, {of}: {about['command']}, commit {about['commit']}"
    return Link(source=said, bytes_per_second=sheet, measured=rows)


def _range(values: set[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
