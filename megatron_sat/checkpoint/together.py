"""What ranks do with a checkpoint as one: work of rank 0 whose answer is everyone's, and refusals that all share.

An error on one rank alone would leave the others waiting in the next collective; here it is raised on all of them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")

Trouble = tuple[int, str]
"""What the system said: its number (0: none) and its text."""


def on_one_rank(work: Callable[[], _T]) -> _T:
    """Let rank 0 do it; all ranks get its answer, or raise its ValueError or OSError."""
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def refuse_together(problem: str | None) -> None:
    """Raise ValueError on every rank with what any rank has to say: the first of them."""
    for found in _everyones(problem):
        if found is not None:
            raise ValueError(found)


def fail_together(trouble: Trouble | None) -> None:
    """Raise OSError on every rank where one had trouble, naming that rank; trouble with a number comes first."""
    found = [(one[0], f"rank {rank}: {one[1]}") for rank, one in enumerate(_everyones(trouble)) if one is not None]
    if found:
        raise OSError(*max(found, key=lambda one: bool(one[0])))


def _everyones(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
