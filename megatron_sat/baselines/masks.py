"""Which single weights take part: a bool for each entry of the model's matrices, and what it does to a run.

The reference semantics of a sparse matrix are w * m in the forward and dw * m in the backward. Here weights that take
no part are zero in every copy (`clear`), and their gradient is set to zero when it is reduced and before its norm is
taken (`silence`): an optimizer that has no history of them then leaves them zero bit for bit, momentum and decay
included, and clipping sees what takes part alone. Nothing is faster by that; it is what such a method would learn.

Masks go through a checkpoint as bits of the whole matrices (`state`), so a run may be resumed in another layout.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.baselines.matrices import Matrix

PREFIX = "sat.mask."
"""Of the names in a checkpoint."""
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


class Masks:
    """The masks of this rank's matrices; at first everything takes part."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = list(matrices)
        self._parameters = {id(matrix.parameter): matrix.parameter for matrix in self.matrices}
        self._masks: dict[int, Tensor] = {}
        self.lift()

    def lift(self) -> None:
        """From now on everything takes part."""
        self._masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in self._parameters.items()}

    def of(self, parameter: Parameter) -> Tensor:
        """Bool of the parameter's shape on this rank: true where an entry takes part."""
        return self._masks[id(parameter)]

    def whole(self, matrix: Matrix) -> Tensor:
        """Bool [R, C] of a matrix; collective over tensor parallelism."""
        return matrix.whole(self.of(matrix.parameter))

    def set(self, matrix: Matrix, whole: Tensor) -> None:
        """whole: bool [R, C], the same on all ranks."""
        matrix.put(whole, into=self.of(matrix.parameter))

    def left_out(self) -> Iterator[tuple[Parameter, Tensor]]:
        """For `engines.cleared`: each parameter, and where its entries take no part."""
        for key, parameter in self._parameters.items():
            yield parameter, ~self._masks[key]

    @torch.no_grad()
    def silence(self) -> None:
        """Zero the gradient of what takes no part, where DDP has gathered it (main_grad)."""
        for parameter, where in self.left_out():
            gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            gradient.masked_fill_(where, 0)

    # -- through a checkpoint

    def state(self) -> dict[str, Tensor]:
        """By name the packed masks of this stage's matrices, whole, on the CPU; collective over tensor parallelism."""
        return {f"{PREFIX}{matrix.key}": packed(self.whole(matrix)).cpu() for matrix in self.matrices}

    def load(self, saved: Mapping[str, Tensor]) -> bool:
        """Take over what `state` gave, in any layout; False where nothing of it is there.

        Raises ValueError where some matrices have none, or one of another size.
        """
        known = saved_keys(saved)
        if not known:
            return False
        for matrix in self.matrices:
            rows, columns = matrix.shape
            bits = saved.get(f"{PREFIX}{matrix.key}")
            if bits is None or bits.numel() != -(-rows * columns // 8):
                raise ValueError(
                    f"the checkpoint's masks must be of this model, that of matrix {matrix.key} is not ({rows} x "
                    f"{columns} weights); resume with the model of the saved run, or pass --finetune"
                )
            self.set(matrix, unpacked(bits, shape=(rows, columns)))
        return True


def saved_keys(saved: Iterable[str]) -> list[str]:
    """Those of a checkpoint's names that are masks."""
    return [name for name in saved if name.startswith(PREFIX)]


def packed(mask: Tensor) -> Tensor:
    """uint8 [⌈n/8⌉]: the bits of a bool tensor, the first one lowest."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat * torch.tensor(_BITS, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """The bool tensor of ``shape`` that `packed` was given."""
    wide = bits.unsqueeze(1) & torch.tensor(_BITS, dtype=torch.uint8, device=bits.device)
    return (wide != 0).flatten()[: shape[0] * shape[1]].view(shape)
