"""What formats share whose product and inverse are operators of ops.py, `<format>_matmul` and `<format>_dense`."""

from dataclasses import fields
from typing import ClassVar

import torch

from dlpkit.kernels.formats import name
from dlpkit.kernels.runtime import use_triton


class ByOperator:
    """Base of a frozen dataclass with `values`, N and K. What the operators take, `_fields` says; where they do not run, `_decoded` does."""

    format: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.format = name(cls)

    @property
    def shape(self) -> tuple[int, int]:
        return self.N, self.K

    @property
    def nbytes(self) -> int:
        held = (getattr(self, field.name) for field in fields(self))
        return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != self.values.dtype or x.shape[-1:] != (self.K,):
            want = f"x [..., {self.K}] of {self.values.dtype}"
            raise ValueError(f"{self.format}.matmul wants {want}, got {tuple(x.shape)} of {x.dtype}")
        if not self._runs():
            return torch.nn.functional.linear(x, self._decoded(), bias)
        product = getattr(torch.ops.dlpkit, f"{self.format}_matmul")
        return product(x.reshape(-1, self.K), bias, *self._fields()).view(*x.shape[:-1], self.N)

    def dense(self) -> torch.Tensor:
        if not self._runs():
            return self._decoded()
        return getattr(torch.ops.dlpkit, f"{self.format}_dense")(*self._fields())

    def _runs(self) -> bool:
        return use_triton(self.values) and self.values.element_size() == 2

    def _fields(self) -> tuple:
        raise NotImplementedError

    def _decoded(self) -> torch.Tensor:
        """[N, K] by torch alone."""
        raise NotImplementedError
