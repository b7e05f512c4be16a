"""RIA (ICLR 2024, "Plug-and-Play"): a weight's share of its row plus its share of its column, times the input norm to the power 1/2.

Compared over the whole matrix, as the authors' default does. Shares keep a weak row or column from being emptied.
"""

import torch

from dlpkit.calibration import Stats
from dlpkit.kernels.score import Scores

NEEDS = {"sq"}
PER = "matrix"


def scores(weight: torch.Tensor, stats: Stats) -> Scores:
    """|w| * ||x|| ** (1/2) * (1 / sum of the row + 1 / sum of the column), both sums of |w|"""
    return Scores(weight, scale=stats.sq.sqrt().sqrt(), row=_share(weight, 1), column=_share(weight, 0))


def _share(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return 1 / torch.linalg.vector_norm(weight, 1, dim, dtype=torch.float32).clamp_min(1e-30)
