"""OWL (arXiv:2310.05175): a block with a larger share of outlier scores is kept denser."""

from collections.abc import Iterable

import torch

from dlpkit.allocation import spread
from dlpkit.kernels import statistics
from dlpkit.kernels.score import Scores

NEEDS = "scores"


def summarise(parts: Iterable[Scores], times: float = 5.0) -> float:
    """Share of a block's scores above `times` x their mean (M of the paper)."""
    return statistics.outlier_share(parts, times)


def sparsities(summaries: torch.Tensor, sizes: torch.Tensor, target: float, lam: float = 0.08) -> torch.Tensor:
    """[B] summaries, [B] parameter counts -> [B] sparsities, 2 * lam apart at most (lambda of the paper)."""
    return spread(summaries, sizes, target, lam)
