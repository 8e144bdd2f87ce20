"""Dense training at equal operations: where several dense runs of different length are known, straight between them.

Seconds depend on the machine and on how well a size fits it; operations do not. Each dense run has its learning rate
decayed over its own steps, so the line goes through finished runs, not along one.
"""

from itertools import pairwise

from megatron_sat.compare.experiment import DENSE
from megatron_sat.compare.study import Study, dense_of_steps, language_figures


def dense_groups(study: Study) -> list[str]:
    """All groups of nothing but dense training, by their steps."""
    found = [name for name, group in study.groups.items() if name in (DENSE, dense_of_steps(group.steps))]
    return sorted(found, key=lambda name: study.groups[name].steps)


def dense_at(study: Study, *, figure: str, flops: float) -> tuple[float, tuple[int, int]] | None:
    """What dense training has of ``figure`` after so many operations, and the steps of the two runs around that.

    Means over seeds. None where no two dense groups lie around it.
    """
    groups = dense_groups(study)
    known = [(study.figures[name]["flops"].mean, study.figures[name][figure].mean) for name in groups]
    steps = [study.groups[name].steps for name in groups]
    for ((low, first), (high, second)), around in zip(pairwise(known), pairwise(steps), strict=True):
        if low <= flops <= high:
            return first + (second - first) * (flops - low) / (high - low), around
    return None


def at_equal_operations(study: Study, variant: str) -> list[str]:
    """A sentence for each language; none where dense runs of other lengths do not say it."""
    said = []
    for figure in language_figures(study):
        found = dense_at(study, figure=figure, flops=study.figures[variant]["flops"].mean)
        if found is not None:
            dense, (low, high) = found
            said.append(
                f"At equal operations, between dense runs of {low:,} and {high:,} steps: {figure} of {variant} "
                f"{study.figures[variant][figure].mean:.4f}, of dense {dense:.4f}."
            )
    return said
