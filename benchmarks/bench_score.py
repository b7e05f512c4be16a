"""Statistics of all scores of one block of Llama 3 8B, 2.2 * 10**8 of them, against torch on the dense scores, plain and compiled."""

import functools

import pytest
import torch
from shapes import norms
from timing import stopwatch

from dlpkit.kernels import statistics
from dlpkit.kernels.score import Scores

BLOCK = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
READS = {"median": 2, "mean": 1, "outlier_share": 2}  # of the weights


@functools.cache
def block() -> list[Scores]:
    gen = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(shape, generator=gen, device="cuda", dtype=torch.bfloat16) for shape in BLOCK]
    return [Scores(weight, norms(weight.shape[1], gen)) for weight in weights]


def dense(weights: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([Scores(w, s).dense().flatten() for w, s in zip(weights, scales, strict=True)])


def by_torch(statistic: str, weights: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    scores = dense(weights, scales)
    if statistic == "median":
        return scores.median()
    return scores.mean() if statistic == "mean" else (scores > 5 * scores.mean()).float().mean()


@pytest.mark.parametrize("statistic", READS)
def bench_score(statistic, timed):
    parts = block()
    operands = [part.weight for part in parts], [part.scale for part in parts]
    compiled = torch.compile(functools.partial(by_torch, statistic))
    more = (5.0,) if statistic == "outlier_share" else ()
    call = functools.partial(getattr(statistics, statistic), parts, *more)
    expected = by_torch(statistic, *operands).item()
    error = abs(call() - expected) / expected
    timed(
        call, nbytes=READS[statistic] * sum(part.weight.nbytes for part in parts),
        baseline_us=stopwatch(lambda: by_torch(statistic, *operands), 3)[0], watch=stopwatch,
        bench="score", kernel=statistic, N=None, K=None, weights=sum(part.weight.numel() for part in parts), reads=READS[statistic],
        dtype="bfloat16", error=error, baseline="torch", compiled_us=round(stopwatch(lambda: compiled(*operands), 3)[0], 2),
    )  # fmt: skip
    assert error == 0 if statistic == "median" else error < 1e-3  # torch sums in float32
