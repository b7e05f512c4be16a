"""Wanda (arXiv:2306.11695): |weight| times the norm of the input it multiplies, compared within each output row."""

import torch

from dlpkit.calibration import Stats
from dlpkit.kernels.score import Scores

NEEDS = {"sq"}
PER = "row"


def scores(weight: torch.Tensor, stats: Stats) -> Scores:
    """|w| * ||x||"""
    return Scores(weight, scale=stats.sq.sqrt())
