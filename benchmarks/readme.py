"""Write the README's tables from the rows under benchmarks/results, between the comments that mark their places.

python benchmarks/readme.py            # rewrite README.md
python benchmarks/readme.py --check    # exit 1 if it is not up to date
"""

import argparse
import re
import sys

import rows
import speed_tables

from dlpkit.report import table


def quality() -> str:
    """Perplexity by pattern, criterion and allocation; the best allocation of each criterion in bold."""
    found = rows.read("quality-h100.jsonl")
    by = {(r["pattern"], r["criterion"], r["allocation"]): r["perplexity"] for r in found}
    patterns, criteria, allocations = (list(dict.fromkeys(key[i] for key in by)) for i in range(3))
    lines = []
    for pattern in patterns:
        line = [pattern]
        for criterion in criteria:
            values = [by[pattern, criterion, allocation] for allocation in allocations]
            line += [f"**{number(v)}**" if v == min(values) else number(v) for v in values]
        lines.append(tuple(line))
    header = ("pattern", *(f"{criterion} {allocation}" for criterion in criteria for allocation in allocations))
    first = found[0]
    return (
        f"{table(lines, header)}\n\n{first['model']}, {first['dtype']}, dense {first['dense_perplexity']:.2f}; {first['gpu']}, torch {first['torch']}, "
        f"transformers {first['transformers']}, commit {first['commit']}."
    )


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def sizes() -> str:
    """Bytes of the pruned Linears on disk and in each runtime format."""
    found = rows.read("sizes.jsonl")
    keys = [key for key in found[0] if key.startswith("memory_") and any(row.get(key) for row in found)]
    formats = [key.removeprefix("memory_") for key in keys]
    lines = []
    for row in found:
        memory = [share(row.get(f"memory_{format}"), row["dense_linears"]) for format in formats]
        lines.append(
            (
                row["pattern"],
                share(row["disk_linears"], row["dense_linears"]),
                f"{row['disk_model'] / 1e6:.1f} MB",
                *memory,
            )
        )
    header = (
        "pattern",
        "pruned Linears on disk",
        "whole model on disk",
        *(f"in memory as {format}" for format in formats),
    )
    first = found[0]
    dense = f"dense: Linears {first['dense_linears'] / 1e6:.1f} MB, whole model {first['dense_model'] / 1e6:.1f} MB"
    return f"{table(lines, header)}\n\n{first['model']}, {first['criterion']}; {dense}; commit {first['commit']}."


def recovery() -> str:
    """Perplexity of a weight-pruned model as each method trains it and as it is saved, with the share of zeros."""
    found = rows.read("recovery-h100.jsonl")
    best = {}
    for row in found:  # of several learning rates, the one with the lowest validation loss
        if row["method"] not in best or lowest(row) < lowest(best[row["method"]]):
            best[row["method"]] = row
    lines = [
        (
            row["method"],
            f"{row['lr']:g}",
            f"{row['trainable'] / 1e6:.2f} M",
            number(row["perplexity_before"]),
            number(row["perplexity_trained"]),
            f"**{number(row['perplexity_merged'])}**",
            f"{row['sparsity_before']:.4%}",
            f"{row['sparsity_after']:.4%}",
            f"{row['train_seconds']:.0f} s",
        )
        for row in best.values()
    ]
    header = ("method", "lr", "trained", "before", "as trained", "as saved", "zeros before", "zeros after", "training")
    first = found[0]
    return (
        f"{table(lines, header)}\n\n{first['model']}, {first['dtype']}, {first['criterion']} {first['allocation']} {first['pattern']}, "
        f"dense {first['dense_perplexity']:.2f}; {first['steps']} steps of {first['batch_size']} windows of {first['seqlen']} tokens of C4; "
        f"{first['gpu']}, torch {first['torch']}, commit {commits(found)}."
    )


def commits(found: list[dict]) -> str:
    return ", ".join(sorted({row["commit"] for row in found}))


def lowest(row: dict) -> float:
    return min(loss for _, loss in row["validation"])


def width() -> str:
    return widths("width-h100.jsonl")


def width_options() -> str:
    return widths("width-options-cpu.jsonl")


