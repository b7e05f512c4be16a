"""What a whole block of scores looks like: exact median, mean, share of outliers.

A block of an 8B model has 2 * 10**8 scores, so its statistics take an iterable that can be walked again, and on a GPU hold none of them.
The exact median refines a histogram of the bit pattern: non-negative floats order as their bits do, so counting the upper 16 bits in
one read of the weights and the lower 16 of the one bin that matters in a second finds any order statistic without a sort.
"""

from collections.abc import Iterable

import torch

from dlpkit.kernels.runtime import HAS_TRITON
from dlpkit.kernels.score import Scores

if HAS_TRITON:
    from dlpkit.kernels import census


def median(parts: Iterable[Scores]) -> float:
    """The lower median of all scores of `parts`, exactly, in two reads; walks `parts` twice."""
    upper = sum(_upper_counts(part) for part in parts)
    rank = (upper.sum() - 1) // 2
    top, before = locate(upper, rank)
    lower = sum(_lower_counts(part, top) for part in parts)
    low, _ = locate(lower, rank - before)
    return (top << 16 | low).int().view(torch.float32).item()


def mean(parts: Iterable[Scores]) -> float:
    """Mean of all scores of `parts` in one read, summed in float64."""
    total, count = 0.0, 0
    for part in parts:
        total, count = total + _sum(part), count + part.weight.numel()
    return float(total) / count


def outlier_share(parts: Iterable[Scores], times: float) -> float:
    """Share of all scores of `parts` above `times` x their mean; walks `parts` twice."""
    threshold = torch.tensor(times * mean(parts), dtype=torch.float32)
    above, count = 0, 0
    for part in parts:
        above, count = above + _above(part, threshold), count + part.weight.numel()
    return int(above) / count


def locate(counts: torch.Tensor, rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] counts, a rank from 0 -> the bin that holds the value of that rank, and how many lie in the bins before it."""
    ends = counts.cumsum(0)
    place = torch.searchsorted(ends, rank, right=True)
    return place, ends[place] - counts[place]


def _upper_counts(part: Scores) -> torch.Tensor:
    """How many scores begin with each of 16 bits: [2 ** 15] int64."""
    if part.on_kernels():
        return census.upper_counts(part)
    return torch.bincount(part.dense().view(torch.int32).flatten() >> 16, minlength=1 << 15)


def _lower_counts(part: Scores, top: torch.Tensor) -> torch.Tensor:
    """How many of those that begin with `top` end with each of 16 bits: [2 ** 16] int64."""
    if part.on_kernels():
        return census.lower_counts(part, top)
    bits = part.dense().view(torch.int32)
    return torch.bincount(bits[(bits >> 16) == top] & 0xFFFF, minlength=1 << 16)


def _sum(part: Scores) -> torch.Tensor:
    return census.total(part) if part.on_kernels() else part.dense().sum(dtype=torch.float64)


def _above(part: Scores, threshold: torch.Tensor) -> torch.Tensor:
    if part.on_kernels():
        return census.above(part, threshold)
    return (part.dense() > threshold.to(part.weight.device)).sum()
