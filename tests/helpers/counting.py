"""torch's FLOP counter over a sparse model in training: what the formulas are held against."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """torch's counter, with attention as plain products: it does not know the CPU's flash kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def by_product(counter: FlopCounterMode) -> dict[str, int]:
    """Operations by kind of product: mm of the linear layers, bmm of the attention."""
    return {str(op): int(count) for op, count in counter.get_flop_counts()["Global"].items()}


def as_causal(counted: dict[str, int], *, seq: int) -> int:
    """The count, had each token attended to itself and those before it alone, in sequences of ``seq``."""
    square = sum(count for op, count in counted.items() if "bmm" in op)
    pairs = sum(1 for query in range(seq) for key in range(seq) if key <= query)
    return sum(counted.values()) - square + square * pairs // seq**2
