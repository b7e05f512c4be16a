"""Measure lane grids: for each shape, pattern and number of rows of x, the time of every (rows, segments, slack) -> JSON lines.

    python benchmarks/tune.py --rows out.jsonl [--patterns 0.5 0.7 2:4] [--shapes 14336x4096 ...]

What `dlpkit.kernels.tiles` says is read off its output, printed as a table: the best grids and what each costs over all M.
"""

import argparse
import functools
import json
import math

import torch
from bench_matmul import ROWS, TOLERANCE, relative_error
from shapes import SHAPES, sparse
from timing import clock, copies, ring_length

from dlpkit.kernels import formats

GRIDS = [(32, 8), (32, 16), (32, 32), (16, 32), (16, 64), (8, 64)]
SLACKS = [0.0, 0.03]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "0.8", "2:4"])
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES])
    args = parser.parse_args()
    with open(args.rows, "a") as file:
        for shape in args.shapes:
            for pattern in args.patterns:
                found = measure(tuple(map(int, shape.split("x"))), pattern)
                for row in found:
                    file.write(json.dumps(row) + "\n")
                report(found)


def measure(shape: tuple[int, int], pattern: str) -> list[dict]:
    weight = sparse(shape, pattern)
    N, K = shape
    format = "nm" if ":" in pattern else "sell"
    found = []
    for rows, segments in GRIDS:
        for slack in SLACKS if format == "sell" else SLACKS[:1]:
            grid = {"rows": rows, "segments": segments} | ({"slack": slack} if format == "sell" else {})
            packed = formats.get(format).pack(weight, **grid)
            ring = copies(packed, ring_length(packed.nbytes))
            for M in ROWS:
                xs = [torch.randn(M, K, device="cuda", dtype=weight.dtype) for _ in ring]
                assert relative_error(ring[0].matmul(xs[0]), xs[0].double() @ weight.double().t()) < TOLERANCE
                us, spread = clock([functools.partial(p.matmul, x) for p, x in zip(ring, xs, strict=True)])
                found.append(
                    {"N": N, "K": K, "pattern": pattern, "M": M, "us": us, "spread": spread, "nbytes": packed.nbytes}
                    | grid
                )
    return found


def report(found: list[dict]) -> None:
    best = {M: min(row["us"] for row in found if row["M"] == M) for M in ROWS}
    cost: dict[tuple, dict] = {}
    for row in found:
        cost.setdefault((row["rows"], row["segments"], row.get("slack", 0)), {})[row["M"]] = row["us"]
    first = found[0]
    print(f"{first['N']} x {first['K']} {first['pattern']}: best", {M: round(us, 2) for M, us in best.items()})
    ranked = sorted(cost.items(), key=lambda item: sum(math.log(us / best[M]) for M, us in item[1].items()))
    for grid, us in ranked[:3]:
        print("  ", grid, {M: f"{us[M] / best[M]:.2f}" for M in ROWS})
    for M in ROWS[:2]:
        print(
            f"   M={M}", [(grid, round(us[M], 2)) for grid, us in sorted(cost.items(), key=lambda item: item[1][M])[:3]]
        )


if __name__ == "__main__":
    main()
