"""Draw how a format's fastest kernel compares with cuBLAS by rows of x, a panel to a format, and where it crosses one.

python benchmarks/plot_batch.py benchmarks/results/paths-h100.jsonl benchmarks/results/batch-h100.jsonl out.svg [--shape 14336x4096]
"""

import argparse
from pathlib import Path

from rows import load, named


def batch_rows(*paths: Path) -> dict[tuple, dict]:
    """Rows by (N, K, format, pattern and whose mask, M). Of the kernels that tune_paths.py timed one by one, or cuSPARSELt's algorithms,
    the fastest; of bench_batch.py, which times what the dispatcher picks, the last row, where the first have none.
    """
    rows = [row for path in paths if path.exists() for row in load(path)]
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["bench"]):  # batch first
        key = row["N"], row["K"], row["format"], named(row["pattern"], row["mask"]), row["M"]
        before = found.get(key)
        if not before or before["bench"] == "batch" or before["us"] > row["us"]:
            found[key] = row
    return dict(sorted(found.items(), key=lambda item: (-item[0][0], -item[0][1], *item[0][2:])))


def draw(found: dict, path: str, shape: tuple[int, int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {key[2:]: row["speedup"] for key, row in found.items() if key[:2] == shape}
    formats, sizes = list(dict.fromkeys(key[0] for key in found)), sorted({key[2] for key in found})
    figure, panels = plt.subplots(
        1, len(formats), figsize=(1.5 + 4.5 * len(formats), 4.2), sharey=True, layout="constrained", squeeze=False
    )
    for axes, format in zip(panels.flat, formats, strict=True):
        for pattern in dict.fromkeys(key[1] for key in found if key[0] == format):
            line = {M: speed for (f, p, M), speed in sorted(found.items()) if (f, p) == (format, pattern)}
            axes.plot(line.keys(), line.values(), "o-", label=pattern)
        axes.set(xlabel="rows of x", title=format, xscale="log", xticks=sizes, xticklabels=sizes)
        axes.tick_params(axis="x", labelsize=7, rotation=45)
        axes.minorticks_off()
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0, 0].set(ylabel="times cuBLAS, bf16")
    figure.suptitle("{} x {}".format(*shape))
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="JSON-lines files")
    parser.add_argument("out", help="the plot, .svg or .png")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), default=(14336, 4096))
    args = parser.parse_args()
    draw(batch_rows(*args.rows), args.out, args.shape)
