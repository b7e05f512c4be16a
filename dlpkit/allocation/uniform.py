"""Uniform: every block gets the target. Looks at nothing."""

import torch

NEEDS = None


def sparsities(summaries: torch.Tensor, sizes: torch.Tensor, target: float) -> torch.Tensor:
    """[B], [B] -> [B], all the target."""
    return torch.full_like(sizes, target, dtype=torch.float64)
