"""Measure every kernel of every packed format by itself over rows of x, and write from it what the dispatcher goes by, kernels/measured.py.

    python benchmarks/tune_paths.py --rows benchmarks/results/paths-h100.jsonl [--formats tile --shapes 4096x4096 --patterns 0.5@256]
    python benchmarks/tune_paths.py --rows benchmarks/results/paths-h100.jsonl --table    # measure nothing, write the table of all rows

Measuring leaves the table alone: of a few layers it would keep only those.
Layers that bench_matmul.py measured, in h100.jsonl beside the rows, are in the table too.
`--warm` only compiles: kernels compile one after the other in a process, so run several of them, of other shapes, before measuring.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_matmul import TOLERANCE, pinned, relative_error
from quality import environment
from rows import load
from shapes import density, mask, sparse
from timing import clock, copies, copy_roof, ring_length

from dlpkit.kernels import formats

TABLE = Path(__file__).parents[1] / "kernels" / "measured.py"
SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (6144, 4096), (1024, 4096)]
UNSTRUCTURED = ["0.5", "0.6", "0.7", "0.8"]
PATTERNS = {
    "sell": UNSTRUCTURED,
    "nm": ["2:4"],
    "fragment": ["2:4"],
    "tile": [*(f"{sparsity}@256" for sparsity in UNSTRUCTURED), "0.5", "0.7", "2:4"],
}
FEW, MANY = [1, 2, 4, 8, 16, 24, 32, 48, 64], [16, 32, 64, 128, 256, 512, 1024, 2048]
KERNELS = {  # format -> kernel -> rows of x
    "sell": {"walk": FEW, "expand": MANY},
    "nm": {"pick": FEW, "expand": MANY},
    "fragment": {"mma": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], "expand": MANY[4:]},
    "tile": {"batch": [8, 16, 32, 64, 128, 256, 512], "expand": MANY[2:]},
}
TIMED_MS = 6


def main() -> None:
    args = parse()
    layers = [
        (shape, format, pattern)
        for shape in args.shapes for format in args.formats for pattern in PATTERNS[format]
        if not args.patterns or pattern in args.patterns
    ]  # fmt: skip
    if args.warm:
        for layer in layers:
            warm(*layer, args.kernels)
        return
    if args.table:
        TABLE.write_text(table(table_rows(args.rows)), encoding="utf-8")
        return
    wrong = []
    roof, where = copy_roof(), environment(args.commit)
    for layer in layers:
        found = list(measure(*layer, args.kernels))
        show(found)
        wrong += [row for row in found if row["error"] >= TOLERANCE]
        found = [row for row in found if row["error"] < TOLERANCE]
        with args.rows.open("a") as file:
            for row in found:
                file.write(json.dumps(row | {"roof_pct": round(100 * row["gbps"] / roof, 1)} | where) + "\n")
    if wrong:
        raise SystemExit(f"products that are wrong, and left out: {wrong}")


def measure(shape: tuple[int, int], format: str, pattern: str, kernels: list[str]) -> Iterator[dict]:
    """Rows of those kernels of a format, on one layer."""
    weight = sparse(shape, pattern)
    packed = formats.get(format).pack(weight)
    ring = copies(packed, ring_length(packed.nbytes))
    for kernel, rows in _asked(format, kernels):
        for M in rows:
            yield {"bench": "paths"} | timed(kernel, weight, ring, pattern, M)


def timed(kernel: str, weight: torch.Tensor, ring: list[formats.Packed], pattern: str, M: int) -> dict:
    """The row of one kernel, for M rows of x by a ring of packed copies of a weight."""
    xs = [torch.randn(M, weight.shape[1], device="cuda", dtype=weight.dtype) for _ in ring]
    with pinned(kernel):
        error = relative_error(ring[0].matmul(xs[0]), (xs[0].float() @ weight.float().t()).double())
        us, spread = clock([functools.partial(p.matmul, x) for p, x in zip(ring, xs, strict=True)], TIMED_MS)
    about = {"kernel": kernel, "format": formats.name(type(ring[0]))}
    return about | columns(weight, pattern, M, ring[0].nbytes, error, us, spread)


def columns(weight: torch.Tensor, pattern: str, M: int, nbytes: int, error: float, us: float, spread: float) -> dict:
    """What a row says of a product of M rows of x by a weight that takes `nbytes`."""
    N, K = weight.shape
    baseline = dense_us((N, K), M)
    return {
        "N": N, "K": K, "M": M, "dtype": "bfloat16", "pattern": pattern, "sparsity": round(1 - density(pattern), 4), "mask": "random",
        "error": round(error, 6), "baseline": "cublas", "us": round(us, 2), "spread": round(spread, 3), "baseline_us": round(baseline, 2),
        "speedup": round(baseline / us, 3), "gbps": round((nbytes + 2 * M * (N + K)) / us / 1e3),
    }  # fmt: skip


def _asked(format: str, kernels: list[str]) -> list[tuple[str, list[int]]]:
    """Of those kernels the format's, each with its rows of x."""
    return [(kernel, rows) for kernel, rows in KERNELS[format].items() if kernel in kernels]


