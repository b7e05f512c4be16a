"""Score, select and zero of one layer in one kernel, against a stable sort of the dense scores, plain and compiled."""

import pytest
import torch
from shapes import norms
from timing import clock, copies, ring_length, stopwatch

from dlpkit.kernels import cull
from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import select
from dlpkit.patterns import Pattern

SHAPES = [(14336, 4096), (4096, 14336)]
PATTERNS = ["0.5", "0.7", "0.5@256", "2:4", "4:8", "8:16", "16:32"]
COMPILED = ["0.5", "2:4"]  # compiling takes longer than measuring


def layer(shape) -> Scores:
    """Wanda's scores of a normal weight: a few inputs are ten times the median."""
    gen = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(shape, generator=gen, device="cuda", dtype=torch.bfloat16)
    return Scores(weight, norms(shape[1], gen))


def sorted_out(weight: torch.Tensor, scale: torch.Tensor, cut) -> torch.Tensor:
    return weight.masked_fill(~select(Scores(weight, scale).dense(), cut), 0.0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def bench_select(shape, pattern, timed):
    scores = layer(shape)
    cut = Pattern.parse(pattern).cut(shape, "row")
    expected = sorted_out(scores.weight, scores.scale, cut)
    baseline_us = stopwatch(lambda: sorted_out(scores.weight, scores.scale, cut), 3)[0]
    compiled_us = None
    if pattern in COMPILED:
        compiled = torch.compile(sorted_out)
        compiled_us = round(stopwatch(lambda: compiled(scores.weight, scores.scale, cut), 3)[0], 2)
    ring = copies(scores, ring_length(scores.weight.nbytes))
    outs = [torch.empty_like(scores.weight) for _ in ring]  # in place, the next replay would find its work done
    calls = [
        lambda s=s, out=out: cull.groups(s, out, cut.size, cut.go, cut.last) for s, out in zip(ring, outs, strict=True)
    ]
    calls[0]()
    us = timed(
        calls, nbytes=2 * scores.weight.nbytes, baseline_us=baseline_us, watch=clock,
        bench="select", kernel="cull", N=shape[0], K=shape[1], dtype="bfloat16", pattern=pattern, per="row",
        error=int((outs[0] != expected).sum()), baseline="torch.sort", compiled_us=compiled_us,
    )  # fmt: skip
    assert us > 0
    assert torch.equal(outs[0], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def bench_select_per_matrix(shape, timed):
    scores = layer(shape)
    cut = Pattern.parse("0.5").cut(shape, "matrix")
    expected = sorted_out(scores.weight, scores.scale, cut)
    out = torch.empty_like(scores.weight)
    baseline_us = stopwatch(lambda: sorted_out(scores.weight, scores.scale, cut), 3)[0]
    cull.matrix(scores, out, cut.go)
    timed(
        lambda: cull.matrix(scores, out, cut.go), nbytes=2 * scores.weight.nbytes, baseline_us=baseline_us, watch=stopwatch,
        bench="select", kernel="cull", N=shape[0], K=shape[1], dtype="bfloat16", pattern="0.5", per="matrix",
        error=int((out != expected).sum()), baseline="torch.sort", compiled_us=None,
    )  # fmt: skip
    assert torch.equal(out, expected)
