"""Magnitude: a small weight matters little, whatever it multiplies. One threshold per matrix."""

import torch

from dlpkit.calibration import Stats

NEEDS: set[str] = set()
PER = "matrix"


def score(weight: torch.Tensor, stats: Stats) -> torch.Tensor:
    """[N, K] -> [N, K] float32."""
    return weight.float().abs()
