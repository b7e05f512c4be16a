"""Runtime layouts, one file each: `pack(weight)` -> a frozen dataclass with shape, nbytes, matmul and dense."""

import sys
from types import ModuleType
from typing import Protocol

import torch

from dlpkit.kernels import registry


class Packed(Protocol):
    """A packed [N, K] weight. Its tensor fields move with the module that holds it; `values` carries dtype and device."""

    shape: tuple[int, int]
    values: torch.Tensor

    @property
    def nbytes(self) -> int: ...
    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...  # [..., K] -> [..., N]
    def dense(self) -> torch.Tensor: ...  # [N, K], the exact inverse of pack


def names() -> list[str]:
    return registry.names(sys.modules[__name__])


def get(name: str) -> ModuleType:
    return registry.get(sys.modules[__name__], name)


def name(kind: type[Packed]) -> str:
    """Of the format whose dataclass this is."""
    return kind.__module__.rpartition(".")[2]
