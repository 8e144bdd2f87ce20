"""A device whose every rate is known: what is predicted from it can be worked out by hand."""

from typing import Any

from megatron_sat.estimate.hardware import Attended, Choosing, Hardware, Product
from megatron_sat.estimate.step import KINDS

PRODUCTS, ATTENTION, STREAM = 4e12, 1e12, 2e11
"""Operations a second of products, of attention; bytes a second."""
PER_LOGIT, PER_PARAMETER, CHOOSING, REPLAYED = 1e-12, 2e-11, 3e-4, 1e-4
"""Seconds: of a logit, of a parameter, of choosing as the host launches it and of the device alone."""


def even(**changes: Any) -> Hardware:
    """Every product, and every attention, at one rate; so is any that lies between them."""
    sizes = [(64, 64, 64), (4096, 4096, 4096), (16384, 1024, 8192)]
    products = [
        Product(kind=kind, m=m, n=n, k=k, seconds=2 * m * n * k / PRODUCTS) for kind in KINDS for m, n, k in sizes
    ]
    attention = [_attended(batch=1, sequence=128), _attended(batch=4, sequence=4096)]
    settings: dict[str, Any] = {
        "name": "NVIDIA Even 80GB",
        "products": tuple(products),
        "attention": tuple(attention),
        "choosing": (Choosing(weights=10**6, kept=5 * 10**5, seconds=CHOOSING, device_seconds=REPLAYED),),
        "bytes_per_second": STREAM,
        "loss_seconds_per_logit": PER_LOGIT,
        "update_seconds_per_parameter": PER_PARAMETER,
        "launch_seconds": 0.0,
        "about": {"command": "none", "commit": "none"},
    }
    return Hardware(**settings | changes)


def _attended(*, batch: int, sequence: int) -> Attended:
    sizes = {"batch": batch, "sequence": sequence, "heads": 8, "groups": 8, "head_dim": 64}
    operations = Attended(**sizes, seconds=1.0).operations
    return Attended(**sizes, seconds=operations / ATTENTION)
