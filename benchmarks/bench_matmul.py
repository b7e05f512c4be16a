"""Packed matmul at one to eight rows of x, against cuBLAS on the same weight stored dense, and a dense Triton GEMV at one row."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from dense_gemv import gemv
from shapes import SHAPES, UNSTRUCTURED, density, sparse
from timing import clock, copies, ring_length

from dlpkit.kernels import crossover, formats

MASKS = [(p, mask) for p in UNSTRUCTURED for mask in ("random", "wanda")]
MASKS += [(p, "random") for p in ("2:4", "4:8", "8:16")]  # full groups: no mask differs from another
ROWS = [1, 2, 4, 8]
TOLERANCE = 3e-3  # relative error of a bfloat16 product


@functools.lru_cache(maxsize=1)
def layer(shape, pattern, masks):
    """The weight and a ring of its packed copies."""
    weight = sparse(shape, pattern, masks)
    packed = formats.get("nm" if ":" in pattern else "sell").pack(weight)
    return weight, copies(packed, ring_length(packed.nbytes))


@functools.lru_cache(maxsize=256)
def dense_us(shape, M) -> dict[str, float]:
    """Microseconds of the dense products of this shape."""
    N, K = shape
    n = ring_length(2 * N * K)
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(n)]
    xs = [torch.randn(M, K, device="cuda", dtype=torch.bfloat16) for _ in range(n)]
    calls = {"cublas": [functools.partial(torch.nn.functional.linear, x, w) for x, w in zip(xs, weights, strict=True)]}
    if M == 1:
        calls["triton_gemv"] = [functools.partial(gemv, x, w) for x, w in zip(xs, weights, strict=True)]
        assert relative_error(gemv(xs[0], weights[0]), xs[0].double() @ weights[0].double().t()) < TOLERANCE
    return {name: clock(ring)[0] for name, ring in calls.items()}


@contextmanager
def pinned(kernel: str) -> Iterator[None]:
    """Have every packed weight multiplied by this kernel, whatever is fastest."""
    fastest = crossover.fastest
    crossover.fastest = lambda *of: crossover.Choice(kernel, 0.0, None)
    try:
        yield
    finally:
        crossover.fastest = fastest


def relative_error(got, want) -> float:
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize(("pattern", "mask"), MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def bench_matmul(shape, pattern, mask, M, masks, timed):
    weight, ring = layer(shape, pattern, masks)
    N, K = shape
    xs = [torch.randn(M, K, device="cuda", dtype=weight.dtype) for _ in ring]
    format = formats.name(type(ring[0]))
    kernel = {"sell": "walk", "nm": "pick"}[format]
    dense = dense_us(shape, M)
    with pinned(kernel):
        error = relative_error(ring[0].matmul(xs[0]), xs[0].double() @ weight.double().t())
        assert error < TOLERANCE
        timed(
            [functools.partial(packed.matmul, x) for packed, x in zip(ring, xs, strict=True)],
            nbytes=ring[0].nbytes + xs[0].nbytes + 2 * M * N, baseline_us=dense["cublas"],
            bench="matmul", kernel=kernel, format=format, N=N, K=K, M=M,
            dtype="bfloat16", pattern=pattern, sparsity=round(1 - density(pattern), 4), mask=mask, error=round(error, 6),
            baseline="cublas", triton_gemv_us=round(dense["triton_gemv"], 2) if M == 1 else None,
        )  # fmt: skip
