"""Packing and unpacking on the GPU, against a copy of the dense weight: what loading and saving a model costs per layer."""

import functools

import pytest
from shapes import density, sparse
from timing import stopwatch

from dlpkit.kernels import formats, storage


@functools.lru_cache(maxsize=1)
def layer(shape, pattern):
    return sparse(shape, pattern)


@pytest.mark.parametrize("verb", ["sell.pack", "sell.dense", "nm.pack", "nm.dense", "storage.encode", "storage.decode"])
@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4"])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
def bench_pack(shape, pattern, verb, timed):
    room, name = verb.split(".")
    if (room == "nm") != (":" in pattern) and room != "storage":
        pytest.skip(f"{room} is not for {pattern}")
    weight = layer(shape, pattern)
    if room == "storage":
        stored = storage.encode(weight)
        call, nbytes = (
            {"encode": lambda: storage.encode(weight), "decode": lambda: storage.decode(stored)}[name],
            stored.nbytes,
        )
    else:
        packed = formats.get(room).pack(weight)
        call, nbytes = {"pack": lambda: formats.get(room).pack(weight), "dense": packed.dense}[name], packed.nbytes
    timed(
        call, nbytes=nbytes + weight.nbytes, baseline_us=stopwatch(weight.clone)[0], watch=stopwatch,
        bench="pack", kernel=verb, format=room, N=shape[0], K=shape[1], M=None, dtype="bfloat16", pattern=pattern,
        sparsity=round(1 - density(pattern), 4), mask="random", error=0.0, baseline="copy",
    )  # fmt: skip
