"""Weight importance from activation norms, score[n, k] = |weight[n, k]| * sqrt(sq[k]), and what a whole block of scores looks like.

A block of an 8B model has 2 * 10**8 scores, so its statistics take an iterable that can be walked again and never hold more than one
weight's scores. The exact median refines a histogram of the bit pattern: non-negative floats order as their bits do, so counting the
upper 16 bits in one walk and the lower 16 of the one bin that matters in a second walk finds any order statistic without a sort.
"""

from collections.abc import Iterable

import torch


def score(weight: torch.Tensor, sq: torch.Tensor) -> torch.Tensor:
    """[N, K] of any float dtype, [K] float32 sums of squares -> [N, K] float32; larger means keep (Wanda, arXiv:2306.11695)."""
    if weight.ndim != 2 or sq.shape != weight.shape[1:]:
        raise ValueError(f"score wants weight [N, K] and sq [K], got {tuple(weight.shape)} and {tuple(sq.shape)}")
    return weight.float().abs() * sq.float().sqrt()


def median(parts: Iterable[torch.Tensor]) -> float:
    """The lower median of all values of `parts`, exactly; walks `parts` twice. Values are float32 and not negative."""
    upper = sum(_counts(part.view(torch.int32) >> 16) for part in _flat(parts))
    rank = (int(upper.sum()) - 1) // 2
    top, rank = _locate(upper, rank)
    lower = sum(_counts(bits[(bits >> 16) == top] & 0xFFFF) for bits in (p.view(torch.int32) for p in _flat(parts)))
    low, _ = _locate(lower, rank)
    return torch.tensor(top << 16 | low, dtype=torch.int32).view(torch.float32).item()


def mean(parts: Iterable[torch.Tensor]) -> float:
    """Mean of all values of `parts`, summed in float64."""
    total, count = 0.0, 0
    for part in _flat(parts):
        total, count = total + part.sum(dtype=torch.float64).item(), count + part.numel()
    return total / count


def outlier_share(parts: Iterable[torch.Tensor], times: float) -> float:
    """Share of all values of `parts` above `times` x their mean; walks `parts` twice."""
    threshold = times * mean(parts)
    above, count = 0, 0
    for part in _flat(parts):
        above, count = above + int((part > threshold).sum()), count + part.numel()
    return above / count


def _flat(parts: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (part.float().flatten() for part in parts)


def _counts(bins: torch.Tensor) -> torch.Tensor:
    return torch.bincount(bins, minlength=1 << 16).cpu()  # [65536]


def _locate(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the value of that rank, and the rank within it."""
    ends = counts.cumsum(0)
    place = int(torch.searchsorted(ends, rank, right=True))
    return place, rank - int(ends[place] - counts[place])
