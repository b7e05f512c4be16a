"""Write the README's tables from the rows under benchmarks/results, between the comments that mark their places.

python benchmarks/readme.py            # rewrite README.md
python benchmarks/readme.py --check    # exit 1 if it is not up to date
"""

import argparse
import json
import re
import sys
from pathlib import Path

import plot

from dlpkit.report import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows(file: str) -> list[dict]:
    """The rows of a results file; of several with equal settings the last one counts."""
    path = RESULTS / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def quality() -> str:
    """Perplexity by pattern, criterion and allocation; the best allocation of each criterion in bold."""
    found = rows("quality-h100.jsonl")
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
    found = rows("sizes.jsonl")
    formats = [key.removeprefix("memory_") for key in found[0] if key.startswith("memory_")]
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


def kernels() -> str:
    """Microseconds and speed-ups of every layer and number of rows, with what they were measured on."""
    found = plot.matmul_rows(RESULTS / "h100.jsonl")
    first = next(iter(found.values()))
    commits = ", ".join(sorted({row["commit"] for row in found.values()}))
    return f"{plot.table(found)}\n\n{first['gpu']}, {first['dtype']}, torch {first['torch']}, Triton {first['triton']}, commit {commits}."


def packing() -> str:
    """Time to pack and unpack one layer on the GPU, and the share of copy bandwidth that it is."""
    found = {(r["N"], r["K"], r["kernel"], r["pattern"]): r for r in rows("h100.jsonl") if r["bench"] == "pack"}
    lines = [
        (f"{N} x {K}", verb, pattern, f"{r['us'] / 1e3:.2f} ms", f"{r['roof_pct']:.0f} %")
        for (N, K, verb, pattern), r in found.items()
    ]
    return table(lines, ("layer", "what", "pattern", "time", "of copy bandwidth"))


def share(size: int | None, dense: int) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB, {size / dense:.1%}"


TABLES = {"quality": quality, "sizes": sizes, "kernels": kernels, "packing": packing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    after = filled(before)
    if check and after != before:
        sys.exit("README.md is not what benchmarks/results says: run python benchmarks/readme.py")
    (ROOT / "README.md").write_text(after, encoding="utf-8")


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
