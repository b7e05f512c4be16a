"""What stands in a layer where its attention or its MLP was."""

import torch
from torch import nn


class Zero(nn.Module):
    """Stands where the last Linear of a dropped branch stood and answers 0, which the residual stream adds.

    The zero is stored as that Linear's weight: a load without dlpkit finds [1] instead of [N, K] and fails, instead of making up a layer.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.new_zeros(1))

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight


class NoAttention(nn.Module):
    """An attention that is gone: takes whatever a block gives it, adds zero, has no weights to show and touches no cache."""

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, None]:
        return next(self.buffers()), None


class NoMLP(nn.Module):
    """An MLP that is gone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.buffers())