def warm(shape: tuple[int, int], format: str, pattern: str, kernels: list[str]) -> None:
    packed = formats.get(format).pack(sparse(shape, pattern))
    for kernel, rows in _asked(format, kernels):
        for M in rows if kernel != "expand" else rows[:1]:
            with pinned(kernel):
                packed.matmul(torch.zeros(M, shape[1], device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()


@functools.cache
def dense_us(shape: tuple[int, int], M: int) -> float:
    N, K = shape
    n = ring_length(2 * N * K)
    weights, xs = ([torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for _ in range(n)] for rows in (N, M))
    calls = [functools.partial(torch.nn.functional.linear, x, w) for x, w in zip(xs, weights, strict=True)]
    return clock(calls, TIMED_MS)[0]


def show(found: list[dict]) -> None:
    """Times cuBLAS, a kernel to a line."""
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        line = [f"{row['M']}: {row['speedup']:.2f}" for row in found if row["kernel"] == kernel]
        first = found[0]
        what = f"{first['N']:6} x {first['K']:5} {first['format']:5} {first['pattern']:8} {kernel:8}"
        print(what, "  ".join(line), flush=True)


def table_rows(path: Path) -> list[dict]:
    """What the table is written from, last what counts most: the kernels one by one, before them random masks of bench_matmul.py."""
    beside = path.parent / "h100.jsonl"
    found = load(beside) if beside.exists() else []
    return [row for row in found if row["bench"] == "matmul" and row["mask"] == "random"] + load(path)


def table(rows: list[dict]) -> str:
    """The text of kernels/measured.py: of several rows with equal settings the last one counts."""
    speeds: dict[str, dict[tuple, dict[int, float]]] = {}
    for row in rows:
        pattern = row["pattern"]
        layer = row["kernel"], row["N"], row["K"], round(density(pattern), 4), mask(pattern)
        speeds.setdefault(row["format"], {}).setdefault(layer, {})[row["M"]] = row["speedup"]
    where = {key: ", ".join(sorted({row[key] for row in rows})) for key in ("gpu", "torch", "triton", "commit")}
    lines = [
        f'"""Measured: times cuBLAS by format, kernel, N, K, share kept, mask and rows of x. {where["gpu"]}, bfloat16.',
        "",
        f"torch {where['torch']}, Triton {where['triton']}, commit {where['commit']}. Written by benchmarks/tune_paths.py.",
        '"""',
        "",
        "# fmt: off",
        "SPEED: dict[str, dict[tuple[str, int, int, float, str], dict[int, float]]] = {",
    ]
    for format in sorted(speeds):
        lines.append(f'    "{format}": {{')
        in_order = sorted(speeds[format].items(), key=lambda item: (item[0][1:], item[0][0]))
        for (kernel, N, K, kept, kind), by_rows in in_order:
            lines.append(f'        ("{kernel}", {N}, {K}, {kept}, "{kind}"): {dict(sorted(by_rows.items()))},')
        lines.append("    },")
    return "\n".join([*lines, "}", "# fmt: on", ""])


def parse() -> argparse.Namespace:
    parser = sweep(__doc__)
    kernels = sorted({kernel for rows in KERNELS.values() for kernel in rows})
    parser.add_argument("--formats", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--table", action="store_true", help="write the table from the rows, and measure nothing")
    return checked(parser)


def sweep(doc: str) -> argparse.ArgumentParser:
    """What every sweep over layers takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="JSON-lines file to append to")
    parser.add_argument("--shapes", nargs="+", type=lambda text: tuple(map(int, text.split("x"))), default=SHAPES)
    parser.add_argument("--patterns", nargs="+")
    parser.add_argument("--warm", action="store_true", help="only compile")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if not args.warm and not args.rows:
        parser.error("--rows says which file to append to")
    return args


if __name__ == "__main__":
    main()
