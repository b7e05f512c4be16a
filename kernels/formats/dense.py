"""No packing: the weight as it is, multiplied by the vendor's dense kernel. What a layer runs where no sparse kernel wins."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Dense:
    values: torch.Tensor  # [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.values, bias)

    def dense(self) -> torch.Tensor:
        return self.values


def pack(weight: torch.Tensor) -> Dense:
    """[N, K] -> the same tensor, wrapped."""
    if weight.ndim != 2:
        raise ValueError(f"dense.pack wants a weight [N, K], got shape {tuple(weight.shape)}")
    return Dense(weight)