def widths(file: str) -> str:
    """What width pruning leaves, by method and share of parameters removed: held-out loss, perplexity, and that after recovery, where measured."""
    found = [row for row in rows.read(file) if row["bench"] == "width"]
    shown = {"held_out_loss": "C4 loss", "perplexity": "perplexity", "perplexity_recovered": "recovered"}
    columns = [
        (target, key)
        for target in sorted({row["target"] for row in found})
        for key in shown
        if any(key in row for row in found if row["target"] == target)
    ]
    by: dict[str, dict] = {}
    for row in found:
        name = " ".join([row["method"], *map(str, row["options"].values())])
        by.setdefault(name, {}).update({(row["target"], key): row[key] for key in shown if key in row})
    lines = [
        (
            name,
            *(
                "" if value is None else f"{value:.3f}" if key == "held_out_loss" else number(value)
                for (_, key), value in zip(columns, [at.get(column) for column in columns], strict=True)
            ),
        )
        for name, at in by.items()
    ]
    header = ("method", *(f"{target:.0%}: {shown[key]}" for target, key in columns))
    first = found[0]
    dense = f"dense C4 loss {first['dense_held_out_loss']:.3f}"
    if "dense_perplexity" in first:
        dense += f", perplexity {first['dense_perplexity']:.2f}"
    where = "a CPU" if first["gpu"] == "none" else first["gpu"]
    return (
        f"{table(lines, header)}\n\n{first['model']}, {first['dtype']}, {first['nsamples']} windows of {first['seqlen']} tokens, {dense}; {where}, "
        f"torch {first['torch']}, commit {commits(found)}."
    )


def depth() -> str:
    """Perplexity of depth-pruned models by method and share of parameters removed."""
    found = [row for row in rows.read("depth-h100.jsonl") if row["bench"] == "depth-quality"]
    by = {(row["method"], row["target"]): row["perplexity"] for row in found}
    methods, targets = dict.fromkeys(row["method"] for row in found), sorted({row["target"] for row in found})
    lines = [
        (method, *(number(by[method, target]) if (method, target) in by else "" for target in targets))
        for method in methods
    ]
    first = found[0]
    header = ("method", *(f"{target:.0%} removed" for target in targets))
    return (
        f"{table(lines, header)}\n\n{first['model']}, {first['dtype']}, all windows of {first['eval_seqlen']} tokens of WikiText-2, "
        f"dense {first['dense_perplexity']:.2f}; {first['gpu']}, torch {first['torch']}, commit {commits(found)}."
    )


def search() -> str:
    """What BlockPruner's search cost, against running the whole model for every candidate."""
    lines = []
    for row in [*rows.read("depth-h100.jsonl"), *rows.read("depth-cpu.jsonl")]:
        if row["bench"] in ("depth-search", "depth-7b"):
            machine = "CPU" if row["gpu"] == "none" else row["gpu"].split()[1]
            model = row.get("shapes", row.get("model"))
            how = row.get("how") or ("lazy" if row["lazy"] else "trunk")
            each = row.get("seconds_per_block")
            seconds = f"{sum(each) / len(each):.1f} s a block" if each else f"{row['seconds']:.0f} s"
            text = f"{row['nsamples']} x {row['seqlen']}"
            counted = "tflop" in row  # the naive loop itself is only timed
            saved = f"{row['naive_tflop'] / row['tflop']:.1f} x fewer" if counted else ""
            lines.append(
                (
                    model,
                    how,
                    row.get("blocks", len(each or ())),
                    text,
                    row["evaluations"],
                    f"{row['tflop']:.0f}" if counted else "",
                    saved,
                    seconds,
                    machine,
                )
            )
    header = ("model", "how", "blocks", "tokens", "candidates asked", "TFLOP", "than naive", "time", "on")
    return table(lines, header)


def shorter() -> str:
    """Tokens per second and bytes of cache of Llama-3-8B shapes before and after cuts in depth and width."""
    found = [row for row in rows.read("depth-h100.jsonl") if row["bench"] == "depth-tokens"]
    lines = [
        (
            row["what"],
            f"{row['share']:.1%}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / found[0]['tokens_per_second']:.2f}",
            f"{row['kv_bytes_per_token'] / 1024:.0f} KiB",
        )
        for row in found
    ]
    header = ("removed", "of all parameters", "tokens/s", "speed-up", "cache per token")
    first = found[0]
    return f"{table(lines, header)}\n\n{first['shapes']} shapes, random weights, one sequence; {first['gpu']}, torch {first['torch']}, commit {first['commit']}."


def share(size: int | None, dense: int) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB, {size / dense:.1%}"


README = rows.ROOT / "README.md"
TABLES = {
    "quality": quality,
    "recovery": recovery,
    "width": width,
    "depth": depth,
    "search": search,
    "shorter": shorter,
    "width_options": width_options,
    "sizes": sizes,
    "kernels": speed_tables.kernels,
    "batches": speed_tables.batches,
    "picks": speed_tables.picks,
    "culling": speed_tables.culling,
    "packing": speed_tables.packing,
    "tokens": speed_tables.tokens,
    "first token": speed_tables.first_token,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if check and after != before:
        sys.exit("README.md is not what benchmarks/results says: run python benchmarks/readme.py")
    README.write_text(after, encoding="utf-8")


def filled(text: str) -> str:
    """`text` with every marked place filled anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: made by benchmarks/readme.py -->", f"<!-- end of {name} -->"
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, b=begin, e=end, m=make: f"{b}\n{m()}\n{e}",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    main()
