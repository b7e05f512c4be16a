"""Wanda (arXiv:2306.11695): |weight| times the norm of the input it multiplies, compared within each output row."""

import torch

from dlpkit.calibration import Stats
from dlpkit.kernels.score import score as norm_score

NEEDS = {"sq"}
PER = "row"


def score(weight: torch.Tensor, stats: Stats) -> torch.Tensor:
    """[N, K] -> [N, K] float32."""
    return norm_score(weight, stats.sq)
