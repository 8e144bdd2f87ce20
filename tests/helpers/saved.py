"""What autograd keeps for a backward, counted as it keeps it: bytes of distinct storages, parameters left out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class _Kept:
    """A tensor as autograd keeps it; counted until autograd lets go of it."""

    def __init__(self, tensor: Tensor, saved: "Saved") -> None:
        self.tensor, self._saved = tensor, saved
        saved.enter(tensor)

    def __del__(self) -> None:
        self._saved.leave(self.tensor)


class Saved:
    """Inside, ``live`` is what is kept now and ``peak`` the most that ever was."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._ignored = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
        self._holders: Counter[int] = Counter()
        self.live = self.peak = 0
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, self), lambda kept: kept.tensor)

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._ignored:
            return
        self._holders[storage.data_ptr()] += 1
        if self._holders[storage.data_ptr()] == 1:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def leave(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._ignored:
            return
        self._holders[storage.data_ptr()] -= 1
        if self._holders[storage.data_ptr()] == 0:
            self.live -= storage.nbytes()

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
