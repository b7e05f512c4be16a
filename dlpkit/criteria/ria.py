"""RIA (ICLR 2024, "Plug-and-Play"): a weight's share of its row plus its share of its column, times the input norm to the power 1/2.

Compared over the whole matrix, as the authors' default does. Shares keep a weak row or column from being emptied.
"""

import torch

from dlpkit.calibration import Stats

NEEDS = {"sq"}
PER = "matrix"


def score(weight: torch.Tensor, stats: Stats) -> torch.Tensor:
    """[N, K] -> [N, K] float32."""
    size = weight.float().abs()
    share = size / size.sum(1, keepdim=True).clamp_min(1e-30) + size / size.sum(0, keepdim=True).clamp_min(1e-30)
    return share * stats.sq.sqrt().sqrt()
