"""Weight importance as a value: score[n, k] = |weight[n, k]| * scale[k] * (row[n] + column[k]).

A criterion says which terms it has; the kernels compute the scores in registers, where they need them.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels.runtime import use_triton


@dataclass(frozen=True)
class Scores:
    """The scores of a weight, larger means keep, as their terms; a term that is None is left out. float32, rounded after each operation.

    Raises ValueError for terms that do not fit the weight, or `row` without `column`.
    """

    weight: torch.Tensor  # [N, K] of any float dtype
    scale: torch.Tensor | None = None  # [K] float32, not negative
    row: torch.Tensor | None = None  # [N] float32, not negative
    column: torch.Tensor | None = None  # [K] float32, not negative

    def __post_init__(self):
        if self.weight.ndim != 2 or (self.row is None) != (self.column is None):
            raise ValueError(f"Scores wants a weight [N, K], and row with column, got shape {tuple(self.weight.shape)}")
        N, K = self.weight.shape
        for name, size in (("scale", K), ("row", N), ("column", K)):
            term = getattr(self, name)
            if term is not None and (term.shape != (size,) or term.dtype != torch.float32):
                raise ValueError(f"Scores wants {name} [{size}] float32, got {tuple(term.shape)} of {term.dtype}")

    def dense(self) -> torch.Tensor:
        """[N, K] float32: what the kernels compute and do not store."""
        score = self.weight.float().abs()
        if self.scale is not None:
            score = score * self.scale
        if self.row is not None:
            score = score * (self.row[:, None] + self.column)
        return score

    @property
    def terms(self) -> tuple[torch.Tensor | None, ...]:
        return self.scale, self.row, self.column

    def on_kernels(self) -> bool:
        """Whether the Triton kernels read these scores; where they do not, `dense` does."""
        return use_triton(self.weight, *self.terms) and self.weight.stride(1) == 1
