"""Magnitude: a small weight matters little, whatever it multiplies. One threshold per matrix."""

import torch

from dlpkit.calibration import Stats
from dlpkit.kernels.score import Scores

NEEDS: set[str] = set()
PER = "matrix"


def scores(weight: torch.Tensor, stats: Stats) -> Scores:
    """|w|"""
    return Scores(weight)
