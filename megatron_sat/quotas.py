"""How finely heads and channels can be left out, and what that makes of a schedule where a reader may expect else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from megatron_sat.model.flops import KeptShape, ModelShape


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How finely one kind of neuron can be left out."""

    noun: str
    """heads or channels, as the table counts them."""
    total: int
    size: str
    """How many of what one quota is taken from."""
    way_out: str
    kept: Callable[[KeptShape], int]


def quotas_of(shape: ModelShape, *, selection_groups: int, channel_multiple: int, gqa: str) -> tuple[Quota, Quota]:
    """Of heads and of channels."""
    larger = "fewer --sat-selection-groups, where the TP size allows it, make quotas larger"
    fewer = larger if selection_groups > 1 else "rates that are further apart keep different numbers"
    in_group, quota_groups = shape.heads_per_group, shape.num_query_groups // selection_groups
    unit = "head" if in_group == 1 else "query group"
    multiple = f" in multiples of {channel_multiple}" if channel_multiple > 1 else ""
    return (
        Quota(
            noun="heads",
            total=shape.num_attention_heads,
            size=_count(in_group, "head") if gqa == "head" else _count(quota_groups, unit),
            way_out="--sat-gqa group omits whole query groups instead" if gqa == "head" else fewer,
            kept=lambda kept: kept.heads,
        ),
        Quota(
            noun="channels",
            total=shape.ffn_hidden_size,
            size=f"{shape.ffn_hidden_size // selection_groups} channels{multiple}",
            way_out=fewer + (", a smaller --sat-channel-multiple makes them finer" if multiple else ""),
            kept=lambda kept: kept.channels,
        ),
    )


def quota_warnings(quota: Quota, rungs: Sequence[tuple[Fraction, KeptShape]], *, many: int) -> list[str]:
    """Rates that ask for less than one of a quota and get one, and different rates that keep the same.

    Of more rungs than ``many`` the second is not said: a rate that falls every step is bound to keep the same for some.
    """
    found = []
    for rate, shape in rungs:
        kept = quota.kept(shape)
        if kept > quota.total * (1 - rate):
            found.append(
                f"{quota.noun}: at rate {text(rate)} nothing would stay of a quota ({quota.size}), so its "
                f"least part does: {kept} of {quota.total} are kept; {quota.way_out}"
            )
            break  # the highest rate says it all
    runs = [(kept, [rate for rate, _ in run]) for kept, run in groupby(rungs, key=lambda rung: quota.kept(rung[1]))]
    same = [
        f"rates {', '.join(map(text, rates))} all keep {kept} of {quota.total}" for kept, rates in runs if rates[1:]
    ]
    if same and len(rungs) <= many:
        found.append(f"{quota.noun}: {' and '.join(same)}, for a quota is of {quota.size}; {quota.way_out}")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def text(value: Fraction | int) -> str:
    """As tables and warnings show a count or a rate."""
    return str(value) if isinstance(value, int) else f"{float(value):.3g}"
