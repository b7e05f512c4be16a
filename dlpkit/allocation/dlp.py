"""DLP (arXiv:2505.23807): a block whose typical score is a small share of the model's is kept denser.

The paper summarises a block by the median of its Wanda scores. The released code takes the mean, whatever its flag says:
strategy="mean" reproduces it. I^l = 1 - S^l / sum(S) is the block's relative importance, alpha half the range of the sparsities.
"""

from collections.abc import Iterable

import torch

from dlpkit.allocation import spread
from dlpkit.kernels import statistics
from dlpkit.kernels.score import Scores

NEEDS = "scores"
STRATEGIES = {"median": statistics.median, "mean": statistics.mean}


def summarise(parts: Iterable[Scores], strategy: str = "median") -> float:
    """One number for a block, S^l, from the scores of all its weights."""
    if strategy not in STRATEGIES:
        raise ValueError(f"dlp knows the strategies {', '.join(STRATEGIES)}, got {strategy!r}")
    return STRATEGIES[strategy](parts)


def sparsities(summaries: torch.Tensor, sizes: torch.Tensor, target: float, alpha: float = 0.15) -> torch.Tensor:
    """[B] summaries, [B] parameter counts -> [B] sparsities."""
    return spread(1 - summaries / summaries.sum(), sizes, target, alpha)
