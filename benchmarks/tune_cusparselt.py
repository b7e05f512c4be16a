"""Measure cuSPARSELt's algorithms: the time of each for 2:4 layers and rows of x, as JSON lines and, fastest first, as a table.

    python benchmarks/tune_cusparselt.py --rows out.jsonl [--shapes 14336x4096 ...] [--batches 512 2048 ...]

`dlpkit.kernels.algorithms` is read off its output. Of an algorithm that the library refuses, or that is wrong or gives other bits the
second time, there is no row. `host_ms` is what a product costs the host outside CUDA graphs.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_matmul import TOLERANCE, relative_error
from quality import environment
from shapes import sparse
from timing import clock, copies, ring_length
from tune_paths import TIMED_MS, columns

from dlpkit.kernels import vendor

SHAPES = ["14336x4096", "4096x14336", "4096x4096", "6144x4096", "28672x4096"]
ROWS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
ALGORITHMS = range(64)  # more than any version has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=ROWS)
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    args = parser.parse_args()
    where = {"cusparselt": torch.backends.cusparselt.version()} | environment(args.commit)
    for N, K in (map(int, shape.split("x")) for shape in args.shapes):
        weight = sparse((N, K), "2:4")
        compressed = torch._cslt_compress(weight)
        ring = copies(compressed, ring_length(compressed.nbytes))
        for M in args.batches:
            found = sorted(measure(weight, ring, M), key=lambda row: row["us"])
            with args.rows.open("a") as file:
                file.writelines(json.dumps(row | where) + "\n" for row in found)
            best = "  ".join(f"{row['algorithm']}: {row['speedup']:.2f}" for row in found[:5])
            print(f"{N:6} x {K:5}, {M:4} rows of x, times cuBLAS: {best}", flush=True)


def measure(weight: torch.Tensor, ring: list[torch.Tensor], M: int) -> Iterator[dict]:
    """Rows of all algorithms for one layer and M rows of x."""
    xs = [torch.randn(M, weight.shape[1], device="cuda", dtype=weight.dtype) for _ in ring]
    want = (xs[0].float() @ weight.float().t()).double()
    for algorithm in ALGORITHMS:
        calls = [functools.partial(vendor.product, x, w, None, algorithm) for x, w in zip(xs, ring, strict=True)]
        try:
            y = calls[0]()
        except RuntimeError:
            torch.cuda.synchronize()  # ends here if the CUDA context is gone
            continue
        if not torch.equal(y, calls[0]()) or (error := relative_error(y, want)) >= TOLERANCE:
            continue
        host_ms = statistics.median(host(call) for call in calls[:9])
        us, spread = clock(calls, TIMED_MS)
        about = {"bench": "cusparselt", "kernel": "cusparselt", "format": "cusparselt", "algorithm": algorithm}
        measured = columns(weight, "2:4", M, ring[0].nbytes, error, us, spread)
        yield about | measured | {"host_ms": round(host_ms, 3)}


def host(call: functools.partial) -> float:
    """Milliseconds until a call returns, the GPU idle."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
