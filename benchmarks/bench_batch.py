"""Packed matmul at 8 to 8192 rows of x, against cuBLAS on the same weight stored dense: batches, prefill, and where they cross.

    cd benchmarks && pytest bench_batch.py [--rows results/batch-h100.jsonl] [-k 14336x4096] [--masks=FILE of masks.py]

Losing regimes are measured like winning ones. `kernel` is what dispatch.explain says; where that is `expand`, the row holds the
expansion and cuBLAS.
"""

import functools

import pytest
import torch
from bench_matmul import TOLERANCE, dense_us, relative_error
from shapes import UNSTRUCTURED, density, sparse
from timing import copies, ring_length

from dlpkit.kernels import dispatch, formats

SHAPES = [(14336, 4096), (4096, 14336), (8192, 8192), (4096, 4096)]
WEIGHTS = [("tile", f"{sparsity}@256") for sparsity in UNSTRUCTURED]
WEIGHTS += [("tile", "0.5"), ("tile", "0.7"), ("tile", "2:4"), ("sell", "0.5"), ("sell", "0.7"), ("nm", "2:4")]
WEIGHTS += [("fragment", "2:4"), ("cusparselt", "2:4")]
MASKS = [(*weight, "random") for weight in WEIGHTS]
MASKS += [(format, sparsity, "wanda") for format in ("tile", "sell") for sparsity in UNSTRUCTURED]
ROWS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


@functools.lru_cache(maxsize=1)
def layer(shape, format, pattern, masks):
    """The weight and a ring of its packed copies."""
    weight = sparse(shape, pattern, masks)
    packed = formats.get(format).pack(weight)
    return weight, copies(packed, ring_length(packed.nbytes))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize(("format", "pattern", "mask"), MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def bench_batch(shape, format, pattern, mask, M, masks, timed):
    weight, ring = layer(shape, format, pattern, masks)
    N, K = shape
    xs = [torch.randn(M, K, device="cuda", dtype=weight.dtype) for _ in ring]
    error = relative_error(ring[0].matmul(xs[0]), (xs[0].float() @ weight.float().t()).double())
    assert error < TOLERANCE
    timed(
        [functools.partial(packed.matmul, x) for packed, x in zip(ring, xs, strict=True)],
        nbytes=ring[0].nbytes + xs[0].nbytes + 2 * M * N, baseline_us=dense_us(shape, M)["cublas"],
        bench="batch", kernel=dispatch.explain(ring[0], M)[0], format=format, N=N, K=K, M=M,
        dtype="bfloat16", pattern=pattern, sparsity=round(1 - density(pattern), 4), mask=mask, error=round(error, 6),
        baseline="cublas",
    )  # fmt: skip
