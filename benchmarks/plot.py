"""Draw the matmul rows of a results file: speed-up over cuBLAS by sparsity and by rows of x, with the byte ceiling drawn in.

python benchmarks/plot.py benchmarks/results/h100.jsonl out.svg     the plot
python benchmarks/plot.py benchmarks/results/h100.jsonl             a Markdown table on standard output
"""

import argparse
from pathlib import Path

from rows import load, named

SHAPES = [
    (14336, 4096),
    (4096, 14336),
    (11008, 4096),
    (8192, 8192),
    (28672, 8192),
    (4096, 4096),
    (4096, 1024),
    (1024, 4096),
]
SPARSITIES = ["0.5", "0.6", "0.7", "0.8"]
ROWS = [1, 2, 4, 8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a JSON-lines file")
    parser.add_argument("out", nargs="?", help="the plot, .svg or .png; without it a table is printed")
    args = parser.parse_args()
    found = matmul_rows(args.rows)
    if args.out:
        draw(found, args.out)
    else:
        print(table(found))


def matmul_rows(path: Path) -> dict[tuple, dict]:
    """Rows by (N, K, M, pattern, mask); of several the last one counts."""
    return {(r["N"], r["K"], r["M"], r["pattern"], r["mask"]): r for r in load(path) if r["bench"] == "matmul"}


def table(found: dict) -> str:
    """Microseconds and speed-up over cuBLAS; at M = 1 also over the dense Triton GEMV, in brackets."""
    patterns = [(p, mask) for mask in ("random", "wanda") for p in (*SPARSITIES, "2:4", "8:16")]
    patterns = [pattern for pattern in patterns if any(key[3:] == pattern for key in found)]
    head = ["layer", "M", "cuBLAS us", *(named(*pattern) for pattern in patterns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for N, K in SHAPES:
        for M in ROWS:
            cells = [found.get((N, K, M, *pattern)) for pattern in patterns]
            dense = next((f"{r['baseline_us']:.1f}" for r in cells if r), None)
            if dense:
                texts = [f"{r['us']:.1f} **{r['speedup']:.2f}**" + _gemv(r) if r else "" for r in cells]
                lines.append(f"| {N} x {K} | {M} | {dense} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _gemv(row: dict) -> str:
    return f" ({row['triton_gemv_us'] / row['us']:.2f})" if row["M"] == 1 else ""


def draw(found: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_sparsity, by_rows) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    percent = [100 * float(p) for p in SPARSITIES]
    large = [shape for shape in SHAPES if shape[0] * shape[1] >= 4096 * 4096]
    for shape in large:
        by_sparsity.plot(
            percent,
            [found[(*shape, 1, p, "random")]["speedup"] for p in SPARSITIES],
            "o-",
            label="{} x {}".format(*shape),
        )
    by_sparsity.plot(
        percent, [16 / (20 * (1 - float(p))) for p in SPARSITIES], "k--", label="bytes alone (20 bits a value)"
    )
    by_sparsity.set(xlabel="sparsity, %", ylabel="times cuBLAS, bf16", title="one row of x", xticks=percent)
    for pattern in [*SPARSITIES, "2:4"]:
        by_rows.plot(ROWS, [found[14336, 4096, M, pattern, "random"]["speedup"] for M in ROWS], "o-", label=pattern)
    by_rows.set(xlabel="rows of x", title="14336 x 4096", xscale="log", xticks=ROWS, xticklabels=ROWS)
    by_rows.minorticks_off()
    for axes in (by_sparsity, by_rows):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
