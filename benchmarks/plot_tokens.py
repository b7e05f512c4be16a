"""Draw the rows of bench_tokens.py: tokens per second at batch 1 beside what the bytes allow, and the speed-up by batch.

python benchmarks/plot_tokens.py benchmarks/results/tokens-h100.jsonl out.svg
"""

import argparse
from pathlib import Path

from rows import load


def token_rows(path: Path) -> dict[tuple, dict]:
    """Rows by (model or name of its folder, prompt, batch, pattern), dense first; of several the last one counts."""
    found = {(Path(r["model"]).name, r["prompt"], r["batch"], r["pattern"]): r for r in load(path)}
    return {key: found[key] for key in sorted(found, key=lambda key: (*key[:3], key[3] != "dense", key[3]))}


def draw(found: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({key[2] for key in found})
    panels = 2 if len(sizes) > 1 else 1
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.2), layout="constrained", squeeze=False)
    alone(axes[0, 0], {key: row for key, row in found.items() if key[2] == 1})
    if panels == 2:
        by_batch(axes[0, 1], found, sizes)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    figure.savefig(path)


def alone(axes, found: dict) -> None:
    names = [f"{model}, prompt {prompt}, {pattern}" for model, prompt, _, pattern in found]
    axes.barh(names, [row["tokens_per_s"] for row in found.values()], label="measured")
    ceilings = [1e9 * row["roof_gbps"] / row["step_bytes"] for row in found.values()]
    axes.plot(ceilings, names, "k|", markersize=16, label="weights at copy bandwidth")
    axes.set(xlabel="tokens per second", title="batch 1")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)


def by_batch(axes, found: dict, sizes: list[int]) -> None:
    for model, prompt, pattern in dict.fromkeys((m, p, pattern) for m, p, _, pattern in found if pattern != "dense"):
        line = {b: r["speedup"] for (m, p, b, s), r in found.items() if (m, p, s) == (model, prompt, pattern)}
        axes.plot(sorted(line), [line[b] for b in sorted(line)], "o-", label=f"{model}, prompt {prompt}, {pattern}")
    axes.set(xlabel="batch", ylabel="times the dense model", xscale="log", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.axhline(1, color="grey", linewidth=0.8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a JSON-lines file")
    parser.add_argument("out", help="the plot, .svg or .png")
    args = parser.parse_args()
    draw(token_rows(args.rows), args.out)
